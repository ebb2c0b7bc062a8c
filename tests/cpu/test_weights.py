"""attention_weights by the CPU backend, against the definition."""

import dataclasses

import pytest
import torch

from fastattn import attention, attention_weights, dispatch
from fastattn.testing import CASES, make_inputs, poison
from fastattn.testing.nan_padding import PADDED, hidden_pair

pytestmark = pytest.mark.usefixtures("library")

NAMES = [name for name, case in CASES.items() if not case.dropout_p and case.batch]


@pytest.fixture
def by_the_backend(monkeypatch):
    """How often the backend was asked."""
    called = []
    backend = dispatch.load("cpu")
    real = backend.weights
    monkeypatch.setattr(backend, "weights", lambda *args, **named: called.append(1) or real(*args, **named))
    monkeypatch.delenv("FASTATTN_BACKEND", raising=False)
    return called


def arguments(problem):
    query, key, _, bias, sinks, _ = problem.inputs
    numbers = {name: problem.numbers[name] for name in ("scale", "softcap")}
    return (query, key), {"bias": bias, "sinks": sinks, "mask": problem.mask, **numbers}


def close(got, want, dtype):
    """Scores are float32 sums of products of the inputs, in another order."""
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4 if dtype == torch.float32 else 1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_the_definitions_weights(name, isa, by_the_backend):
    problem = make_inputs(CASES[name])
    tensors, named = arguments(problem)
    wide = [each.float().clone().requires_grad_() for each in tensors]  # so that the plain formulation computes it
    bias = named["bias"] if named["bias"] is None else named["bias"].float()
    want = attention_weights(*wide, **named | {"bias": bias}).detach()
    assert by_the_backend == []
    lse = attention(*tensors, problem.inputs.value, **named, return_lse=True, backend="cpu")[1]
    with poison():
        for given in (None, lse):
            close(attention_weights(*tensors, lse=given, **named), want, problem.case.dtype)
            close(attention_weights(*tensors, lse=given, heads="mean", **named), want.mean(1), problem.case.dtype)
        if problem.case.q_len:
            rows = [0, -1, problem.case.q_len // 2]
            close(attention_weights(*tensors, rows=rows, **named), want[:, :, rows], problem.case.dtype)
            close(
                attention_weights(*tensors, rows=rows, heads="mean", **named),
                want[:, :, rows].mean(1),
                problem.case.dtype,
            )
    assert by_the_backend


@pytest.mark.parametrize("mask", PADDED)
def test_what_nobody_sees_may_hold_anything(mask, isa):
    weights = []
    for problem in hidden_pair(mask, 20, 50, "cpu"):
        tensors, named = arguments(problem)
        weights.append(attention_weights(*tensors, **named))
    assert torch.equal(*weights)
    assert weights[0].isfinite().all()


def test_the_same_bits_for_any_number_of_threads(threads):
    problem = make_inputs(dataclasses.replace(CASES["everything"], dropout_p=0.0, q_len=300, bias=(1, 4, 1, 56)))
    tensors, named = arguments(problem)
    found = []
    for count in (1, 2, 3):
        threads(count)
        found.append([attention_weights(*tensors, heads=heads, **named) for heads in ("all", "mean")])
    for other in found[1:]:
        assert all(torch.equal(left, right) for left, right in zip(found[0], other, strict=True))


def test_derivatives_and_transforms_use_the_plain_formulation(by_the_backend):
    query = torch.randn(1, 2, 5, 8, requires_grad=True)
    attention_weights(query, query).square().sum().backward()
    assert query.grad.abs().sum() > 0
    plain = query.detach()
    torch.vmap(lambda each: attention_weights(each, each))(plain[None])
    lse = torch.zeros(1, 2, 5, requires_grad=True)
    assert attention_weights(plain, plain, lse=lse).requires_grad
    assert by_the_backend == []
    attention_weights(plain, plain)
    with torch.no_grad():
        attention_weights(query, query, lse=lse)
    assert len(by_the_backend) == 2


def test_dtypes_without_a_kernel_use_the_plain_formulation(by_the_backend):
    query = torch.randn(1, 2, 5, 8, dtype=torch.float64)
    for heads in ("all", "mean"):
        assert attention_weights(query, query, heads=heads).dtype == torch.float64
    assert by_the_backend == []


@pytest.mark.parametrize("heads", ["all", "mean"])
def test_no_rows_give_no_weights(heads, by_the_backend):
    query, key = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 7, 8)
    weights = attention_weights(query, key, rows=[], heads=heads)
    assert weights.shape == ((2, 4, 0, 7) if heads == "all" else (2, 0, 7)) and by_the_backend
