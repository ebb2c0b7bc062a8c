"""`make gpu` without a GPU: scripted children on a clock that moves when they say so."""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path

import pytest

pytest.importorskip("rich", reason="make gpu needs rich")

from rich.console import Console

from fastattn.bench import earlier, gpu_cells, gpu_tests, pipeline, steps, summary
from fastattn.bench.child import Ending
from fastattn.bench.gpu_children import AFTER_THE_END
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


def check_lines(room, *ok):
    """A row for each case; None where it is refused."""
    rows = [{"room": room, "case": case, "ok": each, "words": None} for case, each in zip(CASES, ok, strict=True)]
    return Script([line for row in rows for line in ({"begin": row["case"]}, {"done": row["case"], "row": row})])


CASES = ("causal", "bias")
PYTEST = Script([{"begin": "tests/cpu/test_attention.py::one"}, said_of("one"), ". [100%]", said_of("two")])
SMOKE = Script([{"difference": 0.01, "ok": True}])
GOOD = {
    "fastattn.cli build": Script([]),
    "fastattn.cli info": Script(["machine"]),
    "fastattn.bench.smoke": SMOKE,
    "pytest": PYTEST,
    "fastattn.cli check --device cpu --rooms cpu": check_lines("cpu", True, None),
    "fastattn.cli check --device cpu --rooms reference": check_lines("reference", True, True),
}


@dataclass
class Machine:
    """Hands out scripts by the words of the command; a list plays one after the other."""

    scripts: dict
    clock: Clock = field(default_factory=Clock)
    asked: list = field(default_factory=list)

    def child(self, command, seconds, silence, more=None):
        self.asked.append((" ".join(command), seconds))
        name = next(name for name in self.scripts if " ".join(command).startswith(name))
        script = self.scripts[name]
        return Scripted(script.pop(0) if isinstance(script, list) else script, seconds, self.clock)


@pytest.fixture
def go(tmp_path, monkeypatch):
    """Runs the steps, threads one after the other; returns the run and what it said."""
    monkeypatch.setattr(gpu_cells, "suite", lambda device: CELLS)
    monkeypatch.setattr(gpu_cells, "HEADLINE", 2)
    monkeypatch.setattr(steps, "CASES", dict.fromkeys(CASES))
    monkeypatch.setattr(earlier, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(earlier, "KEPT", tmp_path / "kept")

    def run(scripts, **settings):
        machine = Machine({**GOOD, **scripts})
        said = []
        run = Run(Settings(**{"device": "cpu", "out": tmp_path, **settings}), said.append, machine.clock)
        run.child = machine.child
        run.together = lambda *works: [work() for work in works]
        run.steps()
        return run, said, machine

    return run


def workers(headline, sweep, flex=None):
    """The workers of the three steps that time cells; flex times the first cell."""
    return {"fastattn.bench.worker": [*headline, *sweep, *(flex or [worker("self")])]}


@pytest.fixture
def whole():
    return workers([worker("self", "causal")], [worker("cross", "gqa")])


def test_all_is_well_and_in_one_file(go, whole):
    run, said, machine = go(whole)
    record = json.loads(run.path.read_text())
    ran = [name for name, step in record["steps"].items() if step["ok"]]
    assert ran == ["build", "smoke", "check", "headline", "tests", "sweep", "flex"]
    assert list(record["steps"]) == list(pipeline.STEPS) and not any(failures(record).values())
    assert record["smoke"]["cpu"]["difference"] == 0.01
    assert record["steps"]["check"]["words"] == "3 right, 0 wrong, 1 refused"
    assert [test["outcome"] for test in record["tests"]["tests"]["tests"].values()] == ["passed", "passed"]
    assert len(record["rows"]) == 12 and len(record["flex"]) == 3 and not any(record["left"].values())
    assert any(words.startswith("[2/2] gqa/fp32/B1-H1-N8-D8/fwd: fastattn 1 ms, sdpa 2 ms") for words in said)
    assert record["environment"]["device"] == "cpu" and record["schema"] == pipeline.SCHEMA
    assert [command.split()[0] for command, _ in machine.asked][-1] == "fastattn.bench.worker"


def test_a_worker_that_dies_costs_its_cell_alone_and_a_hang_says_where(go):
    stack = ("synchronize.py:1083 in synchronize",)
    hung = worker("self", dies_in="causal", code=1, words="hung", stack=stack)
    run, *_ = go(workers([hung], [worker(dies_in="cross", code=-11), worker("gqa")]))
    crashed = run.record["crashed"]
    assert crashed["headline"][CELLS[1].name]["words"] == "hung: synchronize.py:1083 in synchronize (fastattn)"
    assert crashed["headline"][CELLS[1].name]["stack"] == list(stack)
    assert crashed["sweep"][CELLS[2].name]["words"] == "was killed by SIGSEGV: the last line (fastattn)"
    assert {row["op"] for row in run.record["rows"]} == {"self", "gqa"}
    assert run.record["steps"]["sweep"] == {"ok": False, "seconds": 5.0, "words": "2 of 2 cells, 1 crashed or hung"}


def test_a_worker_whose_device_broke_costs_no_cell_that_it_did_not_begin(go):
    run, *_ = go(workers([worker("self", code=70), worker("causal", code=70)], [worker("cross", "gqa")]))
    assert not any(run.record["crashed"].values()) and len(run.record["rows"]) == 12


def test_a_worker_that_dies_before_it_begins_is_not_asked_for_ever(go):
    run, _, machine = go({"fastattn.bench.worker": Script([], 1, words="ended with 1")}, steps=("headline", "sweep"))
    assert sum(map(len, run.record["crashed"].values())) == len(CELLS)
    assert sum("bench.worker" in command for command, _ in machine.asked) == len(CELLS)


def test_a_provider_that_hung_twice_is_left_out(go, monkeypatch):
    monkeypatch.setattr(gpu_cells, "HEADLINE", 4)
    hung = [worker(dies_in=op, code=1, words="hung", stack=("x.py:1 in f",)) for op in ("self", "causal")]
    run, _, machine = go({"fastattn.bench.worker": [*hung, worker("cross", "gqa")]}, steps=("headline",))
    providers = [json.loads(command.split(" ", 1)[1])["providers"] for command, _ in machine.asked]
    assert providers == [["fastattn", "sdpa"], ["fastattn", "sdpa"], ["sdpa"]]
    assert "without fastattn, which hung 2 times" in run.record["steps"]["headline"]["words"]


def test_a_backend_whose_smallest_call_fails_is_noted_first_and_left_out(go, capsys, whole):
    bad = Script(["Traceback"], 1, words="hung", stack=("synchronize.py:1083 in synchronize",))
    run, _, machine = go({**whole, "fastattn.bench.smoke": [bad, SMOKE]})
    assert run.record["smoke"]["cpu"]["words"] == "hung: synchronize.py:1083 in synchronize"
    asked = [command for command, _ in machine.asked]
    assert not any("--rooms cpu" in command for command in asked) and not any("pytest" in command for command in asked)
    tasks = [json.loads(command.split(" ", 1)[1]) for command in asked if "bench.worker" in command]
    assert all("fastattn" not in task["providers"] for task in tasks)
    print_summary(Console(width=110, highlight=False, markup=False), run.record)
    said = capsys.readouterr().out.splitlines()
    assert any(line.startswith("✗ cpu's smallest call: hung") for line in said[:5])


def test_a_smallest_call_that_is_wrong_says_by_how_much(go):
    run, *_ = go({"fastattn.bench.smoke": [SMOKE, Script([{"difference": 2.0, "ok": False}], 1)]}, steps=("smoke",))
    assert run.record["smoke"]["reference"]["words"] == "off by 2"
    assert run.record["steps"]["smoke"] == {"ok": False, "seconds": 2.0} | {
        "words": "cpu off by 0.01, reference fails and is left out"
    }


def test_a_check_that_hangs_costs_its_case_alone(go):
    hung = Script([{"begin": "causal"}], 1, words="hung", stack=("x.py:1 in f",))
    rest = check_lines("cpu", True, True)
    rest.lines = rest.lines[2:]
    run, *_ = go({"fastattn.cli check --device cpu --rooms cpu": [hung, rest]}, steps=("check",))
    rows = {(row["room"], row["case"]): row for row in run.record["checks"]}
    assert rows["cpu", "causal"]["words"] == "hung: x.py:1 in f" and rows["cpu", "bias"]["ok"]
    assert len(rows) == 4 and run.record["steps"]["check"]["words"] == "3 right, 1 wrong, 0 refused"


def test_a_budget_that_ends_keeps_what_there_is_and_is_no_failure(go):
    slow = {"fastattn.bench.worker": worker("self", "causal", "cross", "gqa", each=8.0)}
    run, _, machine = go(slow, budget=120.0, steps=("headline", "sweep"))
    assert 0 < len(run.record["rows"]) < 12 and run.record["left"]["sweep"]
    assert run.record["steps"]["sweep"]["ok"] is None
    assert machine.clock() <= 120.0 + AFTER_THE_END


def test_each_step_takes_its_share_at_most_and_the_set_up_counts(go):
    slow = Script(["x"] * 1000, each=1.0)
    scripts = dict.fromkeys(GOOD, slow) | {"fastattn.cli info": Script([]), "fastattn.bench.worker": slow}
    scripts |= {"fastattn.bench.smoke": Script(SMOKE.lines, each=9.0)}
    run, _, machine = go(scripts, budget=400.0, spent=20.0)
    given = [(command.split(" {")[0].split(" -")[0], seconds) for command, seconds in machine.asked]
    assert given[0] == ("fastattn.cli build", pytest.approx(100))
    assert [seconds for name, seconds in given if "smoke" in name] == pytest.approx([40, 40])
    assert next(seconds for name, seconds in given if "check" in name) == pytest.approx(68 + AFTER_THE_END)
    assert machine.clock() <= 400 - 20 - LAST_WORDS + AFTER_THE_END
    assert run.record["steps"]["flex"]["words"] == "not reached: the budget was spent"


def test_a_step_alone_may_take_it_all(go):
    _, _, machine = go({}, steps=("tests",), budget=200.0)
    assert machine.asked[0][1] == pytest.approx(200 - LAST_WORDS)


FAILING = Script(
    [said_of("one", "failed", "AssertionError: 1 is not 2\nmore (a.py:3)"), said_of("two")], 1, words="ended with 1"
)


def test_failures_come_first_and_ratios_last(go, capsys):
    checks = {"fastattn.cli check --device cpu --rooms cpu": check_lines("cpu", True, False)}
    checks["fastattn.cli check --device cpu --rooms cpu"].lines[-1]["row"]["words"] = "dq is off"
    wrong = worker("self")
    wrong.lines += [{"done": CELLS[1].name, "rows": [row_of(CELLS[1]) | {"correct": False}]}]
    run, *_ = go({"pytest": FAILING, **checks, **workers([wrong], [worker("cross", "gqa")])})
    test = "tests/cpu/test_attention.py::one: AssertionError: 1 is not 2"
    assert failures(run.record)["tests"] == [test]
    print_summary(Console(width=110, highlight=False, markup=False), run.record)
    said = capsys.readouterr().out
    order = ["cpu, bias: dq is off", "causal/fp32", test, "✗ check", "✗ headline", "✗ tests ", "1.50x", "on average"]
    places = [said.index(words) for words in order]
    assert places == sorted(places)
    assert len(said.splitlines()) < 40


def test_what_pytest_could_not_collect_is_a_failure_in_its_words(go):
    words = "E   ModuleNotFoundError: No module named 'triton'\n"
    line = {"collection": "tests/cpu/test_attention.py", "outcome": "failed", "words": words}
    run, *_ = go({"pytest": Script([line], 1, words="ended with 1")}, steps=("tests",))
    assert run.record["steps"]["tests"]["words"] == "nothing ran, 1 files could not be collected"
    assert failures(run.record)["files"] == [f"tests/cpu/test_attention.py: {words.strip()}"]


def test_a_pytest_that_breaks_says_its_last_words(go):
    run, *_ = go({"pytest": Script(["usage"], 4, words="ended with 4")}, steps=("tests",))
    assert run.record["steps"]["tests"]["ok"] is False
    assert run.record["steps"]["tests"]["words"] == "nothing ran, pytest ended with 4: the last line"


def test_without_xdist_a_test_that_hangs_costs_itself_alone(go, monkeypatch):
    monkeypatch.setattr(gpu_tests.importlib.util, "find_spec", lambda name: None)
    begun = {"begin": "tests/cpu/test_attention.py::hangs"}
    hung = Script([said_of("one"), begun], 1, words="hung", stack=("x.py:1 in f",))
    run, _, machine = go({"pytest": [hung, Script([said_of("two")])]}, steps=("tests",))
    tests = {name.partition("::")[2]: test for name, test in run.record["tests"]["tests"]["tests"].items()}
    assert {name: test["outcome"] for name, test in tests.items()} == {
        "one": "passed", "hangs": "failed", "two": "passed",
    }  # fmt: skip
    assert tests["hangs"]["stack"] == ["x.py:1 in f"] and not any(
        "-n" in command.split() for command, _ in machine.asked
    )


def test_a_pytest_that_is_not_there_is_a_failure(go):
    run, *_ = go({"pytest": Script([], 1, words="ended with 1")}, steps=("tests",))
    assert run.record["steps"]["tests"] == {"ok": False, "seconds": 0.0} | {
        "words": "nothing ran, pytest ended with 1: the last line"
    }


def test_a_test_whose_end_fails_too_keeps_both_words(go):
    lines = [said_of("one", "failed", "the sum is off"), said_of("one", "error", "so is its end")]
    run, *_ = go({"pytest": Script(lines, 1)}, steps=("tests",))
    kept = run.record["tests"]["tests"]["tests"]["tests/cpu/test_attention.py::one"]
    assert (kept["outcome"], kept["words"]) == ("error", "the sum is off; then so is its end")


def test_what_another_library_does_wrong_is_noted_and_no_failure(go, capsys):
    script = worker("self")
    wrong = row_of(CELLS[1], "flex") | {"correct": False, "samples_ms": [], "reason": "wrong: dq"}
    script.lines.append({"done": CELLS[1].name, "rows": [row_of(CELLS[1]), wrong]})
    run, *_ = go(workers([script], [worker("cross", "gqa")]))
    assert run.record["steps"]["headline"]["ok"] is True and not any(failures(run.record).values())
    print_summary(Console(width=110, highlight=False, markup=False), run.record)
    assert "· causal/fp32/B1-H1-N8-D8/fwd/flex: wrong: dq" in capsys.readouterr().out


def test_ties_are_called_ties_and_a_busy_machine_is_said(go, capsys):
    script = worker("cross", "gqa")
    even = [row_of(CELLS[2]) | {"samples_ms": [1.0, 1.1, 0.9, 1.0]}, row_of(CELLS[2], "sdpa", 1.0)]
    script.lines[2] = {"done": CELLS[2].name, "rows": even}
    run, *_ = go(workers([worker("self", "causal")], [script]))
    run.record["environment"] |= {"busy": True, "load_average": [7.5, 1, 1], "cores": 2}
    print_summary(Console(width=110, highlight=False, markup=False), run.record)
    said = capsys.readouterr().out
    assert "≈1.00x" in said and said.count("1.50x") == 4 and "busy (load 7.5 on 2 cores)" in said


def test_the_screen_holds_the_first_cells_and_says_how_many_more(go, capsys, whole, monkeypatch):
    monkeypatch.setattr(summary, "MOST_CELLS", 3)
    run, *_ = go(whole)
    print_summary(Console(width=110, highlight=False, markup=False), run.record)
    said = capsys.readouterr().out
    assert "cross fp32" in said and "gqa fp32" not in said and "and 1 more cells in the file" in said
    assert "4 cells; ≈ a tie" in said


def test_a_file_says_nothing_of_where_things_lie(tmp_path):
    root, packages = Path(earlier.__file__).resolve().parents[1], "/somewhere/lib/python3.12/dist-packages"
    text = json.dumps([f"{root}/bench/x.py:1", f"{packages}/torch/cuda.py:2", f"OSError: {Path.home()}/.cache/a.so"])
    assert json.loads(earlier.without_places(text)) == ["bench/x.py:1", "torch/cuda.py:2", "OSError: ~/.cache/a.so"]


def test_the_best_other_is_the_fastest_that_is_not_ours():
    rows = [Row.of(row_of(CELLS[0], name, time)) for name, time in (("fastattn", 2.0), ("sdpa", 3.0), ("flex", 1.0))]
    rows.append(Row.of(row_of(CELLS[0], "fastattn-triton", 0.1)))
    ours, best = best_two(rows)
    assert (ours.provider, best.provider) == ("fastattn", "flex")
    assert best_two(rows[1:2]) == (None, rows[1])
    assert best_two(rows[1:])[0].provider == "fastattn-triton"  # a free choice that was left out


def test_flex_is_timed_beside_fastattn_and_has_one_row_beside_the_others(go, whole):
    run, _, machine = go(whole)
    providers = [
        json.loads(command.split(" ", 1)[1])["providers"] for command, _ in machine.asked if "bench.worker" in command
    ]
    assert providers == [["fastattn", "sdpa"], ["fastattn", "sdpa"], ["fastattn", "flex"]]
    names = [row["name"] for row in run.record["rows"]]
    assert names.count(f"{CELLS[0].name}/flex") == 1 and names[2] == f"{CELLS[0].name}/flex"


def test_every_test_that_wants_a_gpu_is_in_a_step(request):
    """The files by what they say; pytest's own collection of them all takes half a minute."""
    root = request.config.rootpath
    wants = re.compile(r"pytest\.mark\.gpu\b|def test_\w+\([^)]*\b(device|execute)\b")
    files = [path for path in (root / "tests").rglob("test_*.py") if path.parent.name != "bench"]  # `device`, a word
    found = {path for path in files if wants.search(path.read_text())}
    named = {
        root / path.split("::")[0]
        for selections in gpu_tests.SELECTIONS["cuda"].values()
        for selection in selections
        if selection.marked == "gpu"
        for path in selection.paths
    }
    assert found == named


# ---- runs that go on


def test_resume_runs_nothing_twice_that_went_well_and_what_failed_at_last(go):
    first, *_ = go({"pytest": FAILING, **workers([worker("self", "causal")], [worker("cross", dies_in="gqa", code=1)])})
    assert len(first.record["rows"]) == 9 and first.record["steps"]["flex"]["ok"]
    again, said, machine = go({"fastattn.bench.worker": worker("gqa")}, resume="1")
    assert again.path == first.path and all(f"{name}: done before" in said for name in ("check", "headline", "flex"))
    asked = [command.split()[0] for command, _ in machine.asked]
    assert asked == ["fastattn.cli", "fastattn.cli", "pytest", "fastattn.bench.worker"]  # a build, what is here
    assert json.loads(machine.asked[-1][0].split(" ", 1)[1])["cells"] == [CELLS[3].name]
    assert len(again.record["rows"]) == 12 and False not in [step["ok"] for step in again.record["steps"].values()]
    assert [command["resume"] for command in again.record["commands"]] == [False, True]


def test_resume_first_runs_what_was_cut(go):
    slow = worker("self", "causal", "cross", "gqa", each=20.0)
    first, *_ = go({"fastattn.bench.worker": slow, "pytest": FAILING}, budget=100.0)
    assert first.record["steps"]["sweep"]["ok"] is None and first.record["steps"]["tests"]["ok"] is False
    again, said, _ = go({"fastattn.bench.worker": worker("self", "causal", "cross", "gqa")}, resume="1")
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
    first, *_ = go({**whole, "fastattn.bench.worker": worker("self", dies_in="causal", code=1)}, steps=("headline",))
    carried = {"out": tmp_path, "results": tmp_path / "results", "kept": tmp_path / "kept"}.get(place, tmp_path / "x")
    carried.mkdir(exist_ok=True)
    text = first.path.read_text()
    for path in (first.path, tmp_path / "kept" / first.path.name):
        path.unlink()
    path = carried / "cpu-2020-01-01-another-name.json"
    path.write_text(text)
    resume = str(path) if place == "named" else "1"
    run, _, machine = go({"fastattn.bench.worker": worker("causal")}, steps=("headline",), resume=resume)
    assert json.loads(machine.asked[-1][0].split(" ", 1)[1])["cells"] == [CELLS[1].name]
    assert run.path == tmp_path / path.name and len(json.loads(run.path.read_text())["rows"]) == 6


def test_without_resume_a_run_begins_anew(go, whole):
    first, *_ = go(whole)
    run, said, _ = go({"fastattn.bench.worker": worker("self")}, steps=("headline",))
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
    again, said, _ = go(whole | {"fastattn.bench.worker": worker("self", "causal", "cross", "gqa")}, resume=str(other))
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
        go({"fastattn.bench.worker": worker("self", "causal")}, steps=("headline",))
    record = json.loads(run[0].path.read_text())
    assert len(record["rows"]) == 6 and record["steps"]["headline"] == {"ok": None, "seconds": 0.0, "words": "was cut"}


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
        (["test"], "step 'test' is not known; there are build, smoke, check, headline, instructions, tests, sweep, "),
        (["swep"], "did you mean 'sweep'?"),
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
    monkeypatch.setattr(gpu_cells, "suite", lambda device: [cell])
    run = Run(Settings(device="cpu", out=tmp_path, budget=200.0, steps=("headline",)), lambda words: None)
    started = run.child

    def child(command, seconds, silence):
        made = started(command, seconds, silence)
        made.command = [made.command[0], "-c", line, command[-1]]
        return made

    run.child = child
    run.steps()
    assert run.record["steps"]["headline"]["words"] == "1 of 1 cells" and run.record["steps"]["headline"]["ok"]
    assert [row["provider"] for row in run.record["rows"]] == ["fastattn", "sdpa"]
    assert all(row["correct"] and row["median_ms"] > 0 for row in run.record["rows"])
