"""The Triton room against float64: forward and every gradient, on poisoned memory, twice the same bits."""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from hypothesis import given, settings

from fastattn import BackendUnavailable, attention, dispatch, explain
from fastattn.fuzz import CLOSED_FORMS, cases
from fastattn.masks import Causal, Chunked, Lengths, Window
from fastattn.testing import CASES, Case, check_close, make_inputs, poison, run

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROOM = dispatch.room("triton")
RUNS = {name: case for name, case in CASES.items() if ROOM.why_not(make_inputs(case, DEVICE).spec) is None}


def test_the_room_is_there():
    """If this fails, the rest of this file ran nothing."""
    assert len(RUNS) >= 35, ROOM.why_not(make_inputs(CASES["full"], DEVICE).spec)


@pytest.mark.parametrize("case", RUNS.values(), ids=RUNS)
def test_every_row_is_within_the_yardstick_and_repeats_bit_for_bit(case):
    problem = make_inputs(case, DEVICE)
    results = run(problem, "triton")
    check_close(problem, results)
    again = run(problem, "triton")
    assert all(torch.equal(results[name], again[name]) for name in results)


@settings(max_examples=12)
@given(case=cases(70, masks=CLOSED_FORMS, unions=False, features=False, max_dim=40))
def test_drawn_problems_are_within_the_yardstick(case):
    problem = make_inputs(case, DEVICE)
    check_close(problem, run(problem, "triton"))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_nobody_sees_may_hold_anything(value):
    """Keys, values, queries and gradients that no partner sees, in tiles that are visited and tiles that are not."""
    mask = Window(9, 0, offset=25) & Lengths(
        torch.tensor([90, 60], device=DEVICE), q_lengths=torch.tensor([50, 33], device=DEVICE)
    )
    clean = make_inputs(Case("hidden", 50, 100, num_heads=4, num_kv_heads=2, mask=lambda case, device: mask), DEVICE)
    table = mask.dense(50, 100, device=DEVICE)
    row, column = table.any(-1)[..., None], table.any(-2)[..., None]
    query, key, val = (
        torch.where(seen, each, value) for seen, each in zip((row, column, column), clean.inputs[:3], strict=True)
    )
    dirty = clean.__class__(
        clean.case, clean.inputs._replace(query=query, key=key, value=val), mask,
        torch.where(row, clean.d_out, value), torch.where(row[..., 0], clean.d_lse, value),
    )  # fmt: skip
    want, got = run(clean, "triton"), run(dirty, "triton")
    for name in want:
        assert torch.equal(want[name], got[name]), name
    check_close(clean, want)


def test_a_backward_without_a_gradient_of_lse():
    problem = make_inputs(CASES["causal"], DEVICE)
    leaves = problem.inputs.detached()
    out = attention(*leaves[:3], mask=Causal(), backend="triton")
    got = torch.autograd.grad(out, leaves.differentiable, problem.d_out)
    zero = problem.__class__(problem.case, problem.inputs, problem.mask, problem.d_out, torch.zeros_like(problem.d_lse))
    results = dict(zip(("dq", "dk", "dv"), got, strict=True))
    check_close(zero, results)


def test_gradients_of_any_strides():
    problem = make_inputs(CASES["blhd"], DEVICE)
    leaves = problem.inputs.detached()
    out = attention(*leaves[:3], backend="triton")
    strange = problem.d_out.transpose(-1, -2).contiguous().transpose(-1, -2)
    want = torch.autograd.grad(out, leaves.differentiable, problem.d_out, retain_graph=True)
    got = torch.autograd.grad(out, leaves.differentiable, strange)
    assert all(torch.equal(left, right) for left, right in zip(want, got, strict=True))
    assert out.stride() == problem.inputs.query.stride()


def test_no_query_heads_leave_no_gradient():
    query, key = torch.randn(2, 0, 5, 16, device=DEVICE), torch.randn(2, 2, 37, 16, device=DEVICE)
    query, key = query.requires_grad_(), key.requires_grad_()
    with poison():
        attention(query, key, key, backend="triton").sum().backward()
    assert (key.grad == 0).all()


def test_negated_views_are_read_as_what_they_stand_for():
    shape = (1, 2, 5, 16)
    query, above = (torch.randn(shape, dtype=torch.complex64, device=DEVICE).conj().imag for _ in range(2))
    assert query.is_neg()
    results = []
    for left, right in ((query, above), (query.resolve_neg(), above.resolve_neg())):
        leaf = left.detach().requires_grad_()
        out, lse = attention(leaf, leaf, leaf, backend="triton", return_lse=True)
        results.append((out, lse, *torch.autograd.grad((out, lse), leaf, (right, right[..., 0]))))
    for got, want in zip(*results, strict=True):
        assert torch.equal(got, want)


def test_gradients_for_many_directions_at_once():
    query = torch.randn(1, 2, 5, 16, device=DEVICE, requires_grad=True)
    out, lse = attention(query, query, query, mask=Causal(), backend="triton", return_lse=True)
    for result in (out, lse):
        above = torch.randn(2, *result.shape, device=DEVICE)
        grad = lambda each, r=result: torch.autograd.grad(r, query, each, retain_graph=True)[0]
        want = torch.stack([grad(each) for each in above])
        together = torch.autograd.grad(result, query, above, is_grads_batched=True, retain_graph=True)[0]
        for got in (torch.vmap(grad)(above), together):
            torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"mask": Chunked(4)}, "no Triton rule for mask Chunked; there are rules for Full, Causal, Window, Lengths"),
        ({"mask": Causal() | Window(1, 0)}, "no Triton rule for mask Or"),
        ({"bias": torch.zeros(8, 8, device=DEVICE)}, "no Triton kernel for bias yet"),
        ({"sinks": torch.zeros(2, device=DEVICE)}, "no Triton kernel for sinks yet"),
        ({"softcap": 3.0}, "no Triton kernel for softcap yet"),
        ({"dropout_p": 0.1}, "no Triton kernel for dropout yet"),
    ],
    ids=lambda value: str(value)[:24],
)
def test_what_it_cannot_do_it_says(arguments, says):
    query = torch.randn(1, 2, 8, 16, device=DEVICE)
    with pytest.raises(BackendUnavailable, match=says):
        attention(query, query, query, backend="triton", **arguments)
    assert explain(query, query, query, **arguments).backend == "reference"


def test_other_dtypes_devices_and_widths_are_refused():
    query = torch.randn(1, 2, 8, 16, device=DEVICE)
    for tensors, says in (
        (query.double(), "dtype torch.float64 has no kernel"),
        (torch.randn(1, 1, 4, 300, device=DEVICE), "head_dim 300 is above 256"),
        (query[:1, :1, :1].expand(1, 1, 2**30, 16), "length 1073741824 is above 536870912"),
    ):
        with pytest.raises(BackendUnavailable, match=says):
            attention(tensors, tensors, tensors, backend="triton")
    meta = query.to("meta")
    with pytest.raises(BackendUnavailable, match="the tensors are on meta"):
        explain(meta, meta, meta, backend="triton")


@pytest.mark.skipif(DEVICE == "cuda", reason="the interpreter is for machines without a GPU")
def test_the_interpreter_runs_only_when_asked():
    query = torch.randn(1, 2, 8, 16)
    verdict = explain(query, query, query)
    assert verdict.backend == "reference"
    assert "runs only with backend='triton'" in verdict.reasons["triton"]
    assert explain(query, query, query, backend="triton").kernel == "attn_fwd"


@pytest.mark.gpu
def test_more_heads_than_a_grid_axis_holds():
    query = torch.randn(70_000, 1, 3, 16, device="cuda", dtype=torch.float16, requires_grad=True)
    out = attention(query, query, query, backend="triton")
    want = torch.nn.functional.scaled_dot_product_attention(query, query, query)
    torch.testing.assert_close(out, want, atol=2e-3, rtol=2e-3)
    out.sum().backward()
    assert query.grad.isfinite().all()


@pytest.mark.gpu
def test_more_than_2_to_the_31_elements():
    query = torch.randn(1, 1, 64, 128, device="cuda", dtype=torch.bfloat16)
    key = torch.randn(1, 1, 2**24 + 2**18, 128, device="cuda", dtype=torch.bfloat16)
    out, lse = attention(query, key, key, mask=Window(3, 0), backend="triton", return_lse=True)
    tail = key[:, :, -200:]
    want, want_lse = attention(query, tail, tail, mask=Window(3, 0), backend="reference", return_lse=True)
    torch.testing.assert_close(out, want, atol=2e-2, rtol=2e-2)
    torch.testing.assert_close(lse, want_lse, atol=1e-3, rtol=1e-3)
