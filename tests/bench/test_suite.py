"""Suites: the CPU backend's table as a list of cells, budgets, and the document's table of ratios."""

import dataclasses
import json

import pytest

from fastattn.bench.cases.operations import OPS, BenchCase
from fastattn.bench.cases.suites import PEERS, SUITES, Cell, cpu_table, headline, suite
from fastattn.bench.measure.providers.table import known_providers
from fastattn.bench.measure.rows import Row
from fastattn.bench.measure.run import cell_rows, plan
from fastattn.bench.options import parse
from fastattn.bench.report import doc_tables, ratio_tables
from fastattn.cli import main

BATCHES = {"B8-H16-N2048-D128", "B2-H16-N8192-D128"}
CELLS = {cell.name: cell for cell in cpu_table()}


@pytest.mark.parametrize(
    "name",
    [
        *(f"{op}/{dtype}/B1-H8-N{length}-D{width}/{mode}" for op in ("self", "causal") for mode in ("fwd", "bwd")
          for dtype in ("bf16", "fp32", "fp16") for length in (1024, 4096) for width in (64, 128)),
        *(f"self/{dtype}/B1-H2-N16384-D64/fwd" for dtype in ("bf16", "fp32", "fp16")),
        *(f"{op}/{dtype}/B1-H8-N2048-D64/{mode}" for op in ("dropout", "biased", "unbatched", "head-masks")
          for dtype in ("bf16", "fp32") for mode in ("fwd", "fwd+bwd")),
        *(f"wide-values/{dtype}/B1-H8-N2048-D64-V128/{mode}"
          for dtype in ("bf16", "fp32") for mode in ("fwd", "fwd+bwd")),
        *(f"local/{dtype}/B1-H8-N4096-D{width}-W128/{mode}" for dtype in ("bf16", "fp32") for width in (64, 128)
          for mode in ("fwd", "bwd")),
        *(f"local/{dtype}/B1-H8-N16384-D64-W128/fwd" for dtype in ("bf16", "fp32")),
        *(f"masked/{dtype}/B1-H8-N4096-D{width}/fwd" for dtype in ("bf16", "fp32") for width in (64, 128)),
        *(f"cross/{dtype}/B1-H8-N4096-M77-D64/fwd" for dtype in ("bf16", "fp32")),
        *(f"decode/bf16/B1-H32/8-N1-M{length}-D128/fwd" for length in (4096, 16384)),
        *(f"module/{dtype}/B1-H8-N2048-D64/fwd" for dtype in ("bf16", "fp32")),
        *(f"self/{dtype}/B32-H8-N64-D64/fwd" for dtype in ("bf16", "fp32")),
    ],
)  # fmt: skip
def test_the_cpu_backends_table_has_every_row(name):
    assert name in CELLS


HEADLINE = [
    "self/bf16/B1-H16-N16384-D128/fwd",
    "causal/bf16/B1-H16-N16384-D128/fwd",
    "self/bf16/B1-H16-N16384-D128/bwd",
    "causal/bf16/B1-H16-N16384-D128/bwd",
    "decode/bf16/B8-H32/8-N1-M16384-D128/fwd",
    "truncated/bf16/B1-H16-N32768-D128-W1024/fwd",
]


def test_a_gpus_headline_are_six_cells():
    assert [cell.name for cell in headline("cuda")] == HEADLINE


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_suite_begins_with_its_headline_and_has_each_cell_once(device):
    cells = suite(device)
    assert cells[:6] == headline(device) and len(set(cells)) == len(cells)
    assert {(cell.case.op, cell.mode) for cell in cells[:6]} == {
        ("self", "fwd"), ("causal", "fwd"), ("self", "bwd"), ("causal", "bwd"), ("decode", "fwd"), ("truncated", "fwd")
    }  # fmt: skip


def test_a_gpus_other_lengths_and_head_dims_come_before_the_long_tail():
    names = [cell.name for cell in suite("cuda")]
    early = [f"{op}/bf16/{sizes}/fwd" for op in ("self", "causal") for sizes in BATCHES | {"B1-H8-N16384-D256"}]
    early += [f"causal/bf16/{sizes}/bwd" for sizes in BATCHES | {"B1-H8-N16384-D256", "B1-H32-N16384-D64"}]
    assert max(map(names.index, early)) < 6 + 12
    tokens = {cell.case.batch * cell.case.q_len for cell in suite("cuda") if cell.case.op in ("self", "causal")}
    assert tokens == {16384, 32768}, "the batch keeps the number of tokens; 32k is one sequence"


def test_a_cpus_suite_is_small():
    assert max(cell.case.q_len for cell in suite("cpu")) <= 2048 and suite("cpu")[0].case.q_len == 1024


def test_a_gpus_cell_has_each_backend_beside_pytorchs_kernels(cpu):
    assert PEERS["cuda"] == ("fastattn", "fastattn-cuda", "fastattn-triton", "sdpa-cudnn", "sdpa-flash", "flex")
    assert set(PEERS["cuda"]) <= set(known_providers())


@pytest.mark.parametrize(
    "names, baseline",
    [
        (PEERS["cuda"], "sdpa-cudnn"),
        (PEERS["cpu"], "sdpa"),
        (("sdpa-cudnn", "sdpa"), "sdpa"),
        (("fastattn", "sdpa-flash"), None),
    ],
)
def test_the_baseline_is_pytorchs_choice_else_cudnn(names, baseline, cpu):
    assert {row.baseline for row in cell_rows(Cell(CASE, "fwd"), names, cpu)} == {baseline}


def test_a_suite_is_planned_with_its_own_providers_and_baselines(cpu):
    rows = plan(parse(["cpu-table", "--device", "cpu"]), cpu)
    assert {row.provider for row in rows} == {"fastattn", "sdpa", "flex", "read", "mha"} <= set(known_providers())
    assert {row.baseline for row in rows if row.case.op == "module"} == {"mha"}
    assert {row.provider for row in rows if row.case.q_len == 16384 and row.case.op == "local"} == {"fastattn"}
    assert len({row.name for row in rows}) == len(rows)
    padded = next(row for row in rows if row.case.op == "masked")
    assert OPS["masked"].mask(padded.case, "cpu").kv_lengths.tolist() == [padded.case.kv_len // 2]


def test_dtypes_modes_and_names_pick_from_a_suite(cpu):
    rows = plan(parse(["cpu-table", "--dtype", "fp16", "--mode", "bwd", "--only", "causal.*fastattn"]), cpu)
    assert {(row.case.op, row.case.dtype, row.mode, row.provider) for row in rows} == {
        ("causal", "fp16", "bwd", "fastattn")
    }
    assert plan(parse(["cpu-table", "vit-b"]), cpu)[-1].case.q_len == 197


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["cpu-tabel"], "'cpu-tabel' is not known; there are llama3-8b-prefill"),
        (["cpu-tabel"], "did you mean 'cpu-table'?"),
        (["cpu-table", "-N", "4k"], "cpu-table bring their own operation and sizes, and q_len came too"),
    ],
)
def test_a_wrong_word_is_a_sentence(words, sentence, capsys):
    assert main(["bench", *words, "--device", "cpu"]) == 2
    assert sentence in capsys.readouterr().err


def test_a_suite_of_another_device_is_refused(cpu, monkeypatch):
    monkeypatch.setitem(SUITES, "cpu-table", dataclasses.replace(SUITES["cpu-table"], device="cuda"))
    with pytest.raises(ValueError, match="cpu-table is measured on cuda, got cpu; add --device cuda"):
        plan(parse(["cpu-table"]), cpu)


def test_a_spent_budget_keeps_what_it_has_and_resume_goes_on(bench, monkeypatch):
    flags = ("--op", "self,causal", "--providers", "sdpa", "--mode", "fwd")
    now = iter([0.0, 1.0, 99.0])
    with monkeypatch.context() as patched:
        patched.setattr("fastattn.bench.measure.run.time.monotonic", lambda: next(now))
        code, text, report = bench(*flags, "--budget", "10")
    assert code == 0 and [row["op"] for row in report["rows"]] == ["self"]
    assert "the budget of 10 s is spent: 1 of 2 rows were measured; --resume --json out/bench.json goes on" in text.out
    code, text, again = bench(*flags, "--resume")
    assert code == 0 and again["rows"][0] == report["rows"][0] and len(again["rows"]) == 2
    assert "budget" not in text.out


CASE = BenchCase("self", "bf16", 1, 8, 8, 1024, 1024, 64)


def row(provider="fastattn", milliseconds=1.0, case=CASE, **more):
    samples = [milliseconds * (1 + 0.01 * (step % 3)) for step in range(9)]
    return Row(case, "fwd", provider, "cpu", samples_ms=[] if "reason" in more else samples, **more)


def test_ratios_are_of_fastattn_against_each_of_the_others():
    lines = ratio_tables.markdown(
        [row(), row("fastattn-reference", 9.0), row("sdpa", 3.0), row("flex", reason="no compiler")]
    )
    assert lines[2:] == [
        "| self | bf16  B1 H8 N1024 D64 | fwd | 1.01 ms | sdpa | 3.03 ms | 3.00x | 3.00 to 3.00 |",
        "| self | bf16  B1 H8 N1024 D64 | fwd | 1.01 ms | flex | no compiler |  |  |",
    ]
    [tie] = ratio_tables.markdown([row(), row("sdpa", 1.0)])[2:]
    assert tie.endswith("| 1.00x | 1.00 to 1.00, tie |")
    [alone] = ratio_tables.markdown([row()])[2:]
    assert alone.endswith("| fwd | 1.01 ms |  |  |  |  |")
    [coarse, wrong] = ratio_tables.markdown([
        row(), row("sdpa", 2.0, coarse=True, correct=False), row("flex", reason="wrong: out", correct=False)
    ])[2:]  # fmt: skip
    assert "2.02 ms (coarse) | 2.00x" in coarse and "✗ wrong: out" in wrong


def test_a_read_loop_tells_bytes_a_second():
    case = BenchCase("decode", "bf16", 1, 32, 8, 1, 4096, 128)
    [line] = ratio_tables.markdown([row(case=case, least_bytes=10**7), row("read", 0.8, case, least_bytes=10**7)])[2:]
    assert "1.01 ms (9.90 GB/s) | read | 808 µs (12.4 GB/s) | 0.80x | 0.800 to 0.800 |" in line


def test_a_windows_growth_and_what_padding_gains_stand_below():
    window = [dataclasses.replace(CASE, op="local", window=128, q_len=size, kv_len=size) for size in (4096, 16384)]
    masked = dataclasses.replace(CASE, op="masked")
    lines = ratio_tables.markdown([
        row(), row("sdpa", 3.0), row(case=masked, milliseconds=0.5), row("sdpa", 3.0, masked),
        row(case=window[1], milliseconds=4.1), row(case=window[0], milliseconds=1.0),
    ])  # fmt: skip
    assert lines[-2].startswith("- local bf16  B1 H8 N16384 D64 W128 fwd: 4.10x the time of 4096 tokens (4.0")
    assert lines[-2].endswith("for 4x as many")
    assert lines[-1].startswith(
        "- masked bf16  B1 H8 N1024 D64 fwd: 2.00x the ratio to sdpa without padding (2.00 to 2.00)"
    )


def test_a_document_shows_ratios_where_its_marker_says_so(tmp_path):
    environment = {
        "date": "2030-01-01T00:00:00", "gpu": None, "cpu": "Z80", "threads": 1, "torch": "9", "python": "3",
        "fastattn": "1", "commit": None, "dirty": None, "busy": False,
    }  # fmt: skip
    records = [each.record() for each in (row(), row("sdpa", 3.0))]
    (tmp_path / "one.json").write_text(
        json.dumps({"schema": "fastattn-bench/2", "environment": environment, "rows": records})
    )
    text = f"<!-- table: one.json as=ratios only=self -->\n{doc_tables.END}\n"
    filled = doc_tables.render(text, tmp_path)
    assert "| 3.00x | 3.00 to 3.00 |" in filled and "Z80" in filled and doc_tables.render(filled, tmp_path) == filled


def test_ceilings_of_the_machine_stand_below_the_ratios():
    measured = {"tflops": {"fp32": 0.2, "bf16": 1.7}, "gb_per_s": 31.0}
    [_, line] = ratio_tables.ceilings({"device": "cpu", "ceilings": measured})
    assert "all threads: fp32 200, bf16 1700 GFLOP/s" in line and "copies: 31.0 GB/s" in line
    more = {"tile_tflops": {"bf16": 0.9}}  # files of earlier versions have it
    assert ratio_tables.ceilings({"device": "cpu", "ceilings": measured | more}) == ["", line]
    assert ratio_tables.ceilings({"device": "cpu"}) == []
