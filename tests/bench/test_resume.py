"""Runs of `make gpu` that go on from a file, with scripted children (scripted.py)."""

import json
import runpy
from pathlib import Path

import pytest

pytest.importorskip("rich", reason="make gpu needs rich")

from fastattn.bench.gpu import run_tests as gpu_tests
from fastattn.bench.gpu.pipeline import Run

SCRIPTED = runpy.run_path(str(Path(__file__).with_name("scripted.py")))
CELLS, FAILING, Machine, Scripted, worker, workers = (
    SCRIPTED[name] for name in ("CELLS", "FAILING", "Machine", "Scripted", "worker", "workers")
)


@pytest.fixture
def go(tmp_path, monkeypatch):
    """Runs the steps; returns the run, what it said, and the machine that was asked."""
    return SCRIPTED["runner"](tmp_path, monkeypatch)


@pytest.fixture
def whole():
    return workers([worker("self", "causal")], [worker("cross", "gqa")])


def test_resume_runs_nothing_twice_that_went_well_and_what_failed_at_last(go):
    first, *_ = go({"pytest": FAILING, **workers([worker("self", "causal")], [worker("cross", dies_in="gqa", code=1)])})
    assert len(first.record["rows"]) == 9 and first.record["steps"]["flex"]["ok"]
    again, said, machine = go({"fastattn.bench.gpu.worker": worker("gqa")}, resume="1")
    assert again.path == first.path and all(f"{name}: done before" in said for name in ("check", "headline", "flex"))
    asked = [command.split()[0] for command, _ in machine.asked]
    assert asked == ["fastattn.cli", "fastattn.cli", "pytest", "fastattn.bench.gpu.worker"]  # a build, what is here
    assert json.loads(machine.asked[-1][0].split(" ", 1)[1])["cells"] == [CELLS[3].name]
    assert len(again.record["rows"]) == 12 and False not in [step["ok"] for step in again.record["steps"].values()]
    assert [command["resume"] for command in again.record["commands"]] == [False, True]


def test_resume_first_runs_what_was_cut(go):
    slow = worker("self", "causal", "cross", "gqa", each=20.0)
    first, *_ = go({"fastattn.bench.gpu.worker": slow, "pytest": FAILING}, budget=100.0)
    assert first.record["steps"]["sweep"]["ok"] is None and first.record["steps"]["tests"]["ok"] is False
    again, said, _ = go({"fastattn.bench.gpu.worker": worker("self", "causal", "cross", "gqa")}, resume="1")
    begun = [words.split(":")[0] for words in said if ": up to" in words]
    assert begun[-1] == "tests" and begun.index("sweep") < len(begun) - 1
    assert len(again.record["rows"]) == 12


def test_tests_that_passed_are_named_to_the_next_pytest(go, monkeypatch):
    left_out = []
    go({"pytest": FAILING}, steps=("tests",))
    child = Machine.child

    def read(self, command, seconds, silence, more=None):
        left_out.append(Path(more[gpu_tests.pytest_lines.DONE]).read_text())
        return child(self, command, seconds, silence, more)

    monkeypatch.setattr(Machine, "child", read)
    go({}, steps=("tests",), resume="1")
    assert left_out == ["tests/cpu/test_attention.py::two"]


@pytest.mark.parametrize("place", ["out", "results", "kept", "named"])
def test_the_file_alone_is_enough_wherever_it_lies_and_whatever_its_name(go, tmp_path, whole, place):
    first, *_ = go(
        {**whole, "fastattn.bench.gpu.worker": worker("self", dies_in="causal", code=1)}, steps=("headline",)
    )
    carried = {"out": tmp_path, "results": tmp_path / "results", "kept": tmp_path / "kept"}.get(place, tmp_path / "x")
    carried.mkdir(exist_ok=True)
    text = first.path.read_text()
    for path in (first.path, tmp_path / "kept" / first.path.name):
        path.unlink()
    path = carried / "cpu-2020-01-01-another-name.json"
    path.write_text(text)
    resume = str(path) if place == "named" else "1"
    run, _, machine = go({"fastattn.bench.gpu.worker": worker("causal")}, steps=("headline",), resume=resume)
    assert json.loads(machine.asked[-1][0].split(" ", 1)[1])["cells"] == [CELLS[1].name]
    assert run.path == tmp_path / path.name and len(json.loads(run.path.read_text())["rows"]) == 6


def test_without_resume_a_run_begins_anew(go, whole):
    first, *_ = go(whole)
    run, said, _ = go({"fastattn.bench.gpu.worker": worker("self")}, steps=("headline",))
    assert run.path.stem == f"{first.path.stem}-2" and len(json.loads(first.path.read_text())["rows"]) == 12
    assert len(run.record["rows"]) == 3 and not any("done before" in words for words in said)


def test_nothing_to_go_on_from_is_said(go, whole):
    run, said, _ = go(whole, resume="1")
    assert said[0] == "nothing of this commit to go on from: a new run" and len(run.record["rows"]) == 12


def test_times_of_another_gpu_stay_in_their_own_file(go, whole):
    run, *_ = go(whole)
    record = json.loads(run.path.read_text())
    record["environment"]["gpu"] = "another"
    run.path.write_text(json.dumps(record))
    other = run.path.rename(run.path.with_name("another.json"))
    again, said, _ = go(
        whole | {"fastattn.bench.gpu.worker": worker("self", "causal", "cross", "gqa")}, resume=str(other)
    )
    assert "its times are of another: they are taken anew" in said and "check: done before" in said
    assert again.path == run.path and again.record["carried_from"]["gpu"] == "another"
    assert len(again.record["rows"]) == 12 and json.loads(other.read_text()) == record


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"schema": "fastattn-gpu/1"}, "has schema 'fastattn-gpu/1', this version writes 'fastattn-gpu/2'"),
        ({"environment": {"commit": "other", "device": "cpu"}}, "is a run of commit other, and this is"),
        (None, "is no file of make gpu; RESUME=1 looks for the last run of this commit"),
    ],
    ids=["schema", "commit", "no JSON"],
)
def test_a_file_that_cannot_be_gone_on_from_is_refused(go, whole, change, words):
    run, *_ = go(whole)
    record = json.loads(run.path.read_text())
    run.path.write_text("no JSON" if change is None else json.dumps(record | change))
    with pytest.raises(ValueError, match=words):
        go(whole, resume=str(run.path))


def test_a_killed_run_has_what_was_said_until_then(go, monkeypatch):
    """Each line is in the file once the child has nothing more to say."""

    class Killed(BaseException):
        pass

    def lines(self, play=Scripted.lines):
        for line in play(self):
            yield line
            run[0]._idle()
            if '"causal' in line and '"done"' in line:
                raise Killed

    run = []
    began = Run.__init__
    monkeypatch.setattr(Run, "__init__", lambda self, *given: (run.append(self), began(self, *given))[1])
    monkeypatch.setattr(Scripted, "lines", lines)
    with pytest.raises(Killed):
        go({"fastattn.bench.gpu.worker": worker("self", "causal")}, steps=("headline",))
    record = json.loads(run[0].path.read_text())
    assert len(record["rows"]) == 6 and record["steps"]["headline"] == {"ok": None, "seconds": 0.0, "words": "was cut"}
