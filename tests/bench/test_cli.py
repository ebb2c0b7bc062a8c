"""`fastattn bench`, `info` and `check` as a user meets them: tables, files, exit codes, reasons in cells."""

import json
import shlex

import pytest
import torch

import fastattn
from fastattn.bench import options
from fastattn.bench.measure.providers import flex
from fastattn.bench.measure.providers.fastattn import Fastattn
from fastattn.bench.measure.providers.sdpa import Sdpa
from fastattn.bench.measure.run import plan
from fastattn.cli import main
from fastattn.dispatch import BACKENDS
from fastattn.testing import CASES

QUERY = torch.empty(1, 1, 4, 8)


def rows_of(report, **wanted):
    return [row for row in report["rows"] if all(row[name] == value for name, value in wanted.items())]


def test_the_table_names_operation_provider_time_speedup_and_check(bench):
    code, text, report = bench("--op", "causal,masked", "--providers", "fastattn,sdpa")
    assert code == 0
    for words in (
        "causal",
        "masked",
        f"fastattn ({fastattn.explain(QUERY, QUERY, QUERY).backend})",
        "sdpa",
        "vs sdpa",
        "GFLOP/s",
        "1.00x",
        "✓",
        "KiB",
        "float64",
    ):
        assert words in text.out
    assert "[1/8] causal fwd · fastattn" in text.err
    assert "written: out/bench.json" in text.out
    assert len(report["rows"]) == 8


@pytest.mark.parametrize("width", [80, 100, 140])
def test_every_figure_fits_the_terminal(bench, monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    _, text, report = bench("--op", "self", "--providers", "fastattn,sdpa", "--mode", "fwd+bwd")
    for row in report["rows"]:
        assert f"✓ {row['max_error']:.1e}" in text.out
    assert max(map(len, text.out.split("written:")[0].splitlines())) <= width


def test_no_colour_codes_where_the_output_is_not_a_terminal(bench):
    _, text, _ = bench("--op", "self", "--providers", "sdpa", "--mode", "fwd")
    assert "\x1b" not in text.out + text.err


def test_the_json_holds_every_sample_and_the_machine(bench):
    _, _, report = bench(
        "--op", "truncated", "--window", "5", "--providers", "fastattn,sdpa", "--mode", "fwd,bwd,fwd+bwd"
    )
    assert report["schema"] == "fastattn-bench/2"
    assert {"date", "command", "cpu", "threads", "load_average", "torch", "python", "commit", "dirty"} <= set(
        report["environment"]
    )
    assert report["settings"]["rounds"] == 3
    for row in report["rows"]:
        assert len(row["samples_ms"]) >= 3 and min(row["samples_ms"]) > 0
        assert row["q1_ms"] <= row["median_ms"] <= row["q3_ms"]
        assert row["correct"] is True and row["max_error"] < 1e-3
        assert row["reason"] is None and row["window"] == 5
        assert 0 < row["useful_flops"] < row["dense_flops"]
        assert row["tflops"] == pytest.approx(row["useful_flops"] / row["median_ms"] / 1e9)
        assert row["peak_bytes"] is None or row["peak_bytes"] >= 0
    [forward] = rows_of(report, provider="sdpa", mode="fwd")
    [both] = rows_of(report, provider="sdpa", mode="fwd+bwd")
    assert {each["name"] for each in forward["errors"]} == {"out"}
    assert {each["name"] for each in both["errors"]} == {"out", "dq", "dk", "dv"}
    assert forward["speedup"] == 1.0


def test_each_row_carries_a_command_that_runs_it_again(bench, cpu):
    _, _, report = bench(
        "--op", "truncated,gqa", "--kv-heads", "1", "-W", "5", "--providers", "sdpa,sdpa-math", "--mode", "bwd"
    )
    for row in report["rows"]:
        words = shlex.split(row["command"])
        assert words[:2] == ["fastattn", "bench"]
        again = plan(options.parse(words[2:]), cpu)
        assert row["name"] in [each.name for each in again]


def test_csv_and_markdown_have_a_line_a_row(bench, tmp_path):
    _, _, report = bench(
        "--op", "self", "--providers", "fastattn,flex", "--mode", "bwd", "--csv", "t.csv", "--md", "t.md"
    )
    csv_lines = (tmp_path / "t.csv").read_text().splitlines()
    assert len(csv_lines) == 1 + len(report["rows"]) and "median_ms" in csv_lines[0]
    markdown = (tmp_path / "t.md").read_text()
    assert "### self" in markdown and "✓" in markdown
    assert "no backward on CPU" in markdown or "no C++ compiler" in markdown


def test_an_earlier_run_is_shown_again_from_its_json(bench, tmp_path, capsys):
    _, text, _ = bench("--op", "self,gqa", "--providers", "fastattn,sdpa,sdpa-cudnn", "--mode", "fwd")
    code, again, _ = bench("--from", "out/bench.json", "--md", "again.md")
    table = [line for line in text.out.splitlines() if "fastattn (" in line or "sdpa" in line]
    assert code == 0 and table and all(line in again.out for line in table)
    assert (tmp_path / "again.md").read_text().count("### ") == 2
    (tmp_path / "other.json").write_text("{}")
    code, again, _ = bench("--from", "other.json")
    assert code == 2 and "other.json is not a run of fastattn bench" in again.err


def test_a_provider_that_cannot_run_says_why_in_its_cell(bench, monkeypatch):
    monkeypatch.setattr(flex, "cxx", lambda: None)
    code, text, report = bench("--op", "self", "--providers", "sdpa,flex,sdpa-cudnn", "--mode", "fwd")
    assert code == 0
    assert rows_of(report, provider="flex")[0]["reason"] == "no C++ compiler"
    assert rows_of(report, provider="sdpa-cudnn")[0]["reason"] == "needs CUDA"
    assert "no C++ compiler" in text.out and "needs CUDA" in text.out


def test_flex_has_no_backward_on_a_cpu(bench, monkeypatch):
    monkeypatch.setattr(flex, "cxx", lambda: "/usr/bin/c++")
    code, text, _ = bench("--op", "self", "--providers", "flex", "--mode", "bwd")
    assert code == 3
    assert "Nothing ran" in text.out and "no backward on CPU" in text.out


@pytest.mark.parametrize("mode", ["fwd", "bwd"])
def test_a_backend_that_refuses_says_so_in_its_cell(bench, monkeypatch, mode):
    from fastattn import dispatch

    reasons = {"why_not": None, "needs_asking": None, "why_not_backward": "the moon is wrong"}
    if mode == "fwd":
        reasons = {"why_not": "the moon is wrong"}
    for name, reason in reasons.items():
        monkeypatch.setattr(dispatch.load("triton"), name, lambda spec, reason=reason: reason)
    code, _, report = bench("--op", "self", "--providers", "fastattn-triton,sdpa", "--mode", mode)
    assert code == 0
    assert rows_of(report, provider="fastattn-triton")[0]["reason"] == "the moon is wrong"


def test_out_of_memory_is_a_cell_not_a_crash(bench, monkeypatch):
    def make(self, workload, mode):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 EiB")

    monkeypatch.setattr(Sdpa, "make", make)
    code, text, report = bench("--op", "self", "--providers", "fastattn,sdpa", "--mode", "fwd")
    assert code == 0
    [row] = rows_of(report, provider="sdpa")
    assert row["reason"] == "out of memory" and "out of memory" in text.out
    assert rows_of(report, provider="fastattn")[0]["speedup"] is None


@pytest.mark.parametrize("mode", ["fwd", "bwd"])
@pytest.mark.parametrize("provider", [Fastattn, Sdpa], ids=["fastattn", "sdpa"])
def test_a_wrong_provider_is_flagged_and_not_timed_and_only_ours_fails_the_run(bench, monkeypatch, mode, provider):
    right = provider.make

    def make(self, workload, mode):
        made = right(self, workload, mode)
        honest = made.forward
        made.forward = lambda query, key, value: honest(query, key, value) + 0.01 * query
        return made

    monkeypatch.setattr(provider, "make", make)
    code, text, report = bench("--op", "self", "--providers", "fastattn,sdpa", "--mode", mode)
    name = provider.__name__.lower()
    assert code == (1 if name == "fastattn" else 0)
    [row] = rows_of(report, provider=name)
    assert row["correct"] is False and row["samples_ms"] == []
    assert "✗" in text.out and "RMS error" in text.out
    assert (f"again: {row['command']}" in text.out) is (code == 1)


def test_no_check_times_without_the_reference(bench):
    code, text, report = bench("--op", "self", "--providers", "sdpa", "--mode", "fwd", "--no-check")
    assert code == 0 and report["rows"][0]["correct"] is None and "unchecked" in text.out


def test_a_crash_of_fastattn_is_a_failure_of_others_a_cell(bench, monkeypatch):
    def make(self, workload, mode):
        raise RuntimeError("boom\nand a long trace")

    with monkeypatch.context() as patched:
        patched.setattr(Fastattn, "make", make)
        code, text, _ = bench("--op", "self", "--providers", "fastattn,sdpa", "--mode", "fwd")
    assert code == 1 and "✗ RuntimeError: boom" in text.out
    monkeypatch.setattr(Sdpa, "make", make)
    assert bench("--op", "self", "--providers", "fastattn,sdpa", "--mode", "fwd")[0] == 0


def test_nothing_to_run_is_exit_code_3(bench):
    code, text, report = bench("--only", "no such row", "--providers", "sdpa")
    assert code == 3 and report is None and "no row fits" in text.out


def test_usage_errors_are_exit_code_2_with_a_sentence(bench):
    code, text, report = bench("--providers", "tpu")
    assert code == 2 and report is None
    assert text.err.startswith("fastattn bench: providers: 'tpu' is not known; there are fastattn,")


@pytest.mark.parametrize(
    "flags, sentence",
    [
        (["-N", "4x"], "a size is a positive whole number such as 512, 4k or 1m, got '4x'; fastattn bench --help has"),
        (["--baseline", "sdpa-fash"], "baseline: 'sdpa-fash' is not known; there are fastattn,"),
        (["--op", "self,causal", "-W", "8"], "window: self, causal has none; truncated and local have"),
        (["--from", "none.json"], "none.json: there is no such file"),
        (["--op", "slef"], "did you mean 'self'?"),
    ],
)
def test_a_mistake_is_one_sentence(flags, sentence, capsys):
    try:
        code = main(["bench", *flags, "--device", "cpu"])
    except SystemExit as exit_code:
        code = exit_code.code
    said = capsys.readouterr().err
    assert code == 2 and sentence in said and len(said.splitlines()) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="a machine without a GPU is needed")
def test_cuda_without_a_gpu_is_refused(capsys):
    assert main(["bench", "--device", "cuda"]) == 2
    assert "torch sees no GPU" in capsys.readouterr().err


def test_list_prints_operations_providers_and_rows_and_runs_nothing(bench):
    code, text, report = bench("--list", "--op", "cross", "--mode", "fwd")
    assert code == 0 and report is None
    assert "cross/fp32/B2-H2-N32-M64-D16/fwd/fastattn" in text.out and "sdpa-math" in text.out


def test_plots_are_written_and_not_blank(bench, tmp_path):
    image = pytest.importorskip("matplotlib.image")
    code, _, _ = bench("--op", "self,cross", "--providers", "fastattn,sdpa", "--mode", "fwd", plot=True)
    assert code == 0
    pixels = image.imread(tmp_path / "out" / "bench.png")
    assert len({tuple(pixel) for pixel in pixels[::7, ::7, :3].reshape(-1, 3).tolist()}) > 5
    drawing = (tmp_path / "out" / "bench.svg").read_text()
    for words in ("self, fwd", "cross, fwd", "fastattn", "sdpa", "GFLOP/s", "fp32  B2 H2 N32 D16"):
        assert words in drawing


def test_many_lengths_are_drawn_as_lines(bench, tmp_path):
    pytest.importorskip("matplotlib")
    bench("--op", "self", "--providers", "sdpa", "--mode", "fwd", "-N", "8:64:*2", "--plot", "lines.svg", plot=True)
    assert "keys" in (tmp_path / "lines.svg").read_text()


def test_info_names_the_machine_and_every_backend(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    for words in ("CPU", "torch", "triton", "C++ compiler", "runs this call", *BACKENDS):
        assert words in text


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"fastattn {fastattn.__version__}\n"


def test_check_passes_the_reference_and_writes_every_figure(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    path = tmp_path / "check.json"
    assert main(["check", "--backends", "reference", "--only", "^(kv0|odd|window)$", "--json", str(path), "-v"]) == 0
    text = capsys.readouterr().out
    assert "3 of 3 right" in text and "odd" in text
    rows = json.loads(path.read_text())
    assert [row["case"] for row in rows] == [name for name in CASES if name in ("kv0", "odd", "window")]
    assert all(row["ok"] and row["share"] <= 1 for row in rows)


def test_check_ends_with_1_where_a_backend_is_wrong(capsys, monkeypatch):
    from fastattn import testing

    honest = testing.run

    def wrong(problem, backend=None, **how):
        results = honest(problem, backend, **how)
        return {**results, "dk": results["dk"] * 1.05}

    monkeypatch.setattr(testing, "run", wrong)
    assert main(["check", "--backends", "reference", "--only", "^full$"]) == 1
    text = capsys.readouterr().out
    assert "0 of 1 right" in text and "dk: RMS error" in text


def test_check_runs_triton_in_a_child_with_the_interpreter(tmp_path, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    path = tmp_path / "check.json"
    main(["check", "--backends", "triton", "--device", "cpu", "--only", "^(kv0|one-by-one)$", "--json", str(path)])
    rows = json.loads(path.read_text())
    assert [row["case"] for row in rows] == ["kv0", "one-by-one"]
    assert all(row["ok"] is not False for row in rows), rows


def test_a_child_that_dies_fails_its_cases(monkeypatch, capsys):
    pytest.importorskip("triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr("sys.executable", "/bin/false")
    assert main(["check", "--backends", "triton", "--device", "cpu", "--only", "^odd$"]) == 1
    assert "the child process ended with 1" in capsys.readouterr().out


def test_check_still_takes_backends_by_their_former_option(capsys):
    assert main(["check", "--rooms", "reference", "--only", "^full$"]) == 0
    assert "1 of 1 right" in capsys.readouterr().out
    assert main(["check", "--rooms", "basement"]) == 2
    with pytest.raises(SystemExit):
        main(["check", "--help"])
    text = capsys.readouterr().out
    assert "--backends LIST" in text and "--rooms" not in text


@pytest.mark.parametrize(
    "flags, sentence", [(["--backends", "basement"], "no backend 'basement'"), (["--only", "("], "regular")]
)
def test_check_refuses_what_it_does_not_know(flags, sentence, capsys):
    try:
        code = main(["check", *flags])
    except SystemExit as exit_code:
        code = exit_code.code
    assert code == 2 and sentence in capsys.readouterr().err
