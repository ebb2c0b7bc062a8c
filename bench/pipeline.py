"""`make gpu`: a few minutes of a GPU into evidence.

Steps (build, test, check, bench; tune when asked for) run in child processes, each within its share of the budget. What
is known is written into one JSON after every line that a child says, so that a run that is killed keeps what it has.
"""

from __future__ import annotations

import datetime
import difflib
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastattn.bench import env
from fastattn.bench.child import Child
from fastattn.bench.files import plain
from fastattn.bench.options import Parser
from fastattn.bench.run import pick_device
from fastattn.bench.steps import DOES

SCHEMA = "fastattn-gpu/1"
STEPS = ("build", "test", "check", "bench")
SHARES = {"build": 0.15, "test": 0.3, "check": 0.15, "bench": 1.0, "tune": 1.0}
"""Of the whole budget, what a step may take when others follow; alone it may take all that is left."""

SILENCE = 150.0
"""Seconds without a word after which a child hangs. FlexAttention's backward can take a minute to compile."""

FILE_WIDTH = 110
"""Columns of a summary that goes into a file or through a pipe."""

LAST_WORDS = 5.0
"""Seconds of the budget kept for the summary."""

OK, WRONG, USAGE, NOTHING_RAN = 0, 1, 2, 3


@dataclass(frozen=True)
class Settings:
    """What was asked for. `budget` in seconds."""

    device: str = "cuda"
    steps: tuple[str, ...] = STEPS
    budget: float = 480.0
    out: Path = Path("bench/results")
    peers: Path | None = None
    resume: bool = False
    jobs: int = min(4, os.cpu_count() or 1)


class Run:
    """One pass through the steps; `record` is what the file holds."""

    def __init__(self, settings: Settings, say: Callable[[str], None], now: Callable[[], float] = time.monotonic):
        self.settings, self.say, self.now = settings, say, now
        self.start = now()
        environment = env.environment(settings.device)
        self.path = _path(settings, environment)
        self.record = _earlier(self.path) if settings.resume else None
        if self.record is None:
            self.record = {"schema": SCHEMA, "environment": environment, "steps": {}}
        self.record["budget_s"] = settings.budget

    def left(self) -> float:
        """Seconds of the budget."""
        return self.settings.budget - LAST_WORDS - (self.now() - self.start)

    def share(self, step: str) -> float:
        alone = self.settings.steps[-1] == step
        return max(0.0, self.left() if alone else min(self.left(), SHARES[step] * self.settings.budget))

    def save(self) -> None:
        """The whole file at once: a reader never sees half of it."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(plain(self.record), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        part.replace(self.path)

    def child(self, command: list[str], seconds: float, more: dict[str, str] | None = None) -> Child:
        """A Python module as a child, on what this process runs on."""
        variables = {"PYTHONSAFEPATH": "1"}  # the working folder holds a folder `kernels`, which transformers asks for
        if self.settings.peers is not None:
            variables["PEERS"] = str(self.settings.peers)
        return Child([sys.executable, "-m", *command], seconds, SILENCE, variables | (more or {}), self.now)

    def steps(self) -> None:
        for step in self.settings.steps:
            done = self.record["steps"].get(step)
            if done is not None and done["ok"]:
                self.say(f"{step}: done before")
                continue
            if self.left() <= 0:
                self.record["steps"][step] = {"ok": None, "seconds": 0.0, "words": "not reached: the budget was spent"}
                self.save()
                continue
            self.say(f"{step}: up to {self.share(step):.0f} s")
            began = self.now()
            ok, words = DOES[step](self, self.share(step))
            self.record["steps"][step] = {"ok": ok, "seconds": round(self.now() - began, 1), "words": words}
            self.say(f"{step}: {words} ({self.now() - began:.0f} s)")
            self.save()


def _path(settings: Settings, environment: dict[str, Any]) -> Path:
    """<device>-<date>-<commit>.json; with RESUME the last such file of this commit."""
    device = env.device_name(environment)
    commit = (environment["commit"] or "no-commit")[:9] + ("-changed" if environment["dirty"] else "")
    if settings.resume and (before := sorted(settings.out.glob(f"{device}-????-??-??-{commit}.json"))):
        return before[-1]
    return settings.out / f"{device}-{datetime.date.today().isoformat()}-{commit}.json"


def _earlier(path: Path) -> dict[str, Any] | None:
    """What a run before this one wrote. ValueError where it is of another schema."""
    if not path.exists():
        return None
    record = json.loads(path.read_text(encoding="utf-8"))
    if record.get("schema") != SCHEMA:
        raise ValueError(f"resume: {path} has schema {record.get('schema')!r}, this version writes {SCHEMA!r}")
    return record


def main(argv: list[str]) -> int:
    """Run the steps, print the summary; 0 all well, 1 something was wrong, 2 the command line was, 3 nothing ran."""
    from rich.console import Console

    from fastattn.bench.summary import print_summary

    console = Console(highlight=False, markup=False, soft_wrap=True)
    if not console.is_terminal:
        console = Console(highlight=False, markup=False, soft_wrap=True, width=FILE_WIDTH)
    try:
        settings = _settings(argv)
        run = Run(settings, lambda words: console.print(words, style="dim"))
    except ValueError as failure:
        print(f"make gpu: {failure}", file=sys.stderr)
        return USAGE
    try:
        run.steps()
    except KeyboardInterrupt:
        console.print("stopped; what was measured is written, RESUME=1 goes on")
    run.save()
    print_summary(console, run.record)
    console.print(f"written: {run.path}")
    outcomes = [step["ok"] for step in run.record["steps"].values()]
    return WRONG if False in outcomes else OK if outcomes else NOTHING_RAN


def _settings(argv: list[str]) -> Settings:
    parser = Parser("make gpu", description=__doc__.split("\n")[0])
    parser.add_argument("steps", nargs="*", metavar="STEP", help=f"{', '.join(DOES)}; none: {', '.join(STEPS)}")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--budget", type=float, default=Settings.budget, metavar="SECONDS")
    parser.add_argument("--out", type=Path, default=Settings.out, metavar="DIR")
    parser.add_argument("--peers", type=Path, metavar="DIR", help="a folder with unpacked wheels of other libraries")
    parser.add_argument("--resume", action="store_true", help="go on where the last run of this commit stopped")
    parser.add_argument("--jobs", type=int, default=Settings.jobs, metavar="N", help="test processes")
    given = parser.parse_args(argv)
    unknown = [step for step in given.steps if step not in DOES]
    if unknown:
        near = difflib.get_close_matches(unknown[0], DOES, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"step {unknown[0]!r} is not known; there are {', '.join(DOES)}{hint}")
    if not given.budget > LAST_WORDS:
        raise ValueError(f"BUDGET must be more than {LAST_WORDS:.0f} seconds, got {given.budget:g}")
    if given.peers is not None and not given.peers.is_dir():
        raise ValueError(f"PEERS={given.peers} is no folder; it holds unpacked wheels")
    pick_device(given.device)
    return Settings(**{**vars(given), "steps": tuple(given.steps) or STEPS})


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
