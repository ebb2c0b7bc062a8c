"""For the tests of `make gpu`: scripted children on a clock that moves when they say so."""

import json
from dataclasses import dataclass, field

from fastattn.bench.cases.operations import BenchCase
from fastattn.bench.cases.suites import Cell
from fastattn.bench.gpu import cells as gpu_cells
from fastattn.bench.gpu import resume, steps
from fastattn.bench.gpu.child import Ending
from fastattn.bench.gpu.pipeline import Run, Settings
from fastattn.bench.measure.rows import Row


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
    stack: tuple = ()


@dataclass
class Scripted:
    """Stands for `Child`: plays a script, stopped when its seconds are over."""

    script: Script
    seconds: float
    clock: Clock
    ending: Ending | None = None

    def stop(self):
        """It has come to its end."""

    def lines(self):
        until = self.clock() + self.seconds
        for line in self.script.lines:
            if self.clock() + self.script.each > until:
                self.clock.seconds = until
                self.ending = Ending(None, f"took longer than {self.seconds:.0f} s", ())
                return
            self.clock.seconds += self.script.each
            yield line if isinstance(line, str) else json.dumps(line)
        self.ending = Ending(self.script.code, self.script.words, ("the last line",), self.script.stack)


CELLS = [Cell(BenchCase(op, "fp32", 1, 1, 1, 8, 8, 8), "fwd") for op in ("self", "causal", "cross", "gqa")]


def row_of(cell, provider="fastattn", milliseconds=1.0, **more):
    return Row(cell.case, cell.mode, provider, "cpu", samples_ms=[milliseconds] * 3, correct=True, **more).record()


def worker(*names, code=0, dies_in=None, each=1.0, words="was killed by SIGSEGV", stack=()):
    """A worker that times these cells, then dies in another."""
    lines = []
    for cell in CELLS:
        if cell.name.split("/")[0] in names:
            rows = [row_of(cell), row_of(cell, "sdpa", 2.0), row_of(cell, "flex", 1.5)]
            lines += [{"begin": cell.name}, "a warning of some library", {"done": cell.name, "rows": rows}]
        if cell.name.split("/")[0] == dies_in:
            lines += [{"begin": cell.name}, {"at": "fastattn"}]
    return Script(lines, code, each, words if code else "", stack)


def said_of(name, outcome="passed", words="", stack=()):
    return {"test": f"tests/cpu/test_attention.py::{name}", "outcome": outcome, "seconds": 0.1, "words": words} | {
        "stack": list(stack)
    }


def check_lines(backend, *ok):
    """A row for each case; None where it is refused."""
    rows = [{"room": backend, "case": case, "ok": each, "words": None} for case, each in zip(CASES, ok, strict=True)]
    return Script([line for row in rows for line in ({"begin": row["case"]}, {"done": row["case"], "row": row})])


CASES = ("causal", "bias")
PYTEST = Script([{"begin": "tests/cpu/test_attention.py::one"}, said_of("one"), ". [100%]", said_of("two")])
SMOKE = Script([{"difference": 0.01, "ok": True}])
GOOD = {
    "fastattn.cli build": Script([]),
    "fastattn.cli info": Script(["machine"]),
    "fastattn.bench.gpu.smoke": SMOKE,
    "pytest": PYTEST,
    "fastattn.cli check --device cpu --backends cpu": check_lines("cpu", True, None),
    "fastattn.cli check --device cpu --backends reference": check_lines("reference", True, True),
}


@dataclass
class Machine:
    """Hands out scripts by the words of the command; a list plays one after the other."""

    scripts: dict
    clock: Clock = field(default_factory=Clock)
    asked: list = field(default_factory=list)

    def child(self, command, seconds, silence, more=None, under=()):
        command = [*under, *command]
        self.asked.append((" ".join(command), seconds))
        name = next(name for name in self.scripts if " ".join(command).startswith(name))
        script = self.scripts[name]
        return Scripted(script.pop(0) if isinstance(script, list) else script, seconds, self.clock)


def workers(headline, sweep, flex=None):
    """The workers of the three steps that time cells; flex times the first cell."""
    return {"fastattn.bench.gpu.worker": [*headline, *sweep, *(flex or [worker("self")])]}


FAILING = Script(
    [said_of("one", "failed", "AssertionError: 1 is not 2\nmore (a.py:3)"), said_of("two")], 1, words="ended with 1"
)


def runner(tmp_path, monkeypatch):
    """What runs the steps, threads one after the other, and returns the run, what it said, and the machine."""
    monkeypatch.setattr(gpu_cells, "suite", lambda device: CELLS)
    monkeypatch.setattr(gpu_cells, "headline", lambda device: CELLS[:2])
    monkeypatch.setattr(steps, "CASES", dict.fromkeys(CASES))
    monkeypatch.setattr(resume, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(resume, "KEPT", tmp_path / "kept")

    def run(scripts, **settings):
        machine = Machine({**GOOD, **scripts})
        said = []
        run = Run(Settings(**{"device": "cpu", "out": tmp_path, **settings}), said.append, machine.clock)
        run.child = machine.child
        run.together = lambda *works: [work() for work in works]
        run.steps()
        return run, said, machine

    return run
