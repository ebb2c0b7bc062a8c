"""What libraries warn of is in their row, once, and not on the screen."""

import warnings

import pytest

from fastattn.bench.cases.operations import BenchCase
from fastattn.bench.measure import run
from fastattn.bench.measure.clock import Budget, CpuClock, measure
from fastattn.bench.measure.provider_warnings import LONGEST, Notices, sentence
from fastattn.bench.measure.providers.sdpa import Sdpa
from fastattn.bench.measure.rows import Row, say_warnings


@pytest.mark.parametrize(
    "message, kept",
    [
        ("cuDNN attention kernel not used because: (Triggered internally at /pytorch/aten/sdp_utils.cpp:919.)", None),
        ("Flash attention has been runtime disabled. (Triggered internally at sdp_utils_cpp.h:552.)", None),
        ("Memory Efficient attention has been runtime disabled.", None),
        ("head_dim is above 128 (Triggered internally at a (b) c.cpp:1.)", "head_dim is above 128"),
        ("Sizes must agree. Query.size: [1,\n 2]", "Sizes must agree."),
        ("  two\n  lines", "two lines"),
        ("version 2.5 is slow", "version 2.5 is slow"),
        ("", None),
        ("x" * 500, "x" * (LONGEST - 1) + "…"),
    ],
)  # fmt: skip
def test_a_warning_becomes_its_first_useful_sentence(message, kept):
    assert sentence(message) == kept


def test_a_kernel_that_pytorch_refuses_says_why_once_in_its_cell(capfd, timed):
    refused, other = timed("dropout", "fwd", ["sdpa-flash", "sdpa-math"])
    assert refused.reason.startswith("no kernel: ") and "dropout" in refused.reason and not refused.crashed
    assert len(refused.warnings) == 1 and other.timed and other.warnings == []
    assert "not used because" not in "".join(capfd.readouterr())


def warning(monkeypatch, message, when=lambda call, query: True, after=None, category=UserWarning):
    """Makes PyTorch's calls warn, and fail with `after` where there is one."""
    honest = Sdpa.make

    def make(self, workload, mode):
        made = honest(self, workload, mode)
        forward, calls = made.forward, iter(range(10**9))

        def warns(query, key, value):
            if when(next(calls), query):
                warnings.warn(message, category, stacklevel=1)
            if after is not None:
                raise after
            return forward(query, key, value)

        made.forward = warns
        return made

    monkeypatch.setattr(Sdpa, "make", make)


@pytest.mark.parametrize("mode", ["fwd", "bwd", "fwd+bwd"])
def test_who_warns_at_every_call_and_runs_has_it_once(monkeypatch, capfd, mode, timed):
    warning(monkeypatch, "A slow path is taken. Try another one.")
    ours, other = timed("self", mode, ["fastattn", "sdpa"])
    assert other.timed and other.warnings == ["A slow path is taken."] and ours.warnings == []
    assert Row.of(other.record()) == other
    assert "slow path" not in "".join(capfd.readouterr())


def test_a_warning_that_comes_while_timing_is_heard_of_whose_turn_it_is(monkeypatch):
    seen = {"a": [], "b": []}
    notices = Notices(seen)

    def call(name):
        warnings.warn(f"{name} is warm", stacklevel=1)

    with notices.listening():
        measure({name: lambda name=name: call(name) for name in seen}, CpuClock(), Budget(3, 0.0, 0.01), notices.turn)
    assert seen == {"a": ["a is warm"], "b": ["b is warm"]}


def test_only_while_timing_it_is_the_rows_too(monkeypatch, timed):
    late = []
    honest = run.measure

    def measured(*words):
        late.append(True)
        return honest(*words)

    monkeypatch.setattr(run, "measure", measured)
    warning(monkeypatch, "late", when=lambda call, query: bool(late))
    _, other = timed("self", "fwd", ["fastattn", "sdpa"])
    assert other.timed and other.warnings == ["late"]


def test_a_crash_has_the_shortest_sentence_behind_it(monkeypatch, timed):
    warning(monkeypatch, "That is so.", after=RuntimeError("CUDNN_STATUS_NOT_SUPPORTED"))
    _, other = timed("self", "fwd", ["fastattn", "sdpa"])
    assert other.reason == "RuntimeError: CUDNN_STATUS_NOT_SUPPORTED: That is so." and other.crashed


def test_what_the_tiny_case_of_the_overhead_warns_of_is_not_the_rows(monkeypatch, capfd, timed):
    warning(monkeypatch, "one query is not enough", when=lambda call, query: query.shape[2] == 1)
    _, other = timed("self", "fwd", ["fastattn", "sdpa"])
    assert other.timed and other.warnings == [] and other.overhead_us
    assert "one query" not in "".join(capfd.readouterr())


@pytest.mark.parametrize("category", [DeprecationWarning, PendingDeprecationWarning, ImportWarning])
def test_what_is_said_to_developers_is_not_kept(monkeypatch, category, timed):
    warning(monkeypatch, "old name", category=category)
    assert timed("self", "fwd", ["sdpa"])[0].warnings == []


def test_warnings_behave_as_before_afterwards(monkeypatch, timed):
    warning(monkeypatch, "now")
    shown = warnings.showwarning
    timed("self", "fwd", ["sdpa"])
    assert warnings.showwarning is shown
    with pytest.warns(UserWarning, match="again"):
        warnings.warn("again", stacklevel=1)


def test_the_table_notes_once_who_warned_and_ran(bench, monkeypatch, tmp_path):
    warning(monkeypatch, "A slow path is taken. Try another one.")
    code, text, report = bench("--op", "self,causal", "--providers", "fastattn,sdpa", "--mode", "fwd", "--md", "run.md")
    assert code == 0 and text.out.count("slow path") == 1 and "slow path" not in text.err
    assert "sdpa warned in 2 rows: A slow path is taken." in text.out
    assert [row["warnings"] for row in report["rows"] if row["provider"] == "sdpa"] == [["A slow path is taken."]] * 2
    assert "- sdpa warned in 2 rows: A slow path is taken." in (tmp_path / "run.md").read_text()


def test_who_failed_has_it_in_the_cell_alone():
    case = BenchCase("self", "bf16", 1, 1, 1, 8, 8, 8)
    rows = [
        Row(case, "fwd", "sdpa-cudnn", "cuda", reason="no kernel: too wide", warnings=["too wide"]),
        Row(case, "fwd", "flex", "cuda", samples_ms=[1.0], warnings=["slow", "odd"]),
    ]
    assert say_warnings(rows) == ["flex warned in 1 row: slow", "flex warned in 1 row: odd"]
