"""Ratios with their intervals, ties, growth with length, and the overhead of a call."""

import dataclasses
import json
import random

import pytest

from fastattn.bench.cases.operations import OPS, BenchCase, bench_cases
from fastattn.bench.cases.workload import tiny
from fastattn.bench.measure import ratios
from fastattn.bench.measure.overhead import overhead_us
from fastattn.bench.measure.providers.flex import Flex
from fastattn.bench.measure.providers.table import provider
from fastattn.bench.measure.ratios import Samples
from fastattn.bench.measure.rows import Row
from fastattn.bench.report.growth import growth
from fastattn.bench.report.writers import read_json

CASE = BenchCase("self", "fp32", 1, 1, 1, 8, 8, 8)


def noisy(seed, middle, count, noise=0.1):
    pick = random.Random(seed)
    return [middle * pick.lognormvariate(0, noise) for _ in range(count)]


def row(provider="fastattn", kv_len=8, milliseconds=1.0, **more):
    case = dataclasses.replace(CASE, q_len=kv_len, kv_len=kv_len)
    return Row(case, "fwd", provider, "cpu", samples_ms=[milliseconds] * 3, baseline="sdpa", **more)


@pytest.mark.parametrize("count, least", [(7, 0.85), (30, 0.9)])
@pytest.mark.parametrize("interval", [ratios.paired, ratios.unpaired])
def test_the_interval_holds_the_ratio_as_often_as_it_says(interval, count, least):
    held = 0
    for seed in range(150):
        found = interval(Samples(noisy(2 * seed, 3.0, count)), Samples(noisy(2 * seed + 1, 2.0, count)))
        held += found.low <= 1.5 <= found.high
    assert least <= held / 150 <= 1


def test_slow_rounds_of_both_do_not_widen_a_paired_interval():
    shared = noisy(0, 1.0, 20, noise=0.5)
    base, mine = Samples([1.5 * each for each in shared]), Samples(shared)
    low, high = ratios.paired(base, mine)
    assert low == pytest.approx(1.5) and high == pytest.approx(1.5)
    alone = ratios.unpaired(base, mine)
    assert alone.high / alone.low > 1.5


def test_samples_of_one_round_are_not_independent_of_each_other():
    pick = random.Random(0)
    rounds = [pick.lognormvariate(0, 0.3) for _ in range(8)]
    together = [Samples([scale * each for each in rounds for _ in range(5)], 5) for scale in (2.0, 1.0)]
    assert ratios.paired(*together) == pytest.approx((2.0, 2.0))
    apart = [Samples(each.ms) for each in together]
    by_round, by_sample = ratios.unpaired(*together), ratios.unpaired(*apart)
    assert by_round.high / by_round.low > 1.3 * by_sample.high / by_sample.low, "40 samples know no more than 8 rounds"


def test_a_quotient_of_ratios_has_an_interval_of_its_own():
    slow, quick = (Samples(noisy(seed, middle, 30, 0.02)) for seed, middle in ((0, 6.0), (1, 2.0)))
    again, half = (Samples(noisy(seed, middle, 30, 0.02)) for seed, middle in ((2, 6.0), (3, 4.0)))
    low, high = ratios.quotient((slow, quick), (again, half))
    assert low < 2.0 < high and high / low < 1.1


@pytest.mark.parametrize("factor, tie", [(1.0, True), (1.01, True), (1.5, False), (0.6, False)])
def test_a_tie_is_where_the_interval_spans_1(factor, tie):
    found = ratios.paired(Samples(noisy(1, factor, 15)), Samples(noisy(2, 1.0, 15)))
    assert found.tie is tie
    assert row(speedup=factor, speedup_low=found.low, speedup_high=found.high).tie is tie


def test_two_samples_say_nothing_and_a_baseline_ties_with_nobody():
    two, nine = Samples([1.0, 2.0]), Samples([1.0] * 9)
    assert ratios.paired(two, nine) is None and ratios.unpaired(two, nine) is None
    assert ratios.paired(Samples([1.0] * 10, 5), Samples([1.0] * 10, 5)) is None, "ten samples of two rounds"
    assert ratios.quotient((nine, nine), (nine, two)) is None
    assert not row("sdpa", speedup=1.0, speedup_low=1.0, speedup_high=1.0).tie and not row(speedup=1.0).tie


@pytest.mark.parametrize("power", [1.0, 2.0])
def test_growth_is_the_power_of_the_length(power):
    lines = growth([row(kv_len=length, milliseconds=length**power) for length in (64, 256, 128)] + [row("sdpa")])
    assert [(each.provider, each.lengths) for each in lines] == [("fastattn", [64, 128, 256])]
    assert lines[0].exponent == pytest.approx(power)


def test_growth_has_a_line_for_each_window_and_one_for_a_share_of_the_length():
    def windowed(length, window, milliseconds):
        case = dataclasses.replace(CASE, op="truncated", q_len=length, kv_len=length, window=window)
        return dataclasses.replace(row(milliseconds=milliseconds), case=case)

    fixed = [windowed(length, window, length * window) for window in (4, 8) for length in (64, 128, 256)]
    lines = growth(fixed)
    assert [(each.case, each.lengths) for each in lines] == [
        ("truncated/fp32/B1-H1-D8-W4", [64, 128, 256]), ("truncated/fp32/B1-H1-D8-W8", [64, 128, 256])
    ]  # fmt: skip
    assert all(each.exponent == pytest.approx(1.0) for each in lines)
    [share] = growth([windowed(length, length // 4, length**2) for length in (64, 128)])
    assert share.exponent == pytest.approx(2.0) and share.case == "truncated/fp32/B1-H1-D8"


def test_growth_keeps_other_sizes_apart_and_leaves_out_what_was_not_timed():
    other = dataclasses.replace(row(kv_len=64), case=dataclasses.replace(CASE, head_dim=16, kv_len=64))
    untimed = Row(dataclasses.replace(CASE, kv_len=32), "fwd", "fastattn", "cpu", reason="no")
    assert growth([row(), other, untimed]) == []


@pytest.mark.parametrize("op", OPS)
def test_the_tiny_case_takes_the_same_way(op, cpu):
    [case] = bench_cases("cpu", ops=[op])
    small = tiny(case)
    assert (small.q_len, small.kv_len, small.batch) == (1, 1, 1)
    assert small.num_heads // small.num_kv_heads == case.num_heads // case.num_kv_heads
    assert 0 < overhead_us(provider("fastattn"), case, OPS[op].modes[-1], cpu) < 1e5


def test_who_compiles_for_each_size_or_fails_in_the_tiny_one_has_no_overhead(cpu, monkeypatch):
    assert overhead_us(Flex(), CASE, "fwd", cpu) is None
    sdpa = provider("sdpa")
    monkeypatch.setattr(sdpa, "make", lambda workload, mode: 1 / 0)
    assert overhead_us(sdpa, CASE, "fwd", cpu) is None


def test_a_run_says_intervals_first_call_mask_overhead_and_growth(bench):
    _, text, report = bench("--op", "truncated", "-N", "32,64", "--providers", "fastattn,sdpa", "--mode", "fwd,bwd")
    for each in report["rows"]:
        assert each["speedup_low"] <= each["speedup_high"] and each["first_call_s"] > 0
        assert each["mask_s"] > 0 and each["overhead_us"] > 0
        assert each["dense_tflops"] > each["tflops"]
        assert each["tie"] is (each["provider"] == "fastattn" and each["speedup_low"] <= 1 <= each["speedup_high"])
    assert [(each["provider"], each["lengths"]) for each in report["growth"]][:2] == [
        ("fastattn", [32, 64]), ("sdpa", [32, 64])
    ]  # fmt: skip
    assert "time grows with length to the power of fastattn" in text.out and "Call overhead" in text.out


def test_a_file_of_another_schema_is_refused_with_its_version(tmp_path):
    path = tmp_path / "old.json"
    path.write_text(json.dumps({"schema": "fastattn-bench/1", "rows": [], "environment": {}}))
    with pytest.raises(ValueError, match=r"its schema is 'fastattn-bench/1', and 'fastattn-bench/2' is needed"):
        read_json(path)
