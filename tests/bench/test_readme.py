"""The documents' figures are those of the committed measurements that they name, to the digit."""

import json
import re
import shutil
from pathlib import Path

import pytest

pytest.importorskip("rich", reason="the benchmark needs rich")

from fastattn.bench.report import doc_tables
from fastattn.bench.report.writers import read_json
from fastattn.cli import main

ROOT = Path(__file__).resolve().parent.parent.parent
SOURCES = sorted((ROOT / "bench/results").glob("*.json"))


@pytest.mark.parametrize("path", doc_tables.documents(ROOT), ids=lambda path: path.name)
def test_a_table_is_its_measurement(path):
    text = path.read_text(encoding="utf-8")
    assert doc_tables.render(text, ROOT) == text, "print it anew: fastattn bench report"


def test_the_readme_has_a_table():
    assert ROOT / "README.md" in doc_tables.documents(ROOT)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_a_measurement_can_be_read_and_was_of_a_clean_tree(path):
    rows, environment = read_json(path)
    assert rows and environment["commit"] and not environment["dirty"], "measure a clean tree"


@pytest.fixture
def checkout(tmp_path):
    """A README with a table, and its measurement."""
    (tmp_path / "bench/results").mkdir(parents=True)
    shutil.copy(SOURCES[0], tmp_path / "bench/results/one.json")

    def write(marker="<!-- table: bench/results/one.json -->", end=doc_tables.END):
        (tmp_path / "README.md").write_text(f"before\n\n{marker}\nold figures\n{end}\nafter\n")
        return tmp_path

    return write


def test_report_renders_and_check_holds(checkout, capsys):
    root = checkout()
    assert main(["bench", "report", str(root), "--check"]) == 1
    assert (
        "differs from its measurement" in capsys.readouterr().out and "old figures" in (root / "README.md").read_text()
    )
    assert main(["bench", "report", str(root)]) == 0
    text = (root / "README.md").read_text()
    _, environment = read_json(root / "bench/results/one.json")
    assert text.startswith("before\n\n<!-- table") and text.endswith("<!-- end of table -->\nafter\n")
    for words in (
        environment["date"][:10],
        environment["torch"],
        environment["commit"][:9],
        environment["cpu"],
        "| self |",
    ):
        assert words in text
    assert "old figures" not in text and main(["bench", "report", str(root), "--check"]) == 0


def test_a_busy_machine_is_said_above_its_table(checkout):
    root = checkout()
    path = root / "bench/results/one.json"
    whole = json.loads(path.read_text())
    for busy in (True, False):
        whole["environment"] |= {"busy": busy, "load_average": [7.5, 1, 1], "cores": 2}
        path.write_text(json.dumps(whole))
        main(["bench", "report", str(root)])
        assert ("busy (load 7.5 on 2 cores)" in (root / "README.md").read_text()) is busy


def test_one_figure_that_was_changed_by_hand_is_found(checkout):
    root = checkout()
    main(["bench", "report", str(root)])
    path = root / "README.md"
    path.write_text(re.sub(r"(\d) ms", r"\g<1>1 ms", path.read_text(), count=1))
    assert main(["bench", "report", str(root), "--check"]) == 1


def test_a_marker_may_pick_rows(checkout):
    root = checkout("<!-- table: bench/results/one.json only=causal/.*/fwd -->")
    main(["bench", "report", str(root)])
    text = (root / "README.md").read_text()
    assert "| causal |" in text and "| self |" not in text and "bwd" not in text


@pytest.mark.parametrize(
    "marker, end, sentence",
    [
        ("<!-- table: README.md -->", doc_tables.END, "README.md is not a run of fastattn bench"),
        ("<!-- table: bench/results/one.json -->", "", "has no end; write <!-- end of table --> below it"),
        ("<!-- table: bench/results/one.json only=nothing -->", doc_tables.END, "has no row that 'nothing' finds"),
        ("<!-- table: bench/results/one.json as=direct -->", doc_tables.END, "has no row as=direct"),
        (
            "<!-- table: bench/results/one.json as=rate -->",
            doc_tables.END,
            "as=rate is no kind of table; there are ratios",
        ),
        ("no marker", doc_tables.END, "no marked table in"),
    ],
)
def test_a_table_that_cannot_be_filled_is_a_sentence(checkout, capsys, marker, end, sentence):
    root = checkout(marker, end)
    assert main(["bench", "report", str(root)]) == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["", " as=ratios", " as=ratios only=self"])
def test_a_measurement_that_is_not_there_yet_is_said(checkout, kind):
    root = checkout(f"<!-- table: bench/results/none.json{kind} -->")
    assert main(["bench", "report", str(root)]) == 0
    assert "Not measured yet: `bench/results/none.json` is not there." in (root / "README.md").read_text()
    assert main(["bench", "report", str(root), "--check"]) == 0


GPU = ROOT / "bench/results/h200-2026-11-27.json"


@pytest.mark.parametrize(
    "kind, words",
    [
        ("rates", "| causal | bf16  B1 H16 N16384 D128 | fwd | 419 | 639 |"),
        ("direct", "| causal | bf16  B1 H16 N16384 D128 | fwd | fastattn-cuda | 610 | sdpa-cudnn | 542 | 1.13x |"),
    ],
)
def test_a_gpu_table_is_its_measurement(checkout, kind, words):
    """And differs once the measurement does."""
    root = checkout(f"<!-- table: bench/results/one.json as={kind} only=causal/.*N16384-D128/fwd -->")
    path = root / "bench/results/one.json"
    whole = json.loads(GPU.read_text())
    whole["rows"] = [row for row in whole["rows"] if row["provider"] != "fastattn-cuda"]
    path.write_text(json.dumps(whole))
    assert main(["bench", "report", str(root)]) == 0
    assert words in (root / "README.md").read_text() and "NVIDIA H200 · torch" in (root / "README.md").read_text()
    assert main(["bench", "report", str(root), "--check"]) == 0
    for row in whole["rows"]:
        row["samples_ms"] = [2 * each for each in row["samples_ms"]]
    for entry in whole["direct"]:
        entry["baseline_tflops"] += 1
    path.write_text(json.dumps(whole))
    assert main(["bench", "report", str(root), "--check"]) == 1


def test_a_cell_that_was_timed_twice_has_two_lines(checkout):
    root = checkout("<!-- table: bench/results/one.json as=rates only=truncated.*triton -->")
    shutil.copy(GPU, root / "bench/results/one.json")
    assert main(["bench", "report", str(root)]) == 0
    lines = [line for line in (root / "README.md").read_text().splitlines() if line.startswith("| truncated")]
    assert [line.split(" | ")[-1] for line in lines] == ["341 |", "338 |"]


def test_a_run_of_make_gpu_is_read_too(checkout):
    root = checkout()
    path = root / "bench/results/one.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "schema": "fastattn-gpu/1", "steps": {}}))
    assert main(["bench", "report", str(root)]) == 0
