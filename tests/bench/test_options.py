"""The command line of the benchmark: lists, ranges, and sentences for mistakes."""

import pytest

from fastattn.bench import options
from fastattn.bench.cases.operations import OPS, bench_cases
from fastattn.bench.measure.run import plan


@pytest.mark.parametrize(
    "text, sizes",
    [
        ("512", [512]),
        ("1k,4k", [1024, 4096]),
        ("1m", [1 << 20]),
        ("512:4k:*2", [512, 1024, 2048, 4096]),
        ("1k:3k:+1k,7", [1024, 2048, 3072, 7]),
        ("64:100:*2", [64]),
    ],
)
def test_sizes_are_lists_and_ranges(text, sizes):
    assert options.parse(["-N", text]).q_len == sizes


@pytest.mark.parametrize(
    "flags, sentence",
    [
        (["-N", "0"], "positive whole number"),
        (["-N", "two"], "positive whole number"),
        (["-N", "1k:2k"], "first:last:*factor"),
        (["-N", "1:8:*1"], "factor must be at least 2"),
        (["-N", "8:1:*2"], "is empty"),
        (["-B", ","], "comma-separated list"),
        (["--mode", "train"], "one of fwd, bwd, fwd+bwd"),
        (["--only", "("], "not a regular expression"),
        (["--plot", "x.pdf"], ".svg or .png"),
        (["--rounds", "0"], "positive number"),
        (["--max-time", "-1"], "positive number"),
        (["--device", "tpu"], "invalid choice"),
    ],
)
def test_a_mistake_is_a_sentence_and_exit_code_2(flags, sentence, capsys):
    with pytest.raises(SystemExit) as exit_code:
        options.parse(flags)
    assert exit_code.value.code == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags, cases, model",
    [([], True, True), (["--quick"], True, True), (["--op", "self"], True, False), (["--model", "minilm"], False, True),
     (["--model", "minilm", "-N", "64"], True, True), (["--model", "none"], True, False)],
    ids=["default", "quick", "narrowed", "model-alone", "model-and-sizes", "no-model"],
)  # fmt: skip
def test_the_model_ends_a_default_run_and_runs_alone_when_asked(flags, cases, model):
    parsed = options.parse(flags)
    assert (parsed.wants_cases, parsed.wants_model) == (cases, model)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_operation_has_default_rows_with_distinct_names(device):
    cases = bench_cases(device, ops=list(OPS))
    assert {case.op for case in cases} == set(OPS)
    assert len({case.name for case in cases}) == len(cases)
    by_op = {case.op: case for case in cases}
    assert by_op["cross"].q_len != by_op["cross"].kv_len
    assert by_op["decode"].q_len == 1
    assert by_op["gqa"].num_heads == 4 * by_op["gqa"].num_kv_heads
    assert 0 < by_op["truncated"].window < by_op["truncated"].kv_len
    assert by_op["masked"].batch > 1


def test_named_sizes_win_over_what_an_operation_implies():
    for case in bench_cases("cpu", ops=list(OPS), batch=[1], num_kv_heads=[8], q_len=[64], kv_len=[96]):
        assert (case.batch, case.num_kv_heads, case.q_len, case.kv_len) == (1, 8, 64, 96)


@pytest.mark.parametrize(
    "flags, sentence",
    [
        (["--op", "selve"], "op: 'selve' is not known; there are self, causal"),
        (["--dtype", "fp8"], "dtype: 'fp8' is not known; there are fp16"),
        (["--providers", "sdpb"], "providers: 'sdpb' is not known; there are fastattn"),
        (["--kv-heads", "3"], "must divide the number of heads, got 3 for 8 heads"),
    ],
)
def test_an_unknown_name_lists_the_known_ones(flags, sentence, cpu):
    with pytest.raises(ValueError) as failure:
        plan(options.parse(flags), cpu)
    assert sentence in str(failure.value)


def test_only_picks_rows_by_name(cpu):
    rows = plan(options.parse(["--only", "causal/.*/bwd/sdpa$"]), cpu)
    assert [(row.case.op, row.mode, row.provider) for row in rows] == [("causal", "bwd", "sdpa")]


def test_a_baseline_outside_the_providers_joins_them(cpu):
    rows = plan(options.parse(["--op", "self", "--providers", "fastattn", "--baseline", "sdpa-math"]), cpu)
    assert {row.provider for row in rows} == {"fastattn", "sdpa-math"}
