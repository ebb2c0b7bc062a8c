"""Runs that are kept, go on, are held against each other, and stop early; sizes that do not fit."""

import itertools
import json
import math

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from fastattn.bench import options
from fastattn.bench.cases.module import workload_of
from fastattn.bench.cases.operations import BenchCase
from fastattn.bench.measure import estimate
from fastattn.bench.measure.clock import CpuClock
from fastattn.bench.measure.providers.sdpa import Sdpa
from fastattn.bench.measure.providers.table import provider
from fastattn.bench.measure.rows import Row
from fastattn.bench.measure.run import plan, too_large
from fastattn.bench.options import parse
from fastattn.bench.report import compare
from fastattn.cli import main

ONE = ("--op", "self", "--providers", "sdpa", "--mode", "fwd")
CASE = BenchCase("self", "fp32", 1, 1, 1, 8, 8, 8)


def record(path, *rows, schema="fastattn-bench/2", **environment):
    block = {
        "date": "2030-01-01T00:00:00", "gpu": None, "cpu": "Z80", "threads": 1, "torch": "9", "python": "3",
        "fastattn": "1", "commit": None, "dirty": None, "busy": False, **environment,
    }  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"schema": schema, "environment": block, "rows": [row.record() for row in rows]}))


def row(provider="fastattn", milliseconds=1.0, **more):
    samples = [milliseconds * (1 + 0.001 * step) for step in range(9)]
    return Row(CASE, "fwd", provider, "cpu", samples_ms=samples, **more)


@pytest.fixture
def saved(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    return lambda name, *rows, **more: record(tmp_path / f"fastattn-bench/saved/{name}.json", *rows, **more)


def test_a_saved_run_is_found_by_name_and_equal_to_itself(bench, capsys):
    assert bench(*ONE, "--save", "one")[0] == 0
    assert main(["bench", "compare", "one", "one", "--fail"]) == 0
    text = capsys.readouterr().out
    assert "~ same" in text and "0 faster, 0 slower, 1 same, of 1 rows" in text and "1.00x" in text


@pytest.mark.parametrize(
    "after, threshold, word, code",
    [
        (1.2, "5%", "✗ slower", 1),
        (1.2, "25%", "~ same", 0),
        (0.5, "0.05", "✓ faster", 0),
        (1.02, "5%", "~ same", 0),
    ],
)
def test_a_change_counts_beyond_the_threshold(saved, capsys, after, threshold, word, code):
    saved("old", row(), row("sdpa"))
    saved("new", row(milliseconds=after), row("flex"))
    assert main(["bench", "compare", "old", "new", "--threshold", threshold, "--fail"]) == code
    assert main(["bench", "compare", "old", "new", "--threshold", threshold]) == 0
    text = capsys.readouterr().out
    assert word in text and "only in A: 1 rows, such as self/fp32/B1-H1-N8-D8/fwd/sdpa" in text
    assert ("again: fastattn bench --op self" in text) is (word == "✗ slower")


def test_eighty_columns_are_enough(saved, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    big = BenchCase("wide-values", "bf16", 128, 32, 8, 131072, 65536, 128, None, 256)
    names = ("fastattn", "fastattn-reference", "sdpa-efficient")
    for run, scale in (("old", 1.0), ("new", 1.3)):
        saved(run, *[Row(big, mode, name, "cpu", samples_ms=[scale * 123.4 * (1 + step / 50) for step in range(9)])
                     for mode in ("fwd", "fwd+bwd") for name in names])  # fmt: skip
    assert main(["bench", "compare", "old", "new"]) == 0
    lines = capsys.readouterr().out.splitlines()
    table = lines[lines.index(next(line for line in lines if line.startswith("wide-values"))) :]
    rows = [line for line in table if "✗ slower" in line]
    assert (
        len(rows) == 6 and all(len(line) <= 80 for line in rows) and all("fastattn" in rows[at] for at in (0, 1, 3, 4))
    )
    assert rows[0].split()[:6] == ["fwd", "fastattn", "133", "ms", "173", "ms"] and "0.77x" in rows[0]


def test_a_change_within_the_noise_is_none():
    noisy = row(milliseconds=1.0)
    noisy.samples_ms = [0.2, 1.5, 0.4, 1.6, 0.3, 1.4, 1.5]
    [change] = compare.changes([row()], [noisy], 0.05)
    assert change.ratio < 0.9 and change.interval.tie and change.word == compare.SAME_WORD


def test_two_machines_and_busy_ones_are_said(saved, capsys):
    saved("old", row())
    saved("new", row(), cpu="6502", busy=True)
    main(["bench", "compare", "old", "new"])
    text = capsys.readouterr().out
    assert "two machines (cpu: Z80 and 6502)" in text and "busy" in text


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["old", "newer"], "'newer' is not known; there are new, old; did you mean 'new'?"),
        (["old", "x/y.json"], "x/y.json: there is no such file"),
        (["old", "v1"], "its schema is 'fastattn-bench/1'"),
    ],
)
def test_a_run_that_is_not_there_is_a_sentence(saved, capsys, words, sentence):
    saved("old", row())
    saved("new", row("sdpa"))
    if "v1" in words:
        saved("v1", row(), schema="fastattn-bench/1")
    assert main(["bench", "compare", *words]) == 2
    assert sentence in capsys.readouterr().err
    assert main(["bench", "compare", "old", "new"]) == 3


def test_comparing_without_saved_runs_says_how_to_save_one(saved, capsys):
    assert main(["bench", "compare", "a", "b"]) == 2
    assert "`fastattn bench --save a` saves one" in capsys.readouterr().err


def test_a_share_is_a_share(capsys):
    with pytest.raises(SystemExit):
        main(["bench", "compare", "a", "b", "--threshold", "much"])
    assert "a share such as 5% or 0.05 is needed, got 'much'" in capsys.readouterr().err


def test_resume_keeps_what_was_measured_and_measures_the_rest(bench):
    _, _, first = bench(*ONE)
    code, _, both = bench("--op", "self,causal", "--providers", "sdpa", "--mode", "fwd", "--resume")
    assert code == 0 and [each["op"] for each in both["rows"]] == ["self", "causal"]
    assert both["rows"][0]["samples_ms"] == first["rows"][0]["samples_ms"]
    _, _, anew = bench(*ONE)
    assert anew["rows"][0]["samples_ms"] != first["rows"][0]["samples_ms"]


def test_resume_is_refused_on_another_machine_and_without_a_file(bench, tmp_path, capsys):
    bench(*ONE)
    path = tmp_path / "out" / "bench.json"
    whole = json.loads(path.read_text())
    whole["environment"]["torch"] = "0.4"
    path.write_text(json.dumps(whole))
    code, text, _ = bench(*ONE, "--resume")
    assert code == 2 and "torch was '0.4' and is" in text.err
    assert main(["bench", "--resume", "--device", "cpu"]) == 2
    assert "--save NAME, --json FILE or --out DIR" in capsys.readouterr().err
    assert main(["bench", "--save", "a/b", "--device", "cpu"]) == 2


def test_ctrl_c_writes_what_was_measured_and_resume_goes_on(bench, monkeypatch):
    flags = ("--op", "self,causal", "--providers", "sdpa", "--mode", "fwd")
    honest = Sdpa.make

    def make(self, workload, mode):
        if workload.case.op == "causal":
            raise KeyboardInterrupt
        return honest(self, workload, mode)

    with monkeypatch.context() as patched:
        patched.setattr(Sdpa, "make", make)
        code, text, report = bench(*flags)
    assert code == 130 and [each["op"] for each in report["rows"]] == ["self"]
    assert "stopped: 1 of 2 rows were measured; --resume" in text.out
    code, _, again = bench(*flags, "--resume")
    assert code == 0 and again["rows"][0] == report["rows"][0] and len(again["rows"]) == 2


def test_each_case_is_written_before_the_next_begins(bench, monkeypatch, tmp_path):
    found = []
    honest = CpuClock.warm_up

    def warm_up(self, call, timing):
        path = tmp_path / "out" / "bench.json"
        found.append(len(json.loads(path.read_text())["rows"]) if path.exists() else 0)
        honest(self, call, timing)

    monkeypatch.setattr(CpuClock, "warm_up", warm_up)
    bench("--op", "self,causal,cross", "--providers", "sdpa", "--mode", "fwd")
    assert found == [0, 1, 2] and not list(tmp_path.rglob("*.part"))


@pytest.mark.parametrize("name", ["fastattn-reference", "sdpa-math"])
def test_a_size_that_does_not_fit_is_a_cell_that_says_so(bench, monkeypatch, name):
    monkeypatch.setattr(estimate, "free_bytes", lambda device: 1 << 20)
    code, text, report = bench("--op", "self", "--providers", f"{name},sdpa", "--mode", "fwd", "-N", "512")
    assert code == 0
    large, small = report["rows"]
    assert large["reason"].startswith("does not fit: about ") and large["reason"].endswith(", free 1.00 MiB")
    assert large["estimated_bytes"] > 1 << 20 and small["samples_ms"]
    assert small["correct"] is None, "its float64 tables do not fit either"
    assert "does not fit" in text.out


@pytest.mark.parametrize("op", ["self", "gqa", "truncated"])
@pytest.mark.parametrize("mode", ["fwd", "bwd"])
@pytest.mark.parametrize("name", ["fastattn-reference", "sdpa-math"])
def test_an_estimate_is_not_below_what_torch_allocates_at_its_peak(op, mode, name, cpu, tmp_path):
    flags = ["--op", op, "--providers", name, "--mode", mode, "-N", "512", "-D", "64", "-H", "8", "-B", "1"]
    [planned] = plan(parse(flags), cpu)
    assert too_large(planned, cpu) is None
    workload = workload_of(planned.case, cpu)
    call = workload.call(mode, provider(name).make(workload, mode))
    call()  # what the first call keeps for good is not of the peak
    table = 4 * 8 * 512 * 512
    assert table < allocated_peak(call, tmp_path / "trace.json") <= planned.estimated_bytes


def allocated_peak(call, path):
    """Most bytes held at a time, as torch's CPU allocator reports them to its profiler: the resident set of a process
    also counts freed pages that the C library keeps."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        call()
    recorded.export_chrome_trace(str(path))
    found = [each for each in json.loads(path.read_text())["traceEvents"] if each["name"] == "[memory]"]
    changes = [each["args"]["Bytes"] for each in sorted(found, key=lambda each: each["ts"])]
    return max(itertools.accumulate(changes))


def test_a_dry_run_says_what_each_row_takes_and_allocates_nothing(capsys, monkeypatch, cpu):
    honest = torch.randn

    def small(shape, **more):
        if math.prod(shape) > 1000:
            raise MemoryError(f"{shape} was allocated")
        return honest(shape, **more)

    monkeypatch.setattr(torch, "randn", small)
    flags = ["--op", "self", "-N", "1k,1m", "--providers", "fastattn-reference,sdpa", "--mode", "fwd,bwd", "--repro"]
    assert main(["bench", *flags, "--dry-run", "--device", "cpu"]) == 0
    text = capsys.readouterr().out
    lines = {line.split()[-1]: line for line in text.splitlines() if "/fwd/" in line}
    assert "✗" in next(line for line in text.splitlines() if "N1048576-D64/fwd/fastattn-reference" in line)
    assert len(lines) >= 4 and "would not be checked" in text and "fastattn bench --op self --dtype fp32" in text


def test_more_keys_take_more_memory(cpu):
    needs = []
    for each in plan(parse(["--op", "self", "-N", "64,128", "--providers", "sdpa", "--mode", "fwd,bwd"]), cpu):
        assert too_large(each, cpu) is None
        needs.append(each.estimated_bytes)
    assert needs == sorted(needs) and len(set(needs)) == 4
    assert provider("sdpa").extra_bytes(CASE, "fwd", cpu) == 0


def test_repro_prints_a_line_a_row(bench):
    _, text, report = bench(*ONE, "--repro")
    assert f"    {report['rows'][0]['command']}\n" in text.out
    _, text, _ = bench("--from", "out/bench.json", "--repro")
    assert report["rows"][0]["command"] in text.out


def test_the_container_limit_counts(tmp_path, monkeypatch, cpu):
    limit, used = tmp_path / "max", tmp_path / "current"
    limit.write_text("3000\n")
    used.write_text("1000\n")
    monkeypatch.setattr(estimate, "CGROUP_LIMIT", limit)
    monkeypatch.setattr(estimate, "CGROUP_USED", used)
    assert estimate.free_bytes(cpu) == 2000
    limit.write_text("max\n")
    assert estimate.free_bytes(cpu) != 2000
    assert options.parse(["--dry-run"]).dry_run
