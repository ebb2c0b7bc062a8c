"""`make gpu` without a GPU: scripted children on a clock that moves when they say so."""

import json
from dataclasses import dataclass, field

import pytest

pytest.importorskip("rich", reason="make gpu needs rich")

from rich.console import Console

from fastattn.bench import pipeline, steps
from fastattn.bench.child import Ending
from fastattn.bench.pipeline import LAST_WORDS, Run, Settings
from fastattn.bench.rows import Row
from fastattn.bench.suite import Cell, suite
from fastattn.bench.summary import best_two, failures, print_summary
from fastattn.bench_cases import BenchCase


@dataclass
class Clock:
    seconds: float = 0.0

    def __call__(self):
        return self.seconds


@dataclass
class Script:
    """What a child says, how long each line takes, and how it ends."""

    lines: list
    code: int | None = 0
    each: float = 1.0
    words: str = ""


@dataclass
class Scripted:
    """Stands for `Child`: plays a script, stopped when its seconds are over."""

    script: Script
    seconds: float
    clock: Clock
    ending: Ending | None = None

    def lines(self):
        until = self.clock() + self.seconds
        for line in self.script.lines:
            if self.clock() + self.script.each > until:
                self.clock.seconds = until
                self.ending = Ending(None, f"took longer than {self.seconds:.0f} s", ())
                return
            self.clock.seconds += self.script.each
            yield line if isinstance(line, str) else json.dumps(line)
        self.ending = Ending(self.script.code, self.script.words, ("the last line",))


CELLS = [Cell(BenchCase(op, "fp32", 1, 1, 1, 8, 8, 8), "fwd") for op in ("self", "causal", "cross", "gqa")]


def row_of(cell, provider="fastattn", milliseconds=1.0, **more):
    return Row(cell.case, cell.mode, provider, "cpu", samples_ms=[milliseconds] * 3, correct=True, **more).record()


def worker(*names, code=0, dies_in=None, each=1.0, left=()):
    """A worker that times these cells, then dies in another."""
    lines = []
    for cell in CELLS:
        if cell.name.split("/")[0] in names:
            rows = [row_of(cell), row_of(cell, "sdpa", 2.0), row_of(cell, "flex", 1.5)]
            lines += [{"begin": cell.name}, "a warning of some library", {"cell": cell.name, "rows": rows}]
        if cell.name.split("/")[0] == dies_in:
            lines.append({"begin": cell.name})
    if left:
        lines.append({"left": list(left)})
    return Script(lines, code, each, "was killed by SIGSEGV" if code else "")


PYTEST = Script(["tests/a.py::test_one PASSED [ 50%]", "[gw0] [100%] PASSED tests/a.py::test_two[x y] "])
CHECK = Script([{"room": "triton", "case": "causal", "ok": True, "words": None}])
GOOD = {
    "fastattn.cli build": Script([]),
    "fastattn.cli info": Script(["machine"]),
    "pytest": PYTEST,
    "fastattn.cli check": CHECK,
}


@dataclass
class Machine:
    """Hands out scripts by the words of the command; a list plays one after the other."""

    scripts: dict
    clock: Clock = field(default_factory=Clock)
    asked: list = field(default_factory=list)

    def child(self, command, seconds, more=None):
        self.asked.append((" ".join(command), seconds))
        name = next(name for name in self.scripts if " ".join(command).startswith(name))
        script = self.scripts[name]
        return Scripted(script.pop(0) if isinstance(script, list) else script, seconds, self.clock)


@pytest.fixture
def go(tmp_path, monkeypatch):
    """Runs the steps; returns the run and what it said."""
    monkeypatch.setattr(steps, "suite", lambda device: CELLS)

    def run(scripts, **settings):
        machine = Machine({**GOOD, **scripts})
        said = []
        run = Run(Settings(device="cpu", out=tmp_path, **settings), said.append, machine.clock)
        run.child = machine.child
        run.steps()
        return run, said, machine

    return run


WHOLE = {"fastattn.bench.worker": worker("self", "causal", "cross", "gqa")}


def test_all_is_well_and_in_one_file(go):
    run, said, _ = go(WHOLE)
    record = json.loads(run.path.read_text())
    assert [name for name, step in record["steps"].items() if step["ok"]] == list(pipeline.STEPS)
    assert record["tests"] == {"passed": 2, "skipped": 0, "failed": {}}
    assert len(record["rows"]) == 12 and record["left"] == [] and record["crashed"] == {}
    assert "[4/4] gqa/fp32/B1-H1-N8-D8/fwd" in said
    assert record["environment"]["device"] == "cpu" and record["schema"] == pipeline.SCHEMA


def test_a_worker_that_dies_costs_its_cell_alone(go):
    run, *_ = go({"fastattn.bench.worker": [worker("self", dies_in="causal", code=-11), worker("cross", "gqa")]})
    assert run.record["crashed"] == {CELLS[1].name: "was killed by SIGSEGV: the last line"}
    assert {row["op"] for row in run.record["rows"]} == {"self", "cross", "gqa"}
    assert run.record["steps"]["bench"]["ok"] is False and "1 crashed" in run.record["steps"]["bench"]["words"]


def test_a_worker_whose_device_broke_costs_no_cell_that_it_did_not_begin(go):
    scripts = [worker("self", code=70), worker("causal", code=70), worker("cross", "gqa")]
    run, *_ = go({"fastattn.bench.worker": scripts})
    assert run.record["crashed"] == {} and len(run.record["rows"]) == 12


def test_a_worker_that_dies_before_it_begins_is_not_asked_for_ever(go):
    run, _, machine = go({"fastattn.bench.worker": Script([], 1, words="ended with 1")})
    assert len(run.record["crashed"]) == len(CELLS)
    assert sum("worker" in command for command, _ in machine.asked) == len(CELLS)


def test_a_budget_that_ends_keeps_what_there_is_and_is_no_failure(go):
    run, _, machine = go({"fastattn.bench.worker": worker("self", "causal", "cross", "gqa", each=20.0)}, budget=120.0)
    assert 0 < len(run.record["rows"]) < 12 and run.record["left"]
    assert run.record["steps"]["bench"]["ok"] is None
    assert machine.clock() <= 120.0 + steps.AFTER_THE_END


def test_each_step_takes_its_share_at_most(go):
    slow = Script(["x"] * 1000, each=1.0)
    _, _, machine = go({"fastattn.cli build": slow, "pytest": slow, "fastattn.cli check": slow, **WHOLE}, budget=200.0)
    given = {command.split(" -")[0].split(" {")[0]: seconds for command, seconds in machine.asked}
    assert given["fastattn.cli build"] == pytest.approx(30) and given["pytest"] == pytest.approx(60)
    assert given["fastattn.cli check"] == pytest.approx(30)
    assert given["fastattn.bench.worker"] == pytest.approx(200 - LAST_WORDS - 120 + steps.AFTER_THE_END)


def test_a_step_alone_may_take_it_all(go):
    _, _, machine = go({}, steps=("test",), budget=200.0)
    assert machine.asked[0][1] == pytest.approx(200 - LAST_WORDS)


def test_what_does_not_fit_any_more_is_said_not_tried(go):
    slow = {"fastattn.cli build": Script(["x"], each=4.0), "pytest": Script(["x"], each=99.0)}
    run, *_ = go({**slow, "fastattn.cli check": Script(["x"], each=99.0)}, budget=LAST_WORDS + 0.5)
    assert "not reached" in run.record["steps"]["bench"]["words"] and run.record["steps"]["bench"]["ok"] is None


FAILING = Script(
    [
        "tests/a.py::test_one FAILED [ 50%]",
        "tests/a.py::test_two PASSED [100%]",
        "FAILED tests/a.py::test_one - AssertionError: 1 is not 2",
    ],
    1,
    words="ended with 1",
)


def test_failed_tests_wrong_results_and_crashes_come_first_ratios_last(go, capsys):
    check = Script([{"room": "triton", "case": "bias", "ok": False, "words": "dq is off"}], 1, words="ended with 1")
    wrong = worker("self")
    wrong.lines.insert(0, {"cell": CELLS[1].name, "rows": [row_of(CELLS[1]) | {"correct": False}]})
    scripts = {"pytest": FAILING, "fastattn.cli check": check, "fastattn.bench.worker": [wrong, worker("cross", "gqa")]}
    run, *_ = go(scripts)
    assert failures(run.record)["tests"] == ["tests/a.py::test_one: AssertionError: 1 is not 2"]
    print_summary(Console(width=110, highlight=False, markup=False), run.record)
    said = capsys.readouterr().out
    order = ["✗ test", "test_one: AssertionError", "triton, bias: dq is off", "causal/fp32", "1.50x", "on average"]
    places = [said.index(words) for words in order]
    assert places == sorted(places)
    assert len(said.splitlines()) < 40


def test_what_another_library_does_wrong_is_noted_and_no_failure(go, capsys):
    script = worker("self", "cross", "gqa")
    wrong = row_of(CELLS[1], "flex") | {"correct": False, "samples_ms": [], "reason": "wrong: dq"}
    script.lines.insert(0, {"cell": CELLS[1].name, "rows": [row_of(CELLS[1]), wrong]})
    run, *_ = go({"fastattn.bench.worker": script})
    assert run.record["steps"]["bench"]["ok"] is True and not any(failures(run.record).values())
    print_summary(Console(width=110, highlight=False, markup=False), run.record)
    assert "· causal/fp32/B1-H1-N8-D8/fwd/flex: wrong: dq" in capsys.readouterr().out


def test_ties_are_called_ties_and_a_busy_machine_is_said(go, capsys):
    script = worker("self", "causal", "gqa")
    even = [row_of(CELLS[2]) | {"samples_ms": [1.0, 1.1, 0.9, 1.0]}, row_of(CELLS[2], "sdpa", 1.0)]
    script.lines.insert(0, {"cell": CELLS[2].name, "rows": even})
    run, *_ = go({"fastattn.bench.worker": script})
    run.record["environment"] |= {"busy": True, "load_average": [7.5, 1, 1], "cores": 2}
    print_summary(Console(width=110, highlight=False, markup=False), run.record)
    said = capsys.readouterr().out
    assert "≈1.00x" in said and said.count("1.50x") == 4 and "busy (load 7.5 on 2 cores)" in said


def test_the_best_other_is_the_fastest_that_is_not_ours():
    rows = [Row.of(row_of(CELLS[0], name, time)) for name, time in (("fastattn", 2.0), ("sdpa", 3.0), ("flex", 1.0))]
    rows.append(Row.of(row_of(CELLS[0], "fastattn-triton", 0.1)))
    ours, best = best_two(rows)
    assert (ours.provider, best.provider) == ("fastattn", "flex")
    assert best_two(rows[1:2]) == (None, rows[1])


def test_resume_goes_on_where_a_run_stopped(go):
    first, *_ = go({"pytest": FAILING, "fastattn.bench.worker": worker("self", left=[c.name for c in CELLS[1:]])})
    assert len(first.record["rows"]) == 3 and len(first.record["left"]) == 3
    again, said, machine = go({"fastattn.bench.worker": worker("causal", "cross", "gqa")}, resume=True)
    assert again.path == first.path and "check: done before" in said and "build: done before" in said
    assert [command.split()[0] for command, _ in machine.asked] == ["pytest", "fastattn.bench.worker"]
    task = json.loads(machine.asked[-1][0].split(" ", 1)[1])
    assert task["cells"] == [cell.name for cell in CELLS[1:]]
    assert len(again.record["rows"]) == 12 and all(step["ok"] for step in again.record["steps"].values())


def test_without_resume_a_run_begins_anew(go):
    go(WHOLE)
    run, said, _ = go({"fastattn.bench.worker": worker("self", left=[c.name for c in CELLS[1:]])})
    assert len(run.record["rows"]) == 3 and not any("done before" in words for words in said)


def test_a_file_of_another_schema_is_refused(go):
    run, *_ = go(WHOLE)
    run.path.write_text(json.dumps({"schema": "fastattn-gpu/0"}))
    with pytest.raises(ValueError, match=r"has schema 'fastattn-gpu/0', this version writes 'fastattn-gpu/1'"):
        go(WHOLE, resume=True)


def test_tuning_names_the_row_to_paste_or_says_that_it_stays(go, capsys):
    line = {
        "kernel": "fwd",
        "head_dim": 64,
        "mask": "full",
        "table": "A",
        "table_ms": 2.0,
        "tflops": 1.0,
        "reason": None,
    }
    other = line | {"head_dim": 128}
    lines = [line | {"row": "A", "ms": 2.0}, line | {"row": "B", "ms": 1.0}, line | {"row": "C", "ms": None}]
    lines += [other | {"row": "A", "ms": 2.0}, other | {"row": "B", "ms": 1.99}]
    run, said, _ = go({"fastattn.kernels.tune": Script(lines)}, steps=("tune",))
    assert run.record["steps"]["tune"]["words"] == "4 rows timed, 1 refused" and "2.00x: full B" in said[2]
    print_summary(Console(width=110, highlight=False, markup=False), run.record)
    said = capsys.readouterr().out.splitlines()
    assert said[said.index("fwd d64 full: 1 TFLOP/s, 2.00x the table's row") + 1].strip() == "B,"
    assert said[said.index("fwd d128 full: 1 TFLOP/s, 1.01x the table's row") + 1].strip() == "the row stays"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["tests"], "step 'tests' is not known; there are build, test, check, bench, tune; did you mean 'test'?"),
        (["--budget", "3"], "BUDGET must be more than 5 seconds, got 3"),
        (["--peers", "nowhere"], "PEERS=nowhere is no folder"),
    ],
)
def test_a_wrong_command_line_is_a_sentence(flags, words, capsys):
    assert pipeline.main(["--device", "cpu", *flags]) == pipeline.USAGE
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_suite_has_every_cell_once_and_the_first_ones_tell_most(device):
    cells = suite(device)
    assert len({cell.name for cell in cells}) == len(cells)
    assert {cell.mode for cell in cells[:6]} == {"fwd", "bwd"}
    assert len({cell.case.op for cell in cells[:12]}) >= 3


def test_one_real_cell_from_a_real_worker(tmp_path, monkeypatch):
    """The child's side and the parent's, on the CPU."""
    cell = Cell(BenchCase("causal", "fp32", 1, 2, 2, 64, 64, 16), "fwd")
    line = "import sys; from fastattn.bench import suite, worker; from fastattn.bench_cases import BenchCase; "
    line += "worker.suite = lambda device: [suite.Cell(BenchCase('causal', 'fp32', 1, 2, 2, 64, 64, 16), 'fwd')]; "
    line += "sys.exit(worker.main(sys.argv[1:]))"
    monkeypatch.setattr(steps, "suite", lambda device: [cell])
    run = Run(Settings(device="cpu", out=tmp_path, budget=100.0, steps=("bench",)), lambda words: None)
    started = run.child

    def child(command, seconds, more=None):
        made = started(command, seconds)
        made.command = [made.command[0], "-c", line, command[-1]]
        return made

    run.child = child
    run.steps()
    assert run.record["steps"]["bench"] == {"ok": True, "seconds": pytest.approx(0, abs=90), "words": "1 of 1 cells"}
    assert [row["provider"] for row in run.record["rows"]] == ["fastattn", "sdpa"]
    assert all(row["correct"] and row["median_ms"] > 0 for row in run.record["rows"])
