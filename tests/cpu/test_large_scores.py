"""Gradients beside large scores, on every instruction set: a row's lse rounds, and that must not reach the weights."""

import dataclasses

import pytest
import torch

from fastattn import attention, attention_weights, ops
from fastattn.masks import Lengths, Window
from fastattn.spec import AttnInputs, AttnSpec
from fastattn.testing import LARGE_CASES, Case, check_close, is_, make_inputs, run

pytestmark = pytest.mark.usefixtures("library")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def tensors(length, *, heads=2, kv_heads=2, dtype=torch.float32, size=200.0):
    """Query, key, value [1, heads, length, 16], scores about size ** 2."""
    generator = torch.Generator().manual_seed(length)
    query, key, value = (torch.randn(1, n, length, 16, generator=generator) for n in (heads, kv_heads, kv_heads))
    return [each.to(dtype).requires_grad_() for each in (query * size, key * size, value)]


def gradients(leaves, **named):
    generator = torch.Generator().manual_seed(1)
    out = attention(*leaves, backend="cpu", **named)
    d_out = torch.randn(out.shape, generator=generator).to(out.dtype)
    return d_out, torch.autograd.grad(out, leaves, d_out)


@pytest.mark.parametrize("length", [1, 100])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_only_key_of_a_row_has_the_whole_weight(dtype, length, isa):
    """The scores' product with 0.7 is no float, and its rounding is lse's."""
    leaves = [torch.full((1, 1, length, 16), x, dtype=dtype).requires_grad_() for x in (80.0, 83.0, 1.0)]
    out = attention(*leaves, mask=Window(0, 0), scale=0.7, backend="cpu")
    dq, dk, dv = torch.autograd.grad(out.sum(), leaves)
    assert (dv == 1).all() and (dq == 0).all() and (dk == 0).all()


@pytest.mark.parametrize("feature", ["plain", "grouped", "softcap", "bias", "dropout"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_value_that_one_query_alone_sees_gets_its_gradient(dtype, feature, isa):
    leaves = tensors(100, kv_heads=1 if feature == "grouped" else 2, dtype=dtype)
    named = {
        "softcap": {"softcap": 3e4},
        "bias": {"bias": torch.full((100, 100), 7777.7)},
        "dropout": {"dropout_p": 0.5, "dropout_seed": torch.tensor([3])},
    }.get(feature, {})
    d_out, (_, _, dv) = gradients(leaves, mask=Window(0, 0), scale=0.3, **named)
    if feature == "dropout":
        assert (((dv == 2 * d_out) | (dv == 0)).all(-1)).all()
    elif feature == "grouped":
        torch.testing.assert_close(dv, d_out.float().sum(1, keepdim=True).to(dtype), rtol=0, atol=0)
    else:
        assert torch.equal(dv, d_out)


@pytest.mark.parametrize("q_len", [1, 2, 4, 8])
@pytest.mark.parametrize("kv_len", [65, 257, 600])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_weights_of_few_queries_add_up_to_one(dtype, kv_len, q_len, isa):
    """Beside values of 1, a value's gradient is its weight."""
    torch.manual_seed(7)
    lengths = {"query": q_len, "key": kv_len}
    query, key = ((torch.randn(1, 2, n, 64) * 60).to(dtype).requires_grad_() for n in lengths.values())
    value = torch.ones(1, 2, kv_len, 64, dtype=dtype, requires_grad=True)
    out = attention(query, key, value, scale=1.0, backend="cpu")
    dv = torch.autograd.grad(out[:, :, 0].sum(), value)[0].double().sum(2)
    torch.testing.assert_close(dv, torch.ones(1, 2, 64, dtype=torch.float64), rtol=0, atol=8 * torch.finfo(dtype).eps)


def test_the_weight_of_an_only_key_is_one(isa):
    query, key, _ = (each.detach() for each in tensors(100))
    lse = attention(query, key, key, mask=Window(0, 0), scale=0.3, return_lse=True, backend="cpu")[1]
    weights = attention_weights(query, key, mask=Window(0, 0), scale=0.3, lse=lse)
    assert torch.equal(weights, torch.eye(100).expand_as(weights))
    few = Lengths(torch.tensor([3]))
    lse = attention(query, key, key, mask=few, scale=0.003, return_lse=True, backend="cpu")[1]
    weights = attention_weights(query, key, mask=few, scale=0.003, lse=lse)
    torch.testing.assert_close(weights.sum(-1), torch.ones(1, 2, 100), rtol=0, atol=1e-4)


@pytest.mark.parametrize("case", LARGE_CASES.values(), ids=LARGE_CASES)
def test_every_row_is_within_the_tolerance(case, isa):
    problem = make_inputs(case)
    results = run(problem, "cpu")
    check_close(problem, results)
    again = run(problem, "cpu")
    assert all(torch.equal(results[name], again[name]) for name in results)


@pytest.mark.parametrize("shift", [None, 1e6], ids=["plain", "large-bias"])
@pytest.mark.parametrize("scale", [1e4, 1e-6])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_gradients_beside_a_scale_at_the_end_of_its_range(dtype, scale, shift, isa):
    """The gradient of a score is as good as 0 beside a scale of 1e4: what rounding makes of it must not overflow."""
    bias = None if shift is None else (1, 1, 1, 60)
    case = Case("scale", 60, batch=1, head_dim=16, scale=scale, dtype=dtype, mask=is_(Window(0, 0)), bias=bias)
    problem = make_inputs(case)
    inputs = problem.inputs._replace(value=problem.inputs.value * 1000)
    if shift is not None:
        inputs = inputs._replace(bias=torch.full((1, 1, 1, 60), shift))
    problem = dataclasses.replace(problem, inputs=inputs, d_lse=torch.zeros_like(problem.d_lse))
    check_close(problem, run(problem, "cpu"))


def test_a_backward_that_is_given_out_and_lse_alone_takes_them_at_their_word(isa):
    """As of a part of the keys, whose weights add up to less than 1: lse and out are those of the whole."""
    query, key, value = (each.detach() for each in tensors(60, size=1.0))
    out, lse = attention(query, key, value, return_lse=True, backend="cpu")
    d_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    whole = backward_of(query, key, value, out, lse, d_out)
    parts = [backward_of(query, key[:, :, at], value[:, :, at], out, lse, d_out) for at in (slice(20), slice(20, 60))]
    torch.testing.assert_close(parts[0][0] + parts[1][0], whole[0])
    for n in (1, 2):
        torch.testing.assert_close(torch.cat([parts[0][n], parts[1][n]], 2), whole[n])


def backward_of(query, key, value, out, lse, d_out):
    inputs = AttnInputs(query, key, value)
    spec = AttnSpec.of(inputs)
    return ops.BACKWARD(d_out, None, out, lse, None, None, *inputs, *spec.flat(), "cpu")[:3]
