"""Pictures over length: logarithms, shaded quartiles, the measured roofline dashed."""

import dataclasses

import pytest
import torch

pytest.importorskip("matplotlib")

from matplotlib.figure import Figure

from fastattn.bench.cases.operations import BenchCase
from fastattn.bench.measure import roofline
from fastattn.bench.measure.rows import Row
from fastattn.bench.report.plot import draw

CEILINGS = {"tflops": {"bf16": 800.0}, "gb_per_s": 4000.0}
MACHINE = {
    "gpu": "a GPU", "cpu": "", "threads": 1, "torch": "2", "python": "3", "fastattn": "0", "commit": None, "dirty": None
}  # fmt: skip


def row(length, provider, rate, q_len=None, device="cuda", mode="fwd", **sizes):
    """One that reaches `rate` useful TFLOP/s."""
    case = BenchCase("causal", "bf16", 1, 16, 16, q_len or length, length, 128)
    case = dataclasses.replace(case, **sizes)
    flops = 2 * 2 * 16 * 128 * case.q_len * length
    milliseconds = flops / rate / 1e9
    samples = [milliseconds * factor for factor in (0.9, 1.0, 1.2)]
    return Row(case, mode, provider, device, samples_ms=samples, useful_flops=flops, least_bytes=8 * length * 128 * 16)


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """Draws rows; gives the panels and writes the picture."""
    figures = []
    honest = Figure.savefig

    def savefig(self, *words, **more):
        figures.append(self)
        honest(self, *words, **more)

    monkeypatch.setattr(Figure, "savefig", savefig)

    def of(rows, **environment):
        draw([tmp_path / "p.png"], rows, {**MACHINE, **environment})
        assert (tmp_path / "p.png").stat().st_size > 5000
        return figures[-1].axes

    return of


ROWS = [row(length, name, rate) for length in (1024, 4096, 16384) for name, rate in (("fastattn", 600), ("sdpa", 300))]


def test_lines_over_a_logarithm_with_shaded_quartiles(drawn):
    [panel] = drawn(ROWS)
    assert panel.get_xscale() == "log" and [text.get_text() for text in panel.get_xticklabels()] == ["1k", "4k", "16k"]
    assert len(panel.lines) == 2 and len(panel.collections) == 2, "a band a line"
    assert list(panel.lines[0].get_ydata()) == pytest.approx([600] * 3)
    names = {text.get_text() for text in panel.texts}
    assert {"fastattn", "sdpa"} <= names and "roofline" not in names
    assert panel.get_ylabel() == "useful TFLOP/s"


def test_the_roofline_is_dashed_and_above_all_lines(drawn):
    [panel] = drawn(ROWS, ceilings=CEILINGS)
    [dashed] = [line for line in panel.lines if line.is_dashed()]
    assert max(dashed.get_ydata()) == 800.0
    assert "roofline" in {text.get_text() for text in panel.texts}


def test_each_line_has_its_own_panel_that_says_its_sizes(drawn):
    windows = [
        row(length, "sdpa", 1.0, op="truncated", window=window) for window in (32, 64) for length in (128, 256, 512)
    ]
    share = [row(length, "sdpa", 1.0, op="truncated", dtype="fp32", window=length // 4) for length in (128, 256)]
    panels = [panel for panel in drawn(windows + share) if panel.axison]
    assert [panel.get_title(loc="left") for panel in panels] == ["truncated, fwd"] * 3
    assert [panel.get_title(loc="right") for panel in panels] == [
        "bf16  B1 H16 D128 W32", "bf16  B1 H16 D128 W64", "fp32  B1 H16 D128"
    ]  # fmt: skip
    assert [len(panel.lines[0].get_xdata()) for panel in panels] == [3, 3, 2]


def test_a_mode_that_an_operation_did_not_run_in_is_no_panel(drawn):
    bars = [row(128, "sdpa", 1.0), row(128, "sdpa", 1.0, mode="bwd"), row(128, "sdpa", 1.0, op="decode")]
    panels = drawn(bars)
    assert [panel.axison for panel in panels] == [True, True, True, False]
    assert (
        panels[1].get_xlabel()
        and panels[2].get_xlabel()
        and panels[0].get_title(loc="right") == "bf16  B1 H16 N128 D128"
    )


def test_slow_machines_are_drawn_in_gflops_and_ticks_are_never_lonely(drawn):
    rates = ((128, 0.02), (256, 0.03), (512, 0.05))
    [panel] = drawn([row(length, "fastattn", rate, device="cpu") for length, rate in rates])
    assert panel.get_ylabel() == "useful GFLOP/s"
    assert {tick.get_text() for tick in panel.get_yticklabels()} >= {"20", "50"}
    low, high = panel.get_ylim()
    assert sum(low <= tick <= high for tick in panel.get_yticks()) >= 2


def test_a_row_of_few_operations_a_byte_is_bounded_by_memory():
    decode, prefill = row(16384, "sdpa", 1.0, q_len=1), row(16384, "sdpa", 300.0)
    assert roofline.attainable(prefill, CEILINGS) == 800.0
    assert roofline.attainable(decode, CEILINGS) == pytest.approx(4.0 * decode.useful_flops / decode.least_bytes)
    assert roofline.attainable(prefill, {"tflops": {}, "gb_per_s": 1.0}) is None


def test_ceilings_are_measured(monkeypatch):
    monkeypatch.setattr(roofline, "PRODUCT", {"cpu": 64})
    monkeypatch.setattr(roofline, "COPY_BYTES", {"cpu": 1 << 20})
    monkeypatch.setattr(roofline, "BUDGET", roofline.Budget(3, 0.001, 0.01))
    found = roofline.ceilings(["fp32"], torch.device("cpu"))
    assert 1e-6 < found["tflops"]["fp32"] < 1e3 and 0.01 < found["gb_per_s"] < 1e5
