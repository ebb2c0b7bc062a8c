"""The child of `make gpu` that times cells: a JSON line before and after each, so that its parent knows what it was at
when it died.

    {"begin": name}        {"cell": name, "rows": [...]}        {"left": [names]}
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import dataclass

import torch

from fastattn.bench import peers
from fastattn.bench.clock import Budget, clock_for
from fastattn.bench.progress import Progress
from fastattn.bench.rows import Row
from fastattn.bench.run import CaseRunner, cell_rows
from fastattn.bench.suite import Cell, suite

BUDGET = {"cuda": Budget(rounds=20, min_time=0.05, max_time=0.6), "cpu": Budget(rounds=5, min_time=0.1, max_time=0.5)}
BROKEN_DEVICE = 70
"""Exit code after an error that a CUDA context does not survive: the parent begins a new process."""


@dataclass(frozen=True)
class Task:
    """What a worker is told: cells by name, who runs them beside the peers it finds, how many seconds there are."""

    device: str
    cells: list[str]
    providers: list[str]
    seconds: float


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser("fastattn.bench.worker", description=__doc__)
    parser.add_argument("task", help="a Task as JSON")
    task = Task(**json.loads(parser.parse_args(argv).task))
    until = time.monotonic() + task.seconds
    providers = [*task.providers, *peers.found()]
    known = {cell.name: cell for cell in suite(task.device)}
    for index, name in enumerate(task.cells):
        if time.monotonic() >= until:
            _say({"left": task.cells[index:]})
            break
        _say({"begin": name})
        rows = time_cell(known[name], providers, torch.device(task.device))
        _say({"cell": name, "rows": [row.record() for row in rows]})
        if task.device == "cuda" and not _alive():
            return BROKEN_DEVICE
    return 0


def time_cell(cell: Cell, providers: list[str], device: torch.device) -> list[Row]:
    """A row for each provider: checked, then timed side by side."""
    rows = cell_rows(cell, providers, device)
    CaseRunner(cell.case, device, clock_for(device), BUDGET[device.type], True, Progress(len(rows))).run(rows)
    return rows


def _alive() -> bool:
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def _say(line: dict) -> None:
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
