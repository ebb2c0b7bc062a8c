"""The contract, point by point, in the reference: numbers, hidden values, gradients, weights, dtypes, layouts."""

import itertools

import pytest
import torch
import torch.nn.functional as F

import fastattn
from fastattn import attention, attention_weights, dropout_mask
from fastattn.masks import Causal, Dense, Full, Lengths, Segments, Window
from fastattn.testing import CASES, check_close, make_inputs, poison, run, with_dtype

WIDE = torch.float64


def tensors(*shapes, dtype=WIDE, grad=True, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=WIDE).to(dtype).requires_grad_(grad) for shape in shapes]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_reference_is_within_tolerance_and_repeats_bit_for_bit(case):
    problem = make_inputs(case)
    results = run(problem, "reference")
    check_close(problem, results)
    again = run(problem, "reference")
    assert all(torch.equal(results[name], again[name]) for name in results)


@pytest.mark.parametrize("case", [CASES["full"], CASES["everything"], CASES["causal-cross"]], ids=lambda case: case.id)
def test_the_tolerance_catches_a_wrong_result(case):
    """The tolerance must be able to fail: each tensor off by a little is caught."""
    problem = make_inputs(case)
    results = run(problem, "reference")
    for name in results:
        broken = dict(results)
        broken[name] = results[name] * 1.05
        with pytest.raises(AssertionError, match=f"{name}: "):
            check_close(problem, broken)
    with pytest.raises(AssertionError, match="NaN"):
        check_close(problem, {**results, "out": results["out"].clone().fill_(torch.nan)})


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_same_numbers_as_torch(dtype, causal):
    query, key, value = tensors((2, 4, 9, 16), (2, 4, 9, 16), (2, 4, 9, 8), dtype=dtype)
    ours = attention(query, key, value, mask=Causal() if causal else None)
    theirs = F.scaled_dot_product_attention(query, key, value, is_causal=causal)
    d_out = torch.randn_like(ours)
    grads = (torch.autograd.grad(each, (query, key, value), d_out) for each in (ours, theirs))
    bound = 2e-2 if dtype.itemsize == 2 else None  # each rounds the weights in its own way
    for mine, other in ((ours, theirs), *zip(*grads, strict=True)):
        torch.testing.assert_close(mine, other, atol=bound, rtol=bound)


def test_rows_that_see_no_key_give_zero_and_minus_infinity():
    query, key, value, bias = tensors((2, 2, 4, 8), (2, 2, 3, 8), (2, 2, 3, 8), (4, 3))
    out, lse = attention(query, key, value, mask=Lengths(torch.tensor([0, 2])), bias=bias, return_lse=True)
    assert torch.equal(out[0], torch.zeros_like(out[0]))
    assert (lse[0] == -torch.inf).all()
    assert lse[1].isfinite().all()
    grads = torch.autograd.grad((out.sum() + lse.masked_fill(lse == -torch.inf, 0).sum()), (query, key, value, bias))
    assert all(grad.isfinite().all() for grad in grads)
    assert (grads[0][0] == 0).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_nobody_sees_may_hold_anything(value):
    """Keys and values past the length, queries past theirs and their gradients: no effect, forward and backward."""
    clean = tensors((2, 4, 6, 8), (2, 2, 7, 8), (2, 2, 7, 8))
    mask = Lengths(torch.tensor([7, 3]), q_lengths=torch.tensor([6, 2]))
    d_out = torch.randn(2, 4, 6, 8, dtype=WIDE)
    results = []
    for dirty in (False, True):
        query, key, values = (each.detach().clone() for each in clean)
        gradient = d_out.clone()
        if dirty:
            key[1, :, 3:], values[1, :, 3:], query[1, :, 2:], gradient[1, :, 2:] = value, value, value, value
        leaves = [each.requires_grad_() for each in (query, key, values)]
        out = attention(*leaves, mask=mask)
        results.append((out.detach(), *torch.autograd.grad(out, leaves, gradient)))
    for left, right in zip(*results, strict=True):
        assert torch.equal(left, right)


def test_a_value_that_is_not_finite_reaches_only_the_rows_that_see_it():
    query, key, value = (each.detach() for each in tensors((1, 1, 5, 4), (1, 1, 5, 4), (1, 1, 5, 4)))
    value[0, 0, 3], key[0, 0, 4] = torch.inf, torch.nan
    leaves = [each.requires_grad_() for each in (query, key, value)]
    out = attention(*leaves, mask=Causal())
    assert out[0, 0, :3].isfinite().all()
    assert (out[0, 0, 3] == torch.inf).all()
    assert out[0, 0, 4].isnan().all()
    (dq,) = torch.autograd.grad(out[:, :, :3].sum(), query)
    assert dq[0, 0, :3].isfinite().all()


def test_a_gradient_that_is_not_finite_reaches_only_the_keys_its_row_sees():
    inputs = tensors((1, 1, 5, 4), (1, 1, 5, 4), (1, 1, 5, 4))
    out = attention(*inputs, mask=Causal())
    d_out = torch.ones_like(out)
    d_out[0, 0, 2] = torch.nan
    dq, dk, dv = torch.autograd.grad(out, inputs, d_out)
    assert dq[0, 0, [0, 1, 3, 4]].isfinite().all()
    assert dk[0, 0, 3:].isfinite().all()
    assert dv[0, 0, 3:].isfinite().all()
    assert dv[0, 0, :3].isnan().all()


def test_grouped_heads_read_their_key_head():
    query, key, value = tensors((1, 6, 5, 8), (1, 2, 7, 8), (1, 2, 7, 8))
    out = attention(query, key, value)
    for head in range(6):
        alone = attention(
            query[:, head : head + 1], key[:, head // 3 : head // 3 + 1], value[:, head // 3 : head // 3 + 1]
        )
        torch.testing.assert_close(out[:, head : head + 1], alone)


def test_bias_of_minus_infinity_hides_like_a_mask():
    query, key, value = tensors((1, 2, 5, 8), (1, 2, 6, 8), (1, 2, 6, 8))
    keep = torch.rand(5, 6) < 0.6
    keep[2] = False
    bias = torch.zeros(5, 6, dtype=torch.float32).masked_fill(~keep, -torch.inf).requires_grad_()
    by_bias = attention(query, key, value, bias=bias)
    by_mask = attention(query, key, value, mask=keep)
    torch.testing.assert_close(by_bias, by_mask)
    (d_bias,) = torch.autograd.grad(by_bias.sum(), bias)
    assert d_bias.isfinite().all()
    assert (d_bias[~keep] == 0).all()


@pytest.mark.parametrize(
    "shape", list(itertools.product((1, 2), (1, 3), (1, 4), (1, 5))), ids=lambda s: "x".join(map(str, s))
)
def test_bias_gradient_has_the_shape_and_dtype_of_the_bias(shape):
    query, key, value = tensors((2, 3, 4, 8), (2, 3, 5, 8), (2, 3, 5, 8), dtype=torch.bfloat16)
    bias = torch.randn(shape, requires_grad=True)
    (grad,) = torch.autograd.grad(attention(query, key, value, bias=bias).float().square().sum(), bias)
    wide = [each.detach().double() for each in (query, key, value)]
    leaf = bias.detach().double().requires_grad_()
    t = wide[0] @ wide[1].mT / 8**0.5 + leaf
    (want,) = torch.autograd.grad((t.softmax(-1) @ wide[2]).square().sum(), leaf)
    assert grad.shape == bias.shape
    assert grad.dtype == bias.dtype
    torch.testing.assert_close(grad.double(), want, atol=5e-2, rtol=5e-2)


def test_softcap_and_sinks_follow_their_formulas():
    query, key, value, sinks = tensors((1, 2, 5, 8), (1, 2, 6, 8), (1, 2, 6, 8), (2,))
    out, lse = attention(query, key, value, softcap=2.0, sinks=sinks, return_lse=True)
    t = 2.0 * torch.tanh(query @ key.mT / 8**0.5 / 2.0)
    torch.testing.assert_close(lse, t.logsumexp(-1))
    torch.testing.assert_close(out, torch.softmax(t, -1) @ value * torch.sigmoid(lse - sinks[:, None]).unsqueeze(-1))


@pytest.mark.parametrize("sink", [-1e4, 0.0, 1e4])
def test_sinks_far_from_the_scores_stay_finite(sink):
    query, key, value = tensors((1, 1, 3, 8), (1, 1, 4, 8), (1, 1, 4, 8))
    sinks = torch.tensor([sink], dtype=WIDE, requires_grad=True)
    out, lse = attention(query, key, value, sinks=sinks, return_lse=True)
    grads = torch.autograd.grad(out.sum() + lse.sum(), (query, key, value, sinks))
    assert out.isfinite().all()
    assert lse.isfinite().all()
    assert all(grad.isfinite().all() for grad in grads)


def test_dropout_keeps_the_bits_it_says():
    query, key, value = tensors((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 8))
    seed = torch.tensor([99])
    kept = dropout_mask(2, 3, 5, 7, p=0.4, seed=seed)
    out = attention(query, key, value, dropout_p=0.4, dropout_seed=seed)
    weights = attention_weights(query, key)
    torch.testing.assert_close(out, (weights * kept / 0.6) @ value)
    assert (attention(query, key, value, dropout_p=1.0) == 0).all()
    torch.manual_seed(5)
    first = attention(query, key, value, dropout_p=0.4)
    second = attention(query, key, value, dropout_p=0.4)
    torch.manual_seed(5)
    assert torch.equal(first, attention(query, key, value, dropout_p=0.4))
    assert not torch.equal(first, second)


def test_weights_are_what_the_output_is_made_of():
    query, key, value, sinks = tensors((2, 4, 5, 8), (2, 2, 7, 8), (2, 2, 7, 8), (4,))
    bias = torch.randn(4, 5, 7, dtype=WIDE, requires_grad=True)
    shared = {
        "mask": Causal() & Lengths(torch.tensor([7, 0])),
        "bias": bias,
        "softcap": 3.0,
        "sinks": sinks,
        "scale": 0.4,
    }
    out, lse = attention(query, key, value, return_lse=True, **shared)
    for given in (None, lse):
        weights = attention_weights(query, key, lse=given, **shared)
        torch.testing.assert_close(weights @ value.repeat_interleave(2, 1), out)
        torch.testing.assert_close(attention_weights(query, key, lse=given, heads="mean", **shared), weights.mean(1))
        rows = attention_weights(query, key, lse=given, rows=[0, -1], **shared)
        torch.testing.assert_close(rows, weights[:, :, [0, 4]])
        (through,) = torch.autograd.grad(weights.square().sum(), query, retain_graph=True)
        (direct,) = torch.autograd.grad(attention_weights(query, key, **shared).square().sum(), query)
        torch.testing.assert_close(through, direct)
    assert (weights[1] == 0).all()


def test_weights_from_lse_have_finite_gradients_far_from_zero():
    leaves = [torch.full((1, 1, 3, 8), value, requires_grad=True) for value in (-9.0, 9.0)]
    keep = torch.tensor([True, True, False])
    lse = attention(*leaves, leaves[1], mask=keep, return_lse=True)[1]
    assert lse.max() < -200
    grads = []
    for given in (None, lse):
        weights = attention_weights(*leaves, lse=given, mask=keep)
        grads.append(torch.autograd.grad(weights.square().sum(), leaves, retain_graph=True))
    for left, right in zip(*grads, strict=True):
        assert right.isfinite().all()
        torch.testing.assert_close(left, right, atol=1e-4, rtol=1e-4)  # an ulp of such an lse is 2e-5 of a weight


def test_weights_of_nothing():
    query, key = tensors((1, 2, 3, 8), (1, 2, 0, 8))
    weights = attention_weights(query, key, rows=[0, -1])
    assert weights.shape == (1, 2, 2, 0)
    weights.sum().backward()
    assert (query.grad == 0).all()
    none = torch.zeros(1, 0, 3, 8)
    assert (attention_weights(none, none, heads="mean") == 0).all()


@pytest.mark.parametrize(
    ("layout", "order"),
    [("bhld", (0, 1, 2, 3)), ("blhd", (0, 2, 1, 3))],
)
def test_output_keeps_the_querys_layout(layout, order):
    case = CASES["blhd"] if layout == "blhd" else CASES["full"]
    inputs = make_inputs(case).inputs
    out = attention(*inputs[:3])
    assert out.permute(order).is_contiguous()
    # One head or one row: both layouts are the same memory, and the strides are the query's own.
    for shape in ((2, 1, 5, 8), (2, 5, 1, 8)):
        query = torch.randn(shape)
        assert attention(query, query, query).stride() == query.stride()
        turned = torch.randn(2, shape[2], shape[1], 8).transpose(1, 2)
        assert attention(turned, turned, turned).stride() == turned.stride()


def test_gradients_of_expanded_keys_sum_over_the_batch():
    query, key = tensors((3, 2, 4, 8), (1, 2, 5, 8))
    shared = attention(query, key.expand(3, -1, -1, -1), key.expand(3, -1, -1, -1))
    (grad,) = torch.autograd.grad(shared.sum(), key)
    alone = sum(torch.autograd.grad(attention(query[b : b + 1], key, key).sum(), key)[0] for b in range(3))
    torch.testing.assert_close(grad, alone)


def test_autocast_casts_as_torchs_sdpa_does():
    query, key, value = tensors((1, 2, 5, 8), (1, 2, 6, 8), (1, 2, 6, 8), dtype=torch.float32)
    bias = torch.randn(5, 6)
    with torch.autocast("cpu", torch.bfloat16):
        ours = attention(query, key.bfloat16(), value, bias=bias)
        theirs = F.scaled_dot_product_attention(query, key.bfloat16(), value, attn_mask=bias)
    assert ours.dtype == theirs.dtype == torch.bfloat16
    torch.testing.assert_close(ours, theirs, atol=3e-2, rtol=3e-2)
    (grad,) = torch.autograd.grad(ours.float().sum(), query)
    assert grad.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        other = attention(query.half(), key.half(), value.half(), bias=bias.half())
    assert other.dtype == torch.bfloat16


def test_autocast_narrows_the_inputs_and_nothing_else():
    """Sums stay float32, forward, backward, and in the weights."""
    wide = tensors((1, 2, 20, 16), (1, 2, 30, 16), (1, 2, 30, 16), dtype=torch.float32)
    half = [each.detach().bfloat16().requires_grad_() for each in wide]
    want = attention(*half, return_lse=True)
    want_grads = torch.autograd.grad(want[0].float().square().sum(), half)
    with torch.autocast("cpu", torch.bfloat16):
        got = attention(*wide, return_lse=True)
        got_grads = torch.autograd.grad(got[0].float().square().sum(), wide)
        weights = attention_weights(*wide[:2])
        transformed = torch.func.vmap(lambda each: attention(each, *wide[1:], return_lse=True)[1])(wide[0][None])
    assert got[1].dtype == weights.dtype == torch.float32
    for left, right in zip((*got, *got_grads), (*want, *want_grads), strict=True):
        assert torch.equal(left, right.to(left.dtype))
    assert torch.equal(weights, attention_weights(*half[:2]))
    torch.testing.assert_close(transformed[0], want[1])  # the plain formulation's


def test_tensor_masks_broadcast_and_mean_attend():
    query, key, value = tensors((2, 3, 4, 8), (2, 3, 5, 8), (2, 3, 5, 8))
    keep = torch.rand(2, 1, 1, 5) < 0.7
    want = F.scaled_dot_product_attention(query, key, value, attn_mask=keep)
    torch.testing.assert_close(attention(query, key, value, mask=keep), want)
    torch.testing.assert_close(attention(query, key, value, mask=Dense(keep)), want)


def test_segments_equal_each_document_alone():
    query, key, value = tensors((1, 2, 9, 8), (1, 2, 9, 8), (1, 2, 9, 8))
    ids = torch.tensor([[0, 0, 0, 1, 1, 1, 1, -1, -1]])
    out = attention(query, key, value, mask=Segments(ids) & Causal())
    for part in (slice(0, 3), slice(3, 7)):
        torch.testing.assert_close(
            out[:, :, part], attention(query[:, :, part], key[:, :, part], value[:, :, part], mask=Causal())
        )
    assert (out[:, :, 7:] == 0).all()


def test_more_than_65535_heads_and_2_to_the_31_elements_in_views():
    """Length-1 rows and stride-0 views: no index of a size is narrower than 64 bits, nothing of that size is made."""
    query = torch.randn(70_001, 1, 1, 2)
    out = attention(query, query, query)
    torch.testing.assert_close(out, query)
    wide = torch.randn(1, 1, 1, 8).expand(1, 1, 2, 8)
    far = torch.randn(1).as_strided((1, 1, 2, 1), (2**33, 2**33, 0, 1))
    assert attention(wide, wide, wide).shape == wide.shape
    assert attention(far, far, far).shape == far.shape


def test_outputs_do_not_come_from_poisoned_memory():
    with poison():
        assert torch.empty(3).isnan().all()
        out = attention(*(torch.randn(1, 2, 3, 8) for _ in range(3)), mask=Window(0, 0))
    assert out.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["full", "causal", "everything"])
def test_every_dtype_stays_within_tolerance(name, dtype):
    problem = make_inputs(with_dtype(CASES[name], dtype))
    results = run(problem, "reference")
    check_close(problem, results)
    assert results["out"].dtype == dtype
    assert results["lse"].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_names_at_the_top():
    for name in ("attention", "attention_weights", "dropout_mask", "explain", "masks", "BackendUnavailable"):
        assert hasattr(fastattn, name)
    assert str(Full()) == "Full()"
