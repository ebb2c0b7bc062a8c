"""The steps of `make gpu`: what each runs in a child, and what it keeps of what the child says.

A step returns whether all was well (None: it was not finished) and a sentence.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from fastattn import nvcc
from fastattn.bench.child import Child, Ending
from fastattn.bench.rows import Row
from fastattn.bench.suite import PEERS, suite
from fastattn.compiler import BuildError

if TYPE_CHECKING:
    from fastattn.bench.pipeline import Run

TESTS = {
    "cuda": (
        ("-m", "gpu", "tests/sim"),
        ("-m", "gpu", "tests", "--ignore=tests/sim"),
        ("-m", "not gpu", *(f"tests/kernels/test_{name}.py" for name in ("attention", "features", "decode"))),
    ),
    "cpu": (("tests/cpu/test_attention.py",),),
}
"""Arguments of pytest. A GPU's: each instruction by itself, whose failures explain others; the rest of what only a GPU
runs; then the Triton room's own cases, which take the best device there is."""

TEST_LINE = re.compile(r"\[gw\d+\] (?:\[ *\d+%\] )?(PASSED|FAILED|ERROR|SKIPPED|XFAIL) (\S+::.+)")
PLAIN_TEST_LINE = re.compile(r"(\S+::.*?) (PASSED|FAILED|ERROR|SKIPPED|XFAIL)\b")
FAILURE_LINE = re.compile(r"(?:FAILED|ERROR) (\S+::.*?) - (.*)")
NOTHING_SELECTED = 5
"""pytest's exit code; 1 are failed tests, which have lines of their own."""

AFTER_THE_END = 5.0
"""Seconds that a worker gets to finish its cell once its time is up."""

Outcome = tuple[bool | None, str]


def build(run: Run, seconds: float) -> Outcome:
    """The CPU library, whose build needs no GPU, and the CUDA room's for a GPU where nvcc is; and what there is."""
    until = run.now() + seconds
    children = []
    for command in (["build"], *([["build", "--cuda"]] if _builds_cuda(run) else []), ["info"]):
        child = run.child(["fastattn.cli", *command], max(0.0, until - run.now()))
        run.record[" ".join(command)] = list(child.lines())
        children.append(_ended(child))
    words = [each.words for each in children if each.words]
    ok = None if any(each.code is None for each in children) else not words
    return ok, ", ".join(words) or "the libraries are there; Triton compiles at the first call"


def _builds_cuda(run: Run) -> bool:
    """Whether the CUDA room's library is wanted here, and can be made."""
    if run.settings.device != "cuda":
        return False
    try:
        nvcc.find_nvcc()
    except BuildError:
        return False
    return True


def test(run: Run, seconds: float) -> Outcome:
    """The tests that want a GPU, and the room's own on it."""
    found: dict[str, str] = {}
    why: dict[str, str] = {}
    endings = []
    until = run.now() + seconds
    for selection in TESTS[run.settings.device]:
        command = ["pytest", "-v", "--tb=short", "-p", "no:cacheprovider", "-n", str(run.settings.jobs), *selection]
        child = run.child(command, max(0.0, until - run.now()))
        for line in child.lines():
            if (match := TEST_LINE.match(line)) is not None:
                found[match[2].strip()] = match[1]
            elif (match := PLAIN_TEST_LINE.match(line)) is not None:
                found[match[1]] = match[2]
            elif (match := FAILURE_LINE.match(line)) is not None:
                why[match[1]] = match[2]
            else:
                continue
            run.record["tests"] = _counted(found, why)
        endings.append(_ended(child))
        run.save()
    stopped = [each.words for each in endings if each.code is None]
    broken = [each.words for each in endings if each.code not in (None, 0, 1, NOTHING_SELECTED)]
    counts = run.record.setdefault("tests", _counted(found, why))
    said = ", ".join(f"{counts[name]} {name}" for name in ("passed", "skipped") if counts[name])
    failed = f"{len(counts['failed'])} failed" if counts["failed"] else ""
    ok = False if broken or failed else None if stopped else True
    return ok, ", ".join(filter(None, [said or "nothing ran", failed, *broken, *stopped]))


def _counted(found: dict[str, str], why: dict[str, str]) -> dict[str, Any]:
    outcomes = list(found.values())
    failed = {name: why.get(name, "") for name, outcome in found.items() if outcome in ("FAILED", "ERROR")}
    skipped = outcomes.count("SKIPPED") + outcomes.count("XFAIL")
    return {"passed": outcomes.count("PASSED"), "skipped": skipped, "failed": failed}


def check(run: Run, seconds: float) -> Outcome:
    """`fastattn check` on the device, every room."""
    rows = run.record["checks"] = []
    child = run.child(["fastattn.cli", "check", "--device", run.settings.device, "--lines"], seconds)
    for row in _objects(child):
        rows.append(row)
    ending = _ended(child)
    right, wrong = (sum(row["ok"] is each for row in rows) for each in (True, False))
    words = f"{right} right, {wrong} wrong, {len(rows) - right - wrong} refused"
    ok = False if wrong or ending.code not in (None, 0) else None if ending.code is None else True
    return ok, ", ".join(filter(None, [words, ending.words]))


def bench(run: Run, seconds: float) -> Outcome:
    """The suite, cell by cell. A worker that dies takes its cell with it, and another one goes on."""
    rows = run.record.setdefault("rows", [])
    done = {f"{row['name'].rsplit('/', 1)[0]}" for row in rows}
    left = [cell.name for cell in suite(run.settings.device) if cell.name not in done]
    total, until = len(left) + len(done), run.now() + seconds
    providers = list(PEERS[run.settings.device])
    run.record["crashed"] = {}
    while left and run.now() < until:
        task = {"device": run.settings.device, "cells": left, "providers": providers, "seconds": until - run.now()}
        child = run.child(["fastattn.bench.worker", json.dumps(task)], until - run.now() + AFTER_THE_END)
        begun, before = None, len(left)
        for line in _objects(child):
            if "begin" in line:
                begun = line["begin"]
            elif "rows" in line:
                rows += line["rows"]
                left.remove(line["cell"])
                begun = None
                run.save()
                run.say(f"[{total - len(left)}/{total}] {line['cell']}")
            elif "left" in line:
                until = run.now()
        ending = _ended(child)
        if begun is not None and run.now() < until:
            run.record["crashed"][begun] = ": ".join([ending.words, *ending.tail[-1:]])
            left.remove(begun)
        elif not ending.well and len(left) == before and run.now() < until:
            run.record["crashed"][left.pop(0)] = ": ".join([ending.words, *ending.tail[-1:]])
    run.record["left"] = left
    wrong = [row for row in rows if Row.of(row).failed]
    words = f"{total - len(left)} of {total} cells" + (f", {len(wrong)} wrong" if wrong else "")
    crashed = f"{len(run.record['crashed'])} crashed" if run.record["crashed"] else ""
    return False if wrong or crashed else None if left else True, ", ".join(filter(None, [words, crashed]))


def tune(run: Run, seconds: float) -> Outcome:
    """Candidate rows of the Triton room's tile table, beside the rows in it."""
    rows = run.record["tune"] = []
    task = {"device": run.settings.device, "seconds": seconds}
    variables = {"TRITON_INTERPRET": "1"} if run.settings.device == "cpu" else {}
    child = run.child(["fastattn.kernels.tune", json.dumps(task)], seconds + AFTER_THE_END, variables)
    for row in _objects(child):
        rows.append(row)
        if row["ms"] is not None:
            run.say(f"{row['tflops']:.1f} TFLOP/s, {row['table_ms'] / row['ms']:.2f}x: {row['mask']} {row['row']}")
    ending = _ended(child)
    timed = sum(row["ms"] is not None for row in rows)
    words = f"{timed} rows timed, {len(rows) - timed} refused"
    ok = None if ending.code is None else ending.well
    return ok, ", ".join(filter(None, [words, ending.words]))


DOES: dict[str, Callable[[Run, float], Outcome]] = {
    "build": build,
    "test": test,
    "check": check,
    "bench": bench,
    "tune": tune,
}


def _objects(child: Child) -> Iterator[dict[str, Any]]:
    """The lines that are JSON objects; others are warnings of libraries."""
    for line in child.lines():
        if line.startswith("{"):
            try:
                yield json.loads(line)
            except ValueError:
                continue


def _ended(child: Child) -> Ending:
    return child.ending or Ending(None, "did not run", ())
