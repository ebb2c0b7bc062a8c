"""Steps of `make gpu` that run tests: of single instructions, of the backends, under compute-sanitizer.

Each names its files, and pytest collects no other. What it says comes as lines of pytest_lines.py.
"""

from __future__ import annotations

import importlib.util
import tempfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from fastattn.bench.gpu import pytest_lines
from fastattn.bench.gpu.children import Outcome, ended, objects

if TYPE_CHECKING:
    from fastattn.bench.gpu.pipeline import Run

SILENCE = 30.0
SANITIZED = 150.0
"""Seconds after which a test hangs; those that wait for compute-sanitizer end it themselves after 140."""

DONE = ("passed", "skipped")
NEW_LINE = "\n"
ONE_THREAD = {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
NOTHING_TO_RUN = "there is nothing to run without a GPU"
NO_TESTS = 5
"""pytest's exit code where nothing was left to run; 1 are failed tests, which have lines of their own."""


@dataclass(frozen=True)
class Selection:
    """What one pytest runs: files or tests, those with a mark, a test of each file in turn."""

    paths: tuple[str, ...]
    marked: str = "gpu"
    without: tuple[str, ...] = ()
    silence: float = SILENCE

    @property
    def name(self) -> str:
        return " ".join(self.paths)


BACKENDS = {"tests/cuda": "cuda", "tests/kernels": "triton", "tests/cpu": "cpu"}
"""Whose tests lie in a folder; those of others take any backend."""

SANITIZERS = (
    "tests/cuda/test_gpu.py::test_the_sanitizer_finds_nothing",
    "tests/kernels/test_gpu.py::test_no_access_outside_of_tensors",
)
MARKED = (
    "tests/cuda/test_gpu.py",
    "tests/cuda/test_overflow.py",
    "tests/kernels/test_gpu.py",
    "tests/fastattn/test_integrations_registry.py",
    "tests/house/test_poison.py",
)
TRITON_CASES = tuple(f"tests/kernels/test_{name}.py" for name in ("attention", "features", "decode"))
"""The Triton backend's own, which take the best device there is."""

SELECTIONS: dict[str, dict[str, tuple[Selection, ...]]] = {
    "cuda": {
        "instructions": (Selection(("tests/sim/test_instructions.py",)),),
        "tests": (Selection(MARKED, without=SANITIZERS), Selection(TRITON_CASES, marked="not gpu")),
        "sanitizers": (Selection(SANITIZERS, silence=SANITIZED),),
    },
    "cpu": {
        "instructions": (),
        "tests": (Selection(("tests/cpu/test_attention.py",), marked="not gpu"),),
        "sanitizers": (),
    },
}
"""By device and step. Every test that is marked gpu is in one of a GPU's."""


def run_tests(run: Run, step: str, seconds: float, good: list[str]) -> Outcome:
    """A step's selections, one pytest after the other. What has an outcome is not run again, nor what its backend's
    smallest call failed for.
    """
    selections = SELECTIONS[run.settings.device][step]
    if not selections:
        return None, NOTHING_TO_RUN
    kept = run.record.setdefault("tests", {}).setdefault(
        step, {"tests": {}, "collection": {}, "ended": {}, "running": []}
    )
    until, left_out, stopped, broken = run.now() + seconds, {}, [], []
    for selection in selections:
        bad_ones = {path: who for path in selection.paths if (who := _backend(path)) not in (None, *good)}
        left_out |= dict.fromkeys(bad_ones.values())
        paths = [path for path in selection.paths if path not in bad_ones]
        if not paths or not run.wanted(_verdict(kept, selection, paths)):
            continue
        if run.now() >= until:
            stopped.append("the time was spent")
            break
        words, finished = Pytest(run, step, kept, selection, paths).go(until)
        kept["ended"][selection.name] = {"finished": finished, "words": words, "paths": paths}
    for selection in selections:
        end = kept["ended"].get(selection.name)
        if end and end["words"]:
            (broken if end["finished"] else stopped).append(end["words"])
    outcomes = [test["outcome"] for test in kept["tests"].values()]
    bad = sum(outcome not in DONE for outcome in outcomes)
    errors = sum(each["outcome"] == "failed" for each in kept["collection"].values())
    words = [f"{outcomes.count(name)} {name}" for name in DONE if name in outcomes]
    words += [f"{bad} failed"] if bad else [] if words else ["nothing ran"]
    words += [f"{errors} files could not be collected"] if errors else []
    words += [f"without those of {', '.join(left_out)}"] if left_out else []
    words += [*dict.fromkeys([*broken, *stopped])]
    ok = False if bad or errors or broken else None if stopped or left_out else True
    return ok, ", ".join(words)


def _backend(path: str) -> str | None:
    return BACKENDS.get(str(PurePosixPath(path).parent))


def _verdict(kept: dict[str, Any], selection: Selection, paths: list[str]) -> bool | None:
    """None where pytest has not come to an end of all paths; False where a test, or pytest itself, failed."""
    end = kept["ended"].get(selection.name)
    if end is None or not end["finished"] or set(paths) - set(end["paths"]):
        return None
    files = tuple(path.split("::")[0] for path in paths)

    def of(found: dict[str, Any]) -> list[dict[str, Any]]:
        return [each for name, each in found.items() if any(file.endswith(name.split("::")[0]) for file in files)]

    mine, errors = of(kept["tests"]), of(kept["collection"])
    return not (end["words"] or errors or any(test["outcome"] not in DONE for test in mine))


class Pytest:
    """One selection, of which a step keeps outcomes in `kept`."""

    def __init__(self, run: Run, step: str, kept: dict[str, Any], selection: Selection, paths: list[str]):
        self.run, self.step, self.kept, self.selection, self.paths = run, step, kept, selection, paths
        self.said: set[str] = set()
        """Tests that have an outcome of this try."""
        self.running: dict[str, None] = {}

    def go(self, until: float) -> tuple[str, bool]:
        """How it ended in words, empty where all that it ran is in the record; and whether it came to its end."""
        while True:
            words, finished = self._once(until - self.run.now())
            if not (finished and self.running and self.run.now() < until):
                self.kept["running"] = []
                return words, finished
            # Without pytest-xdist a test takes the whole process with it: another one goes on.
            for name in list(self.running):
                self._put({"test": name, "outcome": "failed", "seconds": 0, "words": words, "stack": self.stack})

    def _command(self) -> list[str]:
        flags = ["-q", "--tb=short", "-p", "no:cacheprovider", "-p", pytest_lines.__name__, "-m", self.selection.marked]
        flags += [f"--deselect={test}" for test in self.selection.without]
        if importlib.util.find_spec("xdist") is not None:
            flags += ["-n", str(self.run.settings.jobs), "--max-worker-restart=40"]
        return ["pytest", *flags, *self.paths]

    def _once(self, seconds: float) -> tuple[str, bool]:
        self.running, internal = {}, ""
        known = self.kept["tests"].items()
        done = [name for name, test in known if name in self.said or not self.run.wanted(test["outcome"] in DONE)]
        for path in self.paths:
            self.kept["collection"].pop(path.split("::")[0], None)
        collected = 0
        with tempfile.TemporaryDirectory(prefix="fastattn-tests-") as folder:
            ids = Path(folder, "done.txt")
            ids.write_text("\n".join(done))
            variables = {pytest_lines.DONE: str(ids), pytest_lines.STACKS: folder, **ONE_THREAD}
            child = self.run.child(self._command(), seconds, self.selection.silence, variables)
            for line in objects(self.run.listen(child)):
                if "begin" in line:
                    self.running[line["begin"]] = None
                elif "test" in line:
                    self._put(line)
                elif "collection" in line:
                    self.kept["collection"][line["collection"]] = {each: line[each] for each in ("outcome", "words")}
                    collected += 1
                elif "internal" in line:
                    internal = line["internal"]
                self.kept["running"] = list(self.running)
            ending = ended(child)
        self.stack = list(ending.stack)
        self.kept["tail"] = [each for each in ending.tail if not each.startswith("{") and each.strip()]
        if ending.code is None:
            return ending.words, False
        if self.running:
            return ending.words or "ended", True
        silent = ending.code == 1 and not (self.said or collected)
        if ending.code in (0, 1, NO_TESTS) and not internal and not silent:
            return "", True
        last = internal.strip().splitlines()[-1:] or self.kept["tail"][-1:]
        return ": ".join([f"pytest {ending.words or 'broke'}", *last]), True

    def _put(self, line: dict[str, Any]) -> None:
        """A test's line. Of several in one try, for what comes after a test may fail too, all words stay."""
        name, words = line["test"], line["words"]
        before = self.kept["tests"].get(name)
        if before and name in self.said:
            words = f"{before['words']}; then {words}".removeprefix("; then ")
        elif before and before["outcome"] not in DONE:
            self.run.once_more(self.step, name, before["words"])
        self.kept["tests"][name] = {"outcome": line["outcome"], "seconds": line["seconds"], "words": words}
        if line["stack"]:
            self.kept["tests"][name]["stack"] = line["stack"]
        if line["outcome"] not in DONE:
            self.run.say(f"{line['outcome']}: {name}: {words.partition(NEW_LINE)[0]}")
        self.said.add(name)
        self.running.pop(name, None)
