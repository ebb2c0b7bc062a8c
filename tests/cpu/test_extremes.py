"""Numbers at the ends of their range, on every instruction set: scores that swallow their differences, biases that are
nearly -inf, half-precision denormals, and bytes that are no bools.
"""

import pytest
import torch

from fastattn import attention, attention_weights
from fastattn.masks import Lengths

pytestmark = pytest.mark.usefixtures("library")

LOWEST = torch.finfo(torch.float32).min


def tensors(q_len=70, heads=2, dtype=torch.float32):
    """Query, key, value; 70 queries go by tiles, few of them row by row."""
    generator = torch.Generator().manual_seed(q_len)
    lengths = (q_len, 70, 70)
    return [torch.randn(1, heads, n, 32, generator=generator).to(dtype).requires_grad_() for n in lengths]


def results(leaves, **named):
    """out, lse and the gradients of the leaves."""
    out, lse = attention(*leaves[:3], return_lse=True, backend="cpu", **named)
    return out, lse, *torch.autograd.grad((out.float().sum(), lse.clamp(min=-9).sum()), leaves, (torch.ones(()),) * 2)


@pytest.mark.parametrize("q_len", [70, 1])
@pytest.mark.parametrize("shift", [-1e9, -1e10, -1e30, LOWEST, 1e10, 1e30, -LOWEST])
def test_a_bias_that_swallows_a_rows_scores_gives_the_mean(shift, q_len, isa):
    leaves = tensors(q_len)
    plain = attention(*leaves[:3], backend="cpu")
    bias = torch.zeros(q_len, 70)
    bias[0] = shift
    leaves.append(bias.requires_grad_())
    out, lse, *grads = results(leaves, bias=bias)
    assert torch.equal(lse[:, :, 0], torch.full((1, 2), shift))
    assert all(each.isfinite().all() for each in grads)
    torch.testing.assert_close(out[:, :, 1:], plain[:, :, 1:])
    weights = attention_weights(*leaves[:2], bias=bias, lse=lse)
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]), atol=1e-5, rtol=0)
    torch.testing.assert_close(out[:, :, 0], leaves[2].mean(2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("q_len", [70, 1])
@pytest.mark.parametrize("scale", [1e10, 1e29, 1e32])
def test_a_huge_scale_chooses_the_largest(scale, q_len, dtype, isa):
    leaves = tensors(q_len, dtype=dtype)
    out, _, *grads = results(leaves, scale=scale)
    best = (leaves[0].double() @ leaves[1].double().mT).argmax(-1, keepdim=True)
    torch.testing.assert_close(out, leaves[2].take_along_dim(best, 2))
    assert all(each.isfinite().all() for each in grads[2:])


@pytest.mark.parametrize("q_len", [70, 1])
@pytest.mark.parametrize("scale", [0.0, 1e-35, -0.3])
def test_a_scale_of_any_sign(scale, q_len, isa):
    leaves = tensors(q_len)
    negated = results([-leaves[0], *leaves[1:]], scale=-scale)
    for got, want in zip(results(leaves, scale=scale), negated, strict=True):
        torch.testing.assert_close(got.abs(), want.abs())
    if scale > -0.1:
        torch.testing.assert_close(
            attention(*leaves, scale=scale, backend="cpu"), leaves[2].mean(2, True).expand_as(leaves[0])
        )


@pytest.mark.parametrize("sink", [-torch.inf, torch.inf])
def test_infinite_sinks_and_rows_that_see_nothing(sink, isa):
    leaves = tensors()
    mask = Lengths(torch.tensor([70]), q_lengths=torch.tensor([50]))
    sinks = torch.full((2,), sink)
    out = attention(*leaves, mask=mask, sinks=sinks, backend="cpu")
    weights = attention_weights(*leaves[:2], mask=mask, sinks=sinks)
    assert (out[:, :, 50:] == 0).all() and (weights[:, :, 50:] == 0).all()
    if sink > 0:
        assert (out == 0).all() and (weights == 0).all()
    else:
        assert torch.equal(out, attention(*leaves, mask=mask, backend="cpu"))
        torch.testing.assert_close(weights.sum(-1)[:, :, :50], torch.ones(1, 2, 50))


@pytest.mark.parametrize("q_len", [70, 1])
def test_float16_denormals_are_numbers(q_len, isa):
    query, key, _ = (each.detach() for each in tensors(q_len, dtype=torch.float16))
    small = torch.arange(70 * 32).view(1, 1, 70, 32).expand(1, 2, -1, -1) % 1100 * 2.0**-24
    value = small.half()
    value[..., ::3] *= -1
    out = attention(query, key, value, backend="cpu")
    want = attention(query.float(), key.float(), value.float() * 2**12, backend="cpu") * 2.0**-12
    torch.testing.assert_close(out.float(), want, atol=2.0**-24, rtol=2e-3)
    assert (out != 0).any()
    one = attention(query[:, :, :1], key[:, :, :1], value[:, :, 31:32], backend="cpu")
    assert torch.equal(one, value[:, :, 31:32])


@pytest.mark.parametrize("byte", [2, 128, 255])
@pytest.mark.parametrize("step", [1, 2])
def test_every_byte_of_a_bool_table_but_zero_is_true(byte, step, isa):
    leaves = tensors()
    table = torch.randint(0, 2, (70, 70 * step), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    odd, plain = (table * byte).view(torch.bool)[:, ::step], table[:, ::step] == 1
    for got, want in zip(results(leaves, mask=odd), results(leaves, mask=plain), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("q_len", [70, 1])
def test_a_score_at_its_cap_has_no_slope(q_len, isa):
    """Scores of 25,600 and a cap of 5: tanh is 1, and its derivative 0."""
    query, key, value = tensors(q_len)
    leaves = [(query.detach() * 0 + 100).requires_grad_(), (key.detach().sign() * 0 + 8).requires_grad_(), value]
    out = attention(*leaves, softcap=5.0, scale=1.0, backend="cpu")
    dq, dk, _ = torch.autograd.grad(out.square().sum(), leaves)
    assert (dq == 0).all() and (dk == 0).all()


@pytest.mark.parametrize("softcap", [1e31, 1e37, 3e38])
def test_a_softcap_above_every_score_changes_nothing(softcap, isa):
    leaves = tensors()
    for got, want in zip(results(leaves, softcap=softcap), results(leaves), strict=True):
        assert torch.equal(got, want)
