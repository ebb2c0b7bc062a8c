"""The Triton backend against float64: forward and every gradient, on poisoned memory, the same bits twice."""

import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from hypothesis import given, settings

from fastattn import BackendUnavailable, attention, dispatch, explain
from fastattn.masks import Causal
from fastattn.masks.base import Mask
from fastattn.testing import CASES, Case, check_close, make_inputs, poison, run
from fastattn.testing.nan_padding import FEATURES, PADDED, hidden_pair, with_junk
from fastattn.testing.strategies import cases

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ADAPTER = dispatch.load("triton")


def test_the_backend_is_there():
    """It refuses no row: if this fails, the rest of this file ran nothing."""
    assert {name: ADAPTER.why_not(make_inputs(case, DEVICE).spec) for name, case in CASES.items()} == dict.fromkeys(
        CASES
    )


TWICE = ("gqa", "table", "packed-causal", "segments-scattered", "bias", "everything")
"""In the interpreter, where one program follows the other and only memory never written could tell two runs apart."""


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_every_row_is_within_the_tolerance_and_repeats_bit_for_bit(case):
    problem = make_inputs(case, DEVICE)
    results = run(problem, "triton")
    check_close(problem, results)
    if DEVICE == "cuda" or case.id in TWICE:
        again = run(problem, "triton")
        assert all(torch.equal(results[name], again[name]) for name in results)


@settings(max_examples=15)
@given(case=cases(70, max_dim=40))
def test_drawn_problems_are_within_the_tolerance(case):
    """Any mask, unions, any feature, any layout."""
    problem = make_inputs(case, DEVICE)
    check_close(problem, run(problem, "triton"))


@settings(max_examples=10)
@given(case=cases(8, max_dim=20))
def test_drawn_problems_of_few_tokens_are_within_the_tolerance(case):
    """Lengths of 0 and 1 are among them."""
    problem = make_inputs(case, DEVICE)
    check_close(problem, run(problem, "triton"))


@pytest.mark.parametrize("q_len", [20, 8], ids=["", "few-queries"])
@pytest.mark.parametrize("mask", PADDED)
def test_what_nobody_sees_may_hold_anything(mask, q_len):
    """Keys, values, queries and gradients that no partner sees, in tiles that are visited and tiles that are not."""
    clean, dirty = hidden_pair(mask, q_len, 50, DEVICE)
    grads = q_len > 8
    want, got = run(clean, "triton", grads=grads), run(dirty, "triton", grads=grads)
    for name in want:
        assert torch.equal(want[name], got[name]), name
    check_close(clean, want)


@pytest.mark.parametrize("feature", FEATURES)
def test_what_nobody_sees_may_hold_anything_with_features(feature):
    clean, dirty = hidden_pair("lengths", 20, 50, DEVICE, **FEATURES[feature])
    want, got = run(clean, "triton"), run(dirty, "triton")
    for name in want:
        assert torch.equal(want[name], got[name]), name
    check_close(clean, want)


@pytest.mark.parametrize("shape", [(40,), (33, 1), (33, 40), (4, 1, 40)], ids=str)
def test_what_a_bias_hides_from_all_may_hold_anything(shape):
    bias = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    if shape[-1] > 1:
        bias[..., 3:30] = -torch.inf
    if shape[-2:-1] > (1,):
        bias[..., 5:9, :] = -torch.inf
    clean = make_inputs(Case("bias", 33, 40, 1, num_heads=4, num_kv_heads=2, bias=shape), DEVICE)
    clean = clean.__class__(clean.case, clean.inputs._replace(bias=bias.to(DEVICE)), None, clean.d_out, clean.d_lse)
    seen = (clean.inputs.bias > -torch.inf).expand(1, 4, 33, 40)
    want, got = run(clean, "triton"), run(with_junk(clean, seen), "triton")
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


class Scattered(Mask):
    """A user's mask that is no interval."""

    def dense(self, q_len, kv_len, *, device=None):
        return (torch.arange(q_len)[:, None] + torch.arange(kv_len)).to(device or DEVICE)[None, None] % 2 == 0

    tensors = ()


def test_what_it_cannot_do_it_says():
    """Dtypes, devices, widths, lengths, and masks of a user's own that have no interval."""
    query = torch.randn(1, 2, 8, 16, device=DEVICE)
    for tensors, says in (
        (query.double(), "dtype torch.float64 has no kernel"),
        (torch.randn(1, 1, 4, 513, device=DEVICE), "head_dim 513 is above 512"),
        (query[:1, :1, :1].expand(1, 1, 2**29, 16), "length 536870912 is above 268435456"),
    ):
        with pytest.raises(BackendUnavailable, match=says):
            attention(tensors, tensors, tensors, backend="triton")
    with pytest.raises(BackendUnavailable, match="mask Scattered has neither a Triton rule nor an interval"):
        attention(query, query, query, mask=Scattered(), backend="triton")
    meta = query.to("meta")
    with pytest.raises(BackendUnavailable, match="the tensors are on meta"):
        explain(meta, meta, meta, backend="triton")


@pytest.mark.skipif(DEVICE == "cuda", reason="the interpreter is for machines without a GPU")
def test_the_interpreter_runs_only_when_asked():
    query = torch.randn(1, 2, 8, 16)
    verdict = explain(query, query, query)
    assert verdict.backend in ("cpu", "reference")
    assert "runs only with backend='triton'" in verdict.reasons["triton"]
    assert explain(query, query, query, backend="triton").kernel == "attn_fwd"


SETTINGS = {
    "cuda": "torch.backends.cuda.matmul.fp32_precision = 'tf32'",
    "mkldnn": "torch.backends.mkldnn.matmul.fp32_precision = 'bf16'",
}


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
def test_half_precision_does_not_ask_how_float32_is_multiplied(setting):
    """Where that was set for one backend, torch raises when it is asked for that of all. In a process of its own, as
    torch has no way back.
    """
    if not hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        pytest.skip("this torch has one setting for all backends")
    call = (
        f"import torch; {setting}\n"
        "from fastattn import attention\n"
        f"given = torch.randn(3, 1, 1, 4, 16, dtype=torch.bfloat16, device={DEVICE!r})\n"
        "attention(*given.unbind(), backend='triton')"
    )
    done = subprocess.run([sys.executable, "-c", call], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
