"""Every operation: right results pass, wrong ones do not, however large; what is coarse, random or only read."""

import dataclasses

import pytest
import torch

from fastattn.bench.cases.module import workload_of
from fastattn.bench.cases.operations import OPS, BenchCase, bench_cases
from fastattn.bench.cases.workload import Workload, slices
from fastattn.bench.measure.providers.sdpa import Sdpa
from fastattn.bench.measure.providers.table import known_providers, provider

SMALL = {"q_len": [40], "num_heads": [4], "head_dim": [16]}
IN_PARTS = [name for name, op in OPS.items() if op.form in ("4-D", "3-D mask") and not op.dropout_p]


def small(op, **more):
    [case] = bench_cases("cpu", ops=[op], **{**SMALL, **more})
    return case


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("op", OPS)
def test_an_operation_is_right_in_each_of_its_modes(op, dtype, cpu, timed):
    peer = "mha" if OPS[op].form == "module" else "sdpa"
    for mode in OPS[op].modes:
        ours, other = timed(small(op, dtypes=[dtype]), mode, ["fastattn", peer])
        assert ours.correct and ours.timed, ours.reason
        assert other.timed and (other.correct or other.coarse), other.reason
        assert other.baseline == peer and ours.speedup > 0 and ours.useful_flops <= ours.dense_flops
        names = {"fwd": {"out"}, "bwd": {"dq", "dk", "dv"} | ({"dbias"} if op == "biased" else set())}[mode]
        assert {each["name"] for each in ours.errors} == (names | {"weights"} if op == "module" else names)


@pytest.mark.parametrize("op", OPS)
def test_a_wrong_result_of_an_operation_is_found(op, cpu):
    workload = workload_of(small(op), cpu)
    for mode in OPS[op].modes:
        made = provider("fastattn").make(workload, mode)
        for name in workload.results(mode, made):
            results = workload.results(mode, made)
            results[name] = results[name].clone()
            results[name].view(-1)[-1] += 0.05
            assert not workload.check(results).ok, name


@pytest.mark.parametrize("op", IN_PARTS)
def test_where_a_head_is_too_large_some_of_its_queries_are_checked(op, cpu, monkeypatch):
    case = small(op, q_len=[64])
    monkeypatch.setattr("fastattn.bench.cases.workload.SLICE_PAIRS", {"cpu": 1024})
    workload = Workload(case, cpu)
    plan = slices(case, "cpu", forward_alone=True)
    if case.q_len > 1:
        assert 1 <= plan.queries < case.q_len and slices(case, "cpu", forward_alone=False).queries == case.q_len
    results = workload.results("fwd", provider("fastattn").make(workload, "fwd"))
    assert workload.check(results).ok
    results["out"][..., -1, :] += 0.1
    assert not workload.check(results).ok


def test_random_bits_are_checked_whole_and_pytorchs_without_them(cpu, monkeypatch, timed):
    monkeypatch.setattr("fastattn.bench.cases.workload.SLICE_PAIRS", {"cpu": 1})
    case = small("dropout")
    assert slices(case, "cpu", True) is None
    ours, other = timed(case, "fwd", ["fastattn", "sdpa"])
    assert ours.correct and other.correct
    workload = Workload(case, cpu)
    made = provider("sdpa").make(workload, "fwd")
    first, second = (workload.results("fwd", made)["out"] for _ in range(2))
    assert not torch.equal(first, second) and made.checked_as[0] == "self"


def test_what_pytorchs_fused_kernel_does_not_take_is_called_as_people_call_it(cpu):
    flat = workload_of(small("unbatched"), cpu)
    query = flat._leaves(provider("sdpa").make(flat, "fwd").layout)[0][0]
    assert query.shape == (4, 40, 16)
    two = workload_of(small("unbatched", batch=[2]), cpu)
    assert provider("sdpa").why_not(two, "fwd") == "3-D tensors have no batch, and 2 were asked for"
    biased = workload_of(small("biased"), cpu)
    assert biased.bias.shape == (1, 4, 40, 40) and biased.bias.requires_grad
    wide = small("wide-values")
    assert (wide.value_dim, wide.sizes) == (32, "B1-H4-N40-D16-V32")
    assert small("wide-values", head_dim_v=[8]).value_dim == 8 and small("self", head_dim_v=[8]).value_dim == 8


@pytest.mark.parametrize(
    "op, name, reason",
    [
        ("module", "sdpa", "no module call"),
        ("self", "mha", "no 4-D call"),
        ("dropout", "flex", "no dropout"),
        ("biased", "flex", "no learned bias"),
        ("unbatched", "fastattn-cpu", "no 3-D call"),
        ("self", "read", "bounds one query alone"),
    ],
)
def test_who_cannot_do_an_operation_says_so(op, name, reason, cpu, monkeypatch, timed):
    monkeypatch.setattr("fastattn.bench.measure.providers.flex.cxx", lambda: "/usr/bin/c++")
    [row] = timed(small(op), "fwd", [name])
    assert row.reason == reason and not row.crashed


@pytest.mark.parametrize("name", ["kv_len", "num_kv_heads", "head_dim_v"])
def test_a_module_refuses_sizes_that_it_would_not_use(name, cpu, timed):
    for row in timed(small("module", **{name: [2]}), "fwd", ["fastattn", "mha"]):
        assert row.reason == "a module looks at itself: one length, one head dim, no shared key heads"


@pytest.mark.parametrize("kv_len", [1, 9, 40, 100])
def test_documents_are_packed_whatever_the_lengths(kv_len, cpu, timed):
    [row] = timed(small("documents", kv_len=[kv_len]), "fwd", ["fastattn"])
    assert row.correct, row.reason
    case = small("documents", q_len=[160])
    ids = OPS["documents"].mask(case, "cpu").left.q_ids[0]
    sizes = ids.unique(return_counts=True)[1].tolist()
    assert sizes[:4] == [10, 15, 22, 34] and sum(sizes) == 160


def test_evaluation_has_no_backward(cpu, timed):
    assert {row.reason for row in timed(small("module"), "bwd", ["fastattn", "mha"])} == {"evaluation has no backward"}


def test_the_read_loop_reads_keys_and_values_and_is_not_checked(cpu, timed):
    case = small("decode", q_len=[1], kv_len=[256])
    [row] = timed(case, "fwd", ["read"])
    assert row.timed and row.correct is None
    workload = Workload(case, cpu)
    total = sum(each.detach().contiguous().view(torch.int64).sum() for each in workload.qkv[1:])
    assert provider("read").make(workload, "fwd").forward(*workload.tensors("fwd")) == total


@pytest.mark.parametrize("times, coarse", [(4.0, True), (20.0, False)])
@pytest.mark.parametrize("name", ["sdpa", "fastattn"])
def test_another_librarys_result_near_the_bounds_is_timed_and_called_coarse(
    name, times, coarse, cpu, monkeypatch, timed
):
    honest = Workload.check

    def check(self, results):
        verdict = honest(self, results)
        worse = [dataclasses.replace(row, max_error=times * row.max_bound) for row in verdict.agreements]
        return dataclasses.replace(verdict, agreements=worse)

    monkeypatch.setattr(Workload, "check", check)
    [row] = timed(small("self"), "fwd", [name])
    expected = coarse and name == "sdpa"
    assert row.correct is False and (row.coarse, row.timed, row.reason is None) == (expected,) * 3
    assert row.failed is (name == "fastattn")


def test_sizes_of_what_is_not_fused_are_estimated(cpu):
    case = BenchCase("biased", "fp32", 1, 2, 2, 256, 256, 64)
    assert Sdpa().extra_bytes(case, "fwd", cpu) > Sdpa().extra_bytes(dataclasses.replace(case, op="self"), "fwd", cpu)
    assert {"mha", "read"} <= set(known_providers())
