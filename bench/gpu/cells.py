"""Steps of `make gpu` that time cells: the headline, the sweep over the rest of the suite, and FlexAttention, whose
kernels take a minute to compile, on a few cells of both.
"""

from __future__ import annotations

import json
from collections import Counter
from typing import TYPE_CHECKING, Any

from fastattn.bench.cases.suites import PEERS, Cell, headline, suite
from fastattn.bench.gpu.child import Child, Ending
from fastattn.bench.gpu.children import AFTER_THE_END, Outcome, Queue
from fastattn.bench.measure.rows import Row

if TYPE_CHECKING:
    from fastattn.bench.gpu.pipeline import Run

SILENCE = {"headline": 45.0, "sweep": 45.0, "flex": 100.0}
"""Seconds without a sign of life, a cell's next provider, after which it hangs; `flex` compiles."""

FLEX = "flex"
FLEX_CELLS = {"cuda": 6, "cpu": 1}
BESIDE_FLEX = "sdpa-cudnn"

MOST_HANGS = 2
"""Cells that a provider may hang in; then the others are timed without it."""


def cells_of(step: str, device: str) -> list[Cell]:
    """In order. Flex: the headline and what follows it in the suite, as far as its compiling fits."""
    every, first = suite(device), headline(device)
    if step == "headline":
        return first
    if step == "sweep":
        return every[len(first) :]
    return [cell for cell in every if device == "cuda" or cell.mode == "fwd"][: FLEX_CELLS[device]]


def providers_of(step: str, device: str, good: list[str], every: tuple[str, ...]) -> list[str]:
    """Who runs: fastattn's free choice where no backend failed, each backend by name on a GPU, and the others."""
    by_name = [f"fastattn-{backend}" for backend in good] if device == "cuda" else []
    ours = [*(["fastattn"] if set(good) == set(every) else []), *by_name]
    others = [name for name in PEERS[device] if not name.startswith("fastattn") and name != FLEX]
    if step == "flex":
        return [*ours, FLEX, *(name for name in others if name == BESIDE_FLEX)]
    return [*ours, *others]


def time_cells(run: Run, step: str, seconds: float, good: list[str], every: tuple[str, ...]) -> Outcome:
    """The step's cells, every provider side by side. A worker that dies takes its cell with it, and another goes on."""
    device, until = run.settings.device, run.now() + seconds
    rows = run.record.setdefault("flex" if step == "flex" else "rows", [])
    crashed = run.record.setdefault("crashed", {}).setdefault(step, {})
    providers = providers_of(step, device, good, every)
    names = [cell.name for cell in cells_of(step, device)]

    def of_cell(name: str) -> list[dict[str, Any]]:
        return [row for row in rows if row["name"].rsplit("/", 1)[0] == name]

    def verdict(name: str) -> bool | None:
        if name in crashed:
            return False
        found = of_cell(name)
        return None if not found else not any(Row.of(row).failed for row in found)

    def left_out() -> list[str]:
        hangs = Counter(each["at"] for each in crashed.values() if each["stack"])
        return [name for name in providers if hangs[name] >= MOST_HANGS]

    def command(left: list[str], seconds: float) -> Child:
        who = [name for name in providers if name not in left_out()]
        task = {"device": device, "cells": left, "providers": who, "seconds": seconds - AFTER_THE_END}
        return run.child(["fastattn.bench.gpu.worker", json.dumps(task)], seconds, SILENCE[step])

    def done(line: dict[str, Any]) -> None:
        before = crashed.pop(line["done"], None)
        if before is not None:
            run.once_more(step, line["done"], before["words"])
        rows[:] = [row for row in rows if row["name"].rsplit("/", 1)[0] != line["done"]] + line["rows"]
        if step == "flex":
            _beside(run.record.setdefault("rows", []), line["done"], line["rows"])
        number = sum(verdict(name) is not None for name in names)
        run.say(f"[{number}/{len(names)}] {line['done']}{_words(line['rows'])}")

    def lost(name: str, ending: Ending) -> None:
        words = ending.sentence + (f" ({queue.at})" if queue.at else "")
        crashed[name] = {"words": words, "at": queue.at, "stack": list(ending.stack), "tail": list(ending.tail)}
        run.say(f"{name}: {crashed[name]['words']}")

    queue = Queue(run, command, done, lost)
    queue.go([name for name in names if run.wanted(verdict(name))], until)
    verdicts = [verdict(name) for name in names]
    run.record.setdefault("left", {})[step] = [name for name in names if verdict(name) is None]
    wrong = sum(each is False for each in verdicts) - len(crashed)
    words = [f"{len(names) - verdicts.count(None)} of {len(names)} cells"]
    words += [f"{wrong} wrong"] if wrong else []
    words += [f"{len(crashed)} crashed or hung"] if crashed else []
    words += [f"without {name}, which hung {MOST_HANGS} times" for name in left_out()]
    return False if False in verdicts else None if None in verdicts else True, ", ".join(words)


def _beside(rows: list[dict[str, Any]], cell: str, timed: list[dict[str, Any]]) -> None:
    """Flex's row after the others of its cell; a reader of `rows` finds each provider once."""
    rows[:] = [row for row in rows if row["name"] != f"{cell}/{FLEX}"]
    places = [at for at, row in enumerate(rows) if row["name"].rsplit("/", 1)[0] == cell]
    if places:
        rows[places[-1] + 1 : places[-1] + 1] = [row for row in timed if row["provider"] == FLEX]


def _words(rows: list[dict[str, Any]]) -> str:
    """Who took how long, on one line."""
    timed = [f"{row['provider']} {row['median_ms']:.3g} ms" for row in rows if row.get("median_ms")]
    return f": {', '.join(timed)}" if timed else ""
