"""The child of `make gpu` that times cells: a JSON line before and after each, so that its parent knows what it was at
when it died.

    {"begin": name}        {"at": provider}        {"done": name, "rows": [...]}
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import dataclass

import torch

from fastattn.bench.cases.suites import Cell, suite
from fastattn.bench.gpu.watchdog import BROKEN_DEVICE, Watch, broken_device
from fastattn.bench.measure.clock import Budget, clock_for
from fastattn.bench.measure.progress import Progress
from fastattn.bench.measure.providers import peers
from fastattn.bench.measure.rows import Row
from fastattn.bench.measure.run import CaseRunner, cell_rows

BUDGET = {"cuda": Budget(rounds=20, min_time=0.05, max_time=0.6), "cpu": Budget(rounds=5, min_time=0.1, max_time=0.5)}


@dataclass(frozen=True)
class Task:
    """What a worker is told: cells by name, who runs them beside the peers it finds, how many seconds there are."""

    device: str
    cells: list[str]
    providers: list[str]
    seconds: float


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser("fastattn.bench.gpu.worker", description=__doc__)
    parser.add_argument("task", help="a Task as JSON")
    task = Task(**json.loads(parser.parse_args(argv).task))
    until = time.monotonic() + task.seconds
    providers = [*task.providers, *peers.found()]
    known = {cell.name: cell for cell in suite(task.device)}
    watch = Watch()
    for name in task.cells:
        if time.monotonic() >= until:
            break
        _say({"begin": name})
        watch.heard()
        rows = time_cell(known[name], providers, torch.device(task.device), Said(len(providers), watch))
        _say({"done": name, "rows": [row.record() for row in rows]})
        if broken_device() is not None:
            return BROKEN_DEVICE
    watch.stop()
    return 0


class Said(Progress):
    """Says at which provider a cell is; each is a sign of life."""

    def __init__(self, total: int, watch: Watch):
        super().__init__(total)
        self.watch = watch

    def step(self, words: str) -> None:
        super().step(words)
        self.say(words)

    def say(self, words: str) -> None:
        self.watch.heard()
        _say({"at": words.rpartition(" · ")[2]})


def time_cell(cell: Cell, providers: list[str], device: torch.device, progress: Progress) -> list[Row]:
    """A row for each provider: checked, then timed side by side."""
    rows = cell_rows(cell, providers, device)
    CaseRunner(cell.case, device, clock_for(device), BUDGET[device.type], True, progress).run(rows)
    return rows


def _say(line: dict) -> None:
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
