"""`make gpu`: a few minutes of a GPU into evidence.

Steps run in child processes, each within its share of the budget. What is known is written into one JSON whenever a
child has said something, so that a run that is killed keeps what it has; RESUME goes on from that file.
"""

from __future__ import annotations

import datetime
import difflib
import itertools
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastattn.bench.gpu import resume as earlier
from fastattn.bench.gpu import watchdog
from fastattn.bench.gpu.child import Child
from fastattn.bench.gpu.run_tests import NOTHING_TO_RUN
from fastattn.bench.gpu.steps import DOES, STEPS
from fastattn.bench.measure import env
from fastattn.bench.measure.run import pick_device
from fastattn.bench.options import Parser
from fastattn.bench.report.writers import GPU_SCHEMA as SCHEMA
from fastattn.bench.report.writers import plain

SHARES = {
    "build": 0.25,
    "smoke": 0.3,
    "check": 0.17,
    "headline": 0.22,
    "instructions": 0.16,
    "tests": 0.25,
    "sweep": 0.4,
    "flex": 0.4,
}
"""Of the whole budget, what a step may take when others follow; the last, or one alone, may take all that is left."""

BACKSTOP = 60.0
"""Seconds beyond its own silence after which a child that could not end itself is stopped."""

FILE_WIDTH = 128
"""Columns of a summary that goes into a file or through a pipe."""

LAST_WORDS = 5.0
"""Seconds of the budget kept for the summary."""

OK, WRONG, USAGE, NOTHING_RAN = 0, 1, 2, 3


@dataclass(frozen=True)
class Settings:
    """What was asked for. `budget` in seconds, of which `spent` are gone; `resume` is "" for a new run, "1" to look for
    the last one of this commit, or the path of its file.
    """

    device: str = "cuda"
    steps: tuple[str, ...] = STEPS
    budget: float = 480.0
    spent: float = 0.0
    out: Path = Path("bench/results")
    peers: Path | None = None
    resume: str = ""
    jobs: int = min(8, os.cpu_count() or 1)


class Run:
    """One pass through the steps; `record` is what the file holds."""

    def __init__(self, settings: Settings, say: Callable[[str], None], now: Callable[[], float] = time.monotonic):
        self.settings, self.say, self.now = settings, say, now
        self.start = now() - settings.spent
        self.again = False
        """Whether what failed before is run once more: after all that has not run yet."""
        self.lock, self.unsaved = threading.RLock(), False
        self.children: list[Child] = []
        environment = env.environment(settings.device)
        self.path = _path(settings.out, environment)
        self.record: dict[str, Any] = {"schema": SCHEMA, "environment": environment, "commands": [], "steps": {}}
        self.resumed = False
        if settings.resume:
            before = earlier.find(settings.resume, settings.out, environment)
            if before is None:
                say("nothing of this commit to go on from: a new run")
            else:
                self.record = earlier.carried(before, environment, say)
                self.path = settings.out / (before.name if self._same_gpu(environment) else self.path.name)
                self.resumed = True
        self.record["commands"].append(
            {"date": environment["date"], "steps": list(settings.steps), "budget_s": settings.budget}
            | {"set_up_s": round(settings.spent, 1), "resume": bool(settings.resume)}
        )

    def _same_gpu(self, environment: dict[str, Any]) -> bool:
        return self.record["environment"]["gpu"] == environment["gpu"] and "carried_from" not in self.record

    def left(self) -> float:
        """Seconds of the budget."""
        return self.settings.budget - LAST_WORDS - (self.now() - self.start)

    def share(self, step: str) -> float:
        alone = self.settings.steps[-1] == step
        return max(0.0, self.left() if alone else min(self.left(), SHARES.get(step, 1.0) * self.settings.budget))

    def wanted(self, verdict: bool | None) -> bool:
        """Whether something is to be run of which this is known: None, nothing; False, that it failed."""
        return verdict is None or (self.again and verdict is False)

    def once_more(self, step: str, name: str, words: str) -> None:
        """Keeps what is known of a failure whose place a second try takes: not every run of it fails, maybe."""
        self.record.setdefault("failed_before", []).append({"step": step, "name": name, "words": words})

    def save(self) -> None:
        """The whole file at once: a reader never sees half of it. And a copy that stays on the machine."""
        with self.lock:
            text = json.dumps(plain(self.record), indent=1, ensure_ascii=False) + "\n"
            self.unsaved = False
        text = earlier.without_places(text)
        for path in dict.fromkeys([self.path, earlier.KEPT / self.path.name]):
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_suffix(".part")
            part.write_text(text, encoding="utf-8")
            part.replace(path)

    def child(
        self,
        command: list[str],
        seconds: float,
        silence: float,
        more: dict[str, str] | None = None,
        under: Sequence[str] = (),
    ) -> Child:
        """A Python module as a child, on what this process runs on; it ends itself after `silence` seconds. `under` is
        the command line of a tool that runs it.
        """
        variables = {"PYTHONSAFEPATH": "1"}  # the working folder holds a folder `kernels`, which transformers asks for
        if silence < float("inf"):
            variables[watchdog.SILENCE] = f"{silence:g}"
        if self.settings.peers is not None:
            variables["PEERS"] = str(self.settings.peers)
        words = [*under, sys.executable, "-m", *command]
        return Child(words, seconds, silence + BACKSTOP, variables | (more or {}), self.now, self._idle)

    def listen(self, child: Child) -> Iterator[str]:
        """What a child says; what is made of a line is in the file before the next one is waited for."""
        self.children.append(child)
        try:
            for line in child.lines():
                with self.lock:
                    self.unsaved = True
                    yield line
        finally:
            self.children.remove(child)

    def _idle(self) -> None:
        with self.lock:
            if self.unsaved:
                self.save()

    def together(self, *works: Callable[[], None]) -> None:
        """Each in a thread of its own; an interruption ends all their children."""
        with ThreadPoolExecutor(len(works)) as pool:
            waiting = [pool.submit(work) for work in works]
            try:
                for each in waiting:
                    each.result()
            finally:
                for child in list(self.children):
                    child.stop()

    def steps(self) -> None:
        """Each step once, in order; with the time that is left those that their share cut; then, of a run that goes
        on, what failed.
        """
        for step in self.settings.steps:
            self._step(step)
        for step in self._of_verdict(None, False):
            if step != "build":
                self._step(step)
        self.again = self.resumed
        for step in self._of_verdict(None, False) if self.again else ():
            self._step(step)

    def _of_verdict(self, *verdicts: bool | None) -> list[str]:
        found = {step: self.record["steps"][step] for step in self.settings.steps}
        return [step for step, each in found.items() if each["ok"] in verdicts and each["words"] != NOTHING_TO_RUN]

    def _step(self, step: str) -> None:
        before = self.record["steps"].get(step, {"ok": None, "seconds": 0.0, "words": ""})
        if before["ok"] and step != "build":  # the libraries lie on a machine, not in the file
            self.say(f"{step}: done before")
            return
        if self.left() <= 0:
            if not before["words"]:
                self.record["steps"][step] = before | {"words": "not reached: the budget was spent"}
                self.save()
            return
        self.say(f"{step}: up to {self.share(step):.0f} s{', what failed once more' if self.again else ''}")
        began = self.now()
        # A run that is killed within the step leaves it without a verdict.
        self.record["steps"][step] = before | {"ok": None, "words": "was cut"}
        ok, words = DOES[step](self, self.share(step))
        seconds = round(before["seconds"] + self.now() - began, 1)
        self.record["steps"][step] = {"ok": ok, "seconds": seconds, "words": words}
        self.say(f"{step}: {words} ({self.now() - began:.0f} s)")
        self.save()


def _path(out: Path, environment: dict[str, Any]) -> Path:
    """<device>-<date>-<commit>.json; a number more where an earlier run is there, which stays."""
    commit = (environment["commit"] or "no-commit")[:9] + ("-changed" if environment["dirty"] else "")
    stem = f"{env.device_name(environment)}-{datetime.date.today().isoformat()}-{commit}"
    names = itertools.chain([stem], (f"{stem}-{number}" for number in itertools.count(2)))
    return next(path for name in names if not (path := out / f"{name}.json").exists())


def main(argv: list[str]) -> int:
    """Run the steps, print the summary; 0 all well, 1 something was wrong, 2 the command line was, 3 nothing ran."""
    from rich.console import Console

    from fastattn.bench.gpu.summary import print_summary

    console = Console(highlight=False, markup=False, soft_wrap=True)
    if not console.is_terminal:
        console = Console(highlight=False, markup=False, soft_wrap=True, width=FILE_WIDTH)
    try:
        settings = _settings(argv)
        run = Run(settings, lambda words: console.print(words, style="dim"))
    except ValueError as failure:
        print(f"make gpu: {failure}", file=sys.stderr)
        return USAGE
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what a time limit sends
    try:
        run.steps()
    except KeyboardInterrupt:
        console.print("stopped; what was measured is written, RESUME=1 goes on")
    run.save()
    print_summary(console, json.loads(run.path.read_text(encoding="utf-8")))
    console.print(f"written: {run.path}")
    outcomes = [step["ok"] for step in run.record["steps"].values()]
    return WRONG if False in outcomes else OK if outcomes else NOTHING_RAN


def _settings(argv: list[str]) -> Settings:
    parser = Parser("make gpu", description=__doc__.split("\n")[0])
    parser.add_argument("steps", nargs="*", metavar="STEP", help=f"{', '.join(DOES)}; none: {', '.join(STEPS)}")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--budget", type=float, default=Settings.budget, metavar="SECONDS")
    parser.add_argument("--began", type=float, metavar="TIME", help="when the set-up began: date +%%s")
    parser.add_argument("--out", type=Path, default=Settings.out, metavar="DIR")
    parser.add_argument("--peers", type=Path, metavar="DIR", help="a folder with unpacked wheels of other libraries")
    parser.add_argument(
        "--resume", default="", metavar="1|FILE", help="go on where the last run of this commit stopped"
    )
    parser.add_argument("--jobs", type=int, default=Settings.jobs, metavar="N", help="test processes")
    given = vars(parser.parse_args(argv))
    unknown = [step for step in given["steps"] if step not in DOES]
    if unknown:
        near = difflib.get_close_matches(unknown[0], DOES, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"step {unknown[0]!r} is not known; there are {', '.join(DOES)}{hint}")
    if not given["budget"] > LAST_WORDS:
        raise ValueError(f"BUDGET must be more than {LAST_WORDS:.0f} seconds, got {given['budget']:g}")
    if given["peers"] is not None and not given["peers"].is_dir():
        raise ValueError(f"PEERS={given['peers']} is no folder; it holds unpacked wheels")
    pick_device(given["device"])
    began = given.pop("began")
    spent = 0.0 if began is None else max(0.0, time.time() - began)
    return Settings(**{**given, "steps": tuple(given["steps"]) or STEPS, "spent": spent})


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
