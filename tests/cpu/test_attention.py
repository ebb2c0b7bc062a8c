"""The CPU backend against float64 on every instruction set: forward and every gradient, on poisoned memory, the same
bits twice and for any number of threads.
"""

import dataclasses

import pytest
import torch
from hypothesis import HealthCheck, given, settings

from fastattn import BackendUnavailable, attention, dispatch, explain
from fastattn.masks import Causal, Lengths, Segments, Window
from fastattn.masks.base import Mask
from fastattn.testing import CASES, Case, check_close, make_inputs, poison, run
from fastattn.testing.nan_padding import FEATURES, PADDED, hidden_pair, with_junk
from fastattn.testing.strategies import cases

pytestmark = pytest.mark.usefixtures("library")

LONG = (
    Case("long-causal", 300, 700, 1, mask=lambda *_: Causal(), head_dim=64, dtype=torch.float32),
    Case("long-window", 515, batch=1, mask=lambda *_: Window(70, 3), head_dim=64, num_heads=4, num_kv_heads=2),
    Case("long-segments", 333, batch=1, mask=lambda *_: Segments(torch.arange(333)[None] % 5), dtype=torch.float16),
    Case("long-bias", 200, 260, 1, bias=(200, 260), head_dim=40, dropout_p=0.2, sinks=True, softcap=9.0),
    Case("wide", 70, 90, 1, head_dim=200, head_dim_v=136),
    Case("wide-float32", 20, 90, 1, head_dim=260, head_dim_v=300, dtype=torch.float32),
    Case(
        "decode", 1, 700, 2, num_heads=8, num_kv_heads=2, head_dim=128, mask=lambda *_: Lengths(torch.tensor([700, 9]))
    ),
)
"""Problems of several tiles a side, of wide heads, and of one query."""

EVERY = CASES | {case.id: case for case in LONG}


def same(left, right):
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


@pytest.mark.parametrize("case", EVERY.values(), ids=EVERY)
def test_every_row_is_within_the_tolerance_and_repeats_bit_for_bit(case, isa, threads):
    problem = make_inputs(case)
    results = run(problem, "cpu")
    check_close(problem, results)
    same(results, run(problem, "cpu"))
    for count in (2, 3):
        threads(count)
        same(results, run(problem, "cpu"))


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=cases(150, max_dim=72))
def test_drawn_problems_are_within_the_tolerance(case, isa):
    """Any mask, unions, any feature, any layout."""
    problem = make_inputs(case)
    check_close(problem, run(problem, "cpu"))


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=cases(8, max_dim=20))
def test_drawn_problems_of_few_tokens_are_within_the_tolerance(case, isa):
    """Lengths of 0 and 1 are among them."""
    problem = make_inputs(case)
    check_close(problem, run(problem, "cpu"))


@pytest.mark.parametrize("q_len, kv_len", [(20, 50), (8, 50), (150, 170)], ids=["", "few-queries", "many"])
@pytest.mark.parametrize("mask", PADDED)
def test_what_nobody_sees_may_hold_anything(mask, q_len, kv_len, isa):
    """Keys, values, queries and gradients that no partner sees, in tiles that are visited and tiles that are not."""
    clean, dirty = hidden_pair(mask, q_len, kv_len, "cpu")
    want = run(clean, "cpu")
    same(want, run(dirty, "cpu"))
    check_close(clean, want)


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("mask", ["lengths", "segments-scattered", "causal-unseen-keys"])
def test_what_nobody_sees_may_hold_anything_with_features(mask, feature, isa):
    clean, dirty = hidden_pair(mask, 20, 50, "cpu", **FEATURES[feature])
    want = run(clean, "cpu")
    same(want, run(dirty, "cpu"))
    check_close(clean, want)


@pytest.mark.parametrize("shape", [(40,), (33, 1), (33, 40), (4, 1, 40)], ids=str)
def test_what_a_bias_hides_from_all_may_hold_anything(shape, isa):
    bias = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    if shape[-1] > 1:
        bias[..., 3:30] = -torch.inf
    if shape[-2:-1] > (1,):
        bias[..., 5:9, :] = -torch.inf
    clean = make_inputs(Case("bias", 33, 40, 1, num_heads=4, num_kv_heads=2, bias=shape))
    clean = dataclasses.replace(clean, inputs=clean.inputs._replace(bias=bias), mask=None)
    seen = (bias > -torch.inf).expand(1, 4, 33, 40)
    want = run(clean, "cpu")
    same(want, run(with_junk(clean, seen), "cpu"))
    check_close(clean, want)


def test_a_backward_without_a_gradient_of_lse(isa):
    problem = make_inputs(CASES["causal"])
    leaves = problem.inputs.detached()
    out = attention(*leaves[:3], mask=Causal(), backend="cpu")
    got = torch.autograd.grad(out, leaves.differentiable, problem.d_out)
    zero = dataclasses.replace(problem, d_lse=torch.zeros_like(problem.d_lse))
    check_close(zero, dict(zip(("dq", "dk", "dv"), got, strict=True)))


def test_gradients_of_any_strides(isa):
    problem = make_inputs(CASES["blhd"])
    leaves = problem.inputs.detached()
    out = attention(*leaves[:3], backend="cpu")
    strange = problem.d_out.transpose(-1, -2).contiguous().transpose(-1, -2)
    want = torch.autograd.grad(out, leaves.differentiable, problem.d_out, retain_graph=True)
    got = torch.autograd.grad(out, leaves.differentiable, strange)
    repeated = torch.autograd.grad(
        attention(*leaves[:3], backend="cpu"), leaves.differentiable, torch.ones(()).bfloat16().expand_as(out)
    )
    ones = torch.autograd.grad(attention(*leaves[:3], backend="cpu"), leaves.differentiable, torch.ones_like(out))
    assert all(torch.equal(left, right) for left, right in zip(want + ones, got + repeated, strict=True))
    assert out.stride() == problem.inputs.query.stride()


STRIDES = {
    "heads-last": lambda each: each.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2),
    "length-last": lambda each: each.transpose(2, 3).contiguous().transpose(2, 3),
    "every-third": lambda each: each.repeat_interleave(3, -1)[..., ::3],
    "gaps": lambda each: torch.nn.functional.pad(each, (1, 2, 3, 4))[:, :, 3:-4, 1:-2],
    "one-row-repeated": lambda each: each[:, :, :1].expand(each.shape),
    "one-column-repeated": lambda each: each[..., :1].expand(each.shape),
}


@pytest.mark.parametrize("layout", STRIDES)
def test_any_strides_give_the_numbers_of_plain_ones(layout, isa):
    problem = make_inputs(CASES["window-lengths-gqa"])
    query, key, value = (STRIDES[layout](each) for each in problem.inputs[:3])
    strange = problem.inputs._replace(query=query, key=key, value=value)
    plain = strange._replace(query=query.contiguous(), key=key.contiguous(), value=value.contiguous())
    same(*(run(dataclasses.replace(problem, inputs=inputs), "cpu") for inputs in (plain, strange)))


def test_no_query_heads_leave_no_gradient():
    query, key = torch.randn(2, 0, 5, 16, requires_grad=True), torch.randn(2, 2, 37, 16, requires_grad=True)
    with poison():
        attention(query, key, key, backend="cpu").sum().backward()
    assert (key.grad == 0).all()


def test_negated_views_are_read_as_what_they_stand_for():
    shape = (1, 2, 5, 16)
    query, above = (torch.randn(shape, dtype=torch.complex64).conj().imag for _ in range(2))
    assert query.is_neg()
    results = []
    for left, right in ((query, above), (query.resolve_neg(), above.resolve_neg())):
        leaf = left.detach().requires_grad_()
        out, lse = attention(leaf, leaf, leaf, backend="cpu", return_lse=True)
        results.append((out, lse, *torch.autograd.grad((out, lse), leaf, (right, right[..., 0]))))
    for got, want in zip(*results, strict=True):
        assert torch.equal(got, want)


def test_sinks_of_any_dtype_and_stride():
    problem = make_inputs(CASES["sinks"])
    wide = problem.inputs.sinks.double().repeat_interleave(2)[::2].requires_grad_()
    out = attention(*problem.inputs[:3], sinks=wide, mask=problem.mask, backend="cpu")
    grad = torch.autograd.grad(out, wide, problem.d_out)[0]
    plain = problem.inputs.sinks.clone().requires_grad_()
    want = attention(*problem.inputs[:3], sinks=plain, mask=problem.mask, backend="cpu")
    assert torch.equal(out, want)
    assert grad.dtype == torch.float64
    assert torch.equal(grad.float(), torch.autograd.grad(want, plain, problem.d_out)[0])


def test_calls_from_several_threads_at_once():
    """Each has its own scratch."""
    from concurrent.futures import ThreadPoolExecutor

    problems = [make_inputs(EVERY[name]) for name in ("long-causal", "long-window", "everything", "decode")]
    want = [run(problem, "cpu", grads=False)["out"] for problem in problems]

    def call(n):
        problem = problems[n % 4]
        return attention(**problem.inputs._asdict(), mask=problem.mask, backend="cpu", **problem.numbers)

    with ThreadPoolExecutor(4) as pool:
        for n, out in enumerate(pool.map(call, range(32))):
            assert torch.equal(out, want[n % 4])


class Scattered(Mask):
    """A user's mask that is no interval."""

    def dense(self, q_len, kv_len, *, device=None):
        return (torch.arange(q_len)[:, None] + torch.arange(kv_len))[None, None] % 2 == 0

    tensors = ()


def test_what_it_cannot_do_it_says():
    query = torch.randn(1, 2, 8, 16)
    for tensors, mask, says in (
        (query.double(), None, "dtype torch.float64 has no kernel"),
        (query, Scattered(), "mask Scattered has neither an interval nor a rule"),
        (query[:1, :1, :1].expand(1, 1, 2**31, 16), None, "length 2147483648 is above"),
    ):
        with pytest.raises(BackendUnavailable, match=says):
            attention(tensors, tensors, tensors, mask=mask, backend="cpu")
    with pytest.raises(BackendUnavailable, match="the tensors are on meta"):
        explain(*[query.to("meta")] * 3, backend="cpu")
    many = Window(1, 1)
    for _ in range(32):
        many = many | Segments(torch.zeros(1, 8, dtype=torch.long))
    with pytest.raises(BackendUnavailable, match="made of 33 masks, at most 32"):
        attention(query, query, query, mask=many, backend="cpu")


def test_it_is_what_runs_on_the_cpu(library, monkeypatch):
    monkeypatch.delenv("FASTATTN_BACKEND", raising=False)
    query = torch.randn(1, 2, 8, 16, requires_grad=True)
    verdict = explain(query, query, query)
    assert verdict.backend == "cpu"
    assert (verdict.backward, verdict.backward_reasons["cpu"]) == ("cpu", None)
    assert verdict.kernel == f"attention forward ({library.isa()}), attention backward ({library.isa()})"
    assert "dtype torch.float64" in explain(*[query.double()] * 3).reasons["cpu"]
    called = []
    backend = dispatch.load("cpu")
    for name in ("forward_with_low", "backward"):
        real = getattr(backend, name)
        monkeypatch.setattr(
            backend, name, lambda *args, real=real, name=name, **more: called.append(name) or real(*args, **more)
        )
    attention(query, query, query).sum().backward()
    assert called == ["forward_with_low", "backward"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("learned", [False, True], ids=["constant", "learned"])
def test_a_bias_that_takes_no_gradient_gets_none(library, monkeypatch, learned, dtype):
    query = torch.randn(1, 2, 8, 16, dtype=dtype, requires_grad=True)
    bias = torch.randn(1, 2, 8, 8, dtype=dtype, requires_grad=learned)
    backend, seen = dispatch.load("cpu"), []
    real = backend.backward
    monkeypatch.setattr(backend, "backward", lambda *args, **more: seen.append(real(*args, **more)) or seen[0])
    attention(query, query, query, bias=bias).sum().backward()
    assert (seen[0][3] is None) == (not learned)
    if learned:
        assert seen[0][3].dtype == bias.grad.dtype == dtype and bias.grad.abs().sum() > 0


def test_an_instruction_set_that_there_is_not(library, monkeypatch):
    query = torch.randn(1, 2, 8, 16)
    monkeypatch.setenv("FASTATTN_CPU_ISA", "mmx")
    with pytest.raises(ValueError, match="FASTATTN_CPU_ISA: one of generic, avx2, avx512, amx is needed, got 'mmx'"):
        explain(query, query, query)
    lacking = {"generic", "avx2", "avx512", "amx"} - set(library.isas())
    if lacking:
        monkeypatch.setenv("FASTATTN_CPU_ISA", lacking.pop())
        assert "the library and this machine share generic" in explain(query, query, query).reasons["cpu"]
        with pytest.raises(RuntimeError, match="FASTATTN_CPU_ISA"):
            attention(query, query, query, backend="cpu")
