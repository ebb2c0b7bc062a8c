"""The steps of `make gpu`: what each runs in children, and what it keeps of what they say.

A step returns whether all was well (None: it was not finished) and a sentence. What a step has a verdict of is run
again only where `run.wanted` says so.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from fastattn.bench.gpu import cells as gpu_cells
from fastattn.bench.gpu import run_tests as gpu_tests
from fastattn.bench.gpu.child import Child, Ending
from fastattn.bench.gpu.children import Outcome, Queue, ended, objects
from fastattn.bench.measure.rows import BACKEND_KEY
from fastattn.building import nvcc
from fastattn.building.compiler import BuildError
from fastattn.testing import CASES

if TYPE_CHECKING:
    from fastattn.bench.gpu.pipeline import Run

BACKENDS = {"cuda": ("cuda", "triton"), "cpu": ("cpu", "reference")}
"""Whose calls are tried on each device; Triton's interpreter, on a CPU, takes minutes."""

LONGEST_BUILD = 120.0
LONGEST_SMOKE = 40.0
LONGEST_MEMCHECK = 60.0
SILENCE = 30.0
"""Seconds without a sign of life after which a case hangs."""
SMOKE_SILENCE = 25.0
"""The same for a smallest call, once torch is imported: it is named before LONGEST_SMOKE ends it without a stack."""

MEMCHECK_LINES = 40
"""Lines of compute-sanitizer that are kept."""


def build(run: Run, seconds: float) -> Outcome:
    """The CPU library, whose build needs no GPU, and the CUDA backend's for a GPU where nvcc is; and what there is."""
    limit = min(seconds, LONGEST_BUILD)
    commands = (["build"], *([["build", "--cuda"]] if _builds_cuda(run) else []), ["info"])
    endings: dict[str, Ending] = {}

    def one(command: list[str]) -> None:
        child = run.child(["fastattn.cli", *command], limit, float("inf"))
        said = run.record.setdefault("build", {})[" ".join(command)] = []
        for line in run.listen(child):
            said.append(line)
        endings[" ".join(command)] = ended(child)

    run.together(*(lambda command=command: one(command) for command in commands))
    words = [f"{name} {each.words}" for name, each in endings.items() if each.words]
    ok = None if any(each.code is None for each in endings.values()) else not words
    return ok, ", ".join(words) or "the libraries are there; Triton compiles at the first call"


def _builds_cuda(run: Run) -> bool:
    """Whether the CUDA backend's library is wanted here, and can be made."""
    if run.settings.device != "cuda":
        return False
    try:
        nvcc.find_nvcc()
    except BuildError:
        return False
    return True


def smoke(run: Run, seconds: float) -> Outcome:
    """The smallest call of each backend, one after the other: who fails is left out of what follows."""
    until = run.now() + seconds
    found = run.record.setdefault("smoke", {})
    for backend in BACKENDS[run.settings.device]:
        if not run.wanted(found.get(backend, {}).get("ok")) or run.now() >= until:
            continue
        if backend in found and found[backend]["ok"] is False:
            run.once_more("smoke", backend, found[backend]["words"])
        found[backend] = _smoke(run, backend, min(LONGEST_SMOKE, until - run.now()))
        run.say(f"smoke {backend}: {found[backend]['words'] or 'as PyTorch says'}")
        run.save()
        if found[backend]["ok"] is False and backend == "cuda" and run.now() < until:
            found[backend]["memcheck"] = _memcheck(run, min(LONGEST_MEMCHECK, until - run.now()))
    bad = [backend for backend, each in found.items() if each["ok"] is False]
    waiting = [backend for backend in BACKENDS[run.settings.device] if found.get(backend, {}).get("ok") is None]
    good = [f"{backend} off by {each['difference']:.2g}" for backend, each in found.items() if each["ok"]]
    words = [
        *good,
        *(f"{backend} fails and is left out" for backend in bad),
        *(f"{name} not tried" for name in waiting),
    ]
    return False if bad else None if waiting else True, ", ".join(words)


def _smoke(run: Run, backend: str, seconds: float) -> dict[str, Any]:
    began = run.now()
    child = run.child(["fastattn.bench.gpu.smoke", backend, run.settings.device], seconds, SMOKE_SILENCE)
    said: dict[str, Any] = {"difference": None, "ok": False}
    for line in objects(run.listen(child)):
        said |= line
    ending = ended(child)
    words = "" if ending.well else ending.sentence if said["difference"] is None else f"off by {said['difference']:.3g}"
    cut = ending.code is None and seconds < LONGEST_SMOKE
    return {
        **said,
        "ok": None if cut else ending.well,
        "seconds": round(run.now() - began, 1),
        "words": words,
        "stack": list(ending.stack),
        "tail": [] if ending.well else list(ending.tail),
    }


def _memcheck(run: Run, seconds: float) -> list[str]:
    """What compute-sanitizer says of the CUDA backend's smallest call."""
    folders = [os.environ.get("PATH", ""), os.path.join(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin")]
    program = shutil.which("compute-sanitizer", path=os.pathsep.join(folders))
    if program is None:
        return ["compute-sanitizer is not installed"]
    under = [program, "--tool", "memcheck", "--print-limit", "8"]
    launch_by_launch = {"CUDA_LAUNCH_BLOCKING": "1"}
    child = run.child(["fastattn.bench.gpu.smoke", "cuda", "cuda"], seconds, float("inf"), launch_by_launch, under)
    lines = list(run.listen(child))
    return [*lines[:MEMCHECK_LINES], *filter(None, [ended(child).words])]


def backends(run: Run) -> list[str]:
    """Those whose smallest call did not fail."""
    found = run.record.get("smoke", {})
    return [name for name in BACKENDS[run.settings.device] if found.get(name, {}).get("ok") is not False]


def check(run: Run, seconds: float) -> Outcome:
    """`fastattn check` of each backend on the device, side by side. What hangs costs its case."""
    rows = run.record.setdefault("checks", [])
    until = run.now() + seconds
    chosen = backends(run)

    def verdict(backend: str, case: str) -> bool | None:
        """None for a case that has not run; a refusal is as good as a result."""
        of_case = [row for row in rows if (row[BACKEND_KEY], row["case"]) == (backend, case)]
        return None if not of_case else of_case[0]["ok"] is not False

    def put(row: dict[str, Any]) -> None:
        if verdict(row[BACKEND_KEY], row["case"]) is False:
            before = next(each for each in rows if (each[BACKEND_KEY], each["case"]) == (row[BACKEND_KEY], row["case"]))
            run.once_more("check", f"{row[BACKEND_KEY]}, {row['case']}", before["words"])
        rows[:] = [each for each in rows if (each[BACKEND_KEY], each["case"]) != (row[BACKEND_KEY], row["case"])] + [
            row
        ]

    def one(backend: str) -> None:
        def command(cases: list[str], seconds: float) -> Child:
            only = f"^({'|'.join(map(re.escape, cases))})$"
            flags = ["--device", run.settings.device, "--backends", backend, "--only", only, "--lines"]
            return run.child(["fastattn.cli", "check", *flags], seconds, SILENCE)

        def lost(case: str, ending: Ending) -> None:
            row = {BACKEND_KEY: backend, "case": case, "ok": False, "words": ending.sentence}
            put(row | {"stack": list(ending.stack), "tail": list(ending.tail)})

        names = [name for name in CASES if run.wanted(verdict(backend, name))]
        Queue(run, command, lambda line: put(line["row"]), lost).go(names, until)

    if chosen:
        run.together(*(lambda backend=backend: one(backend) for backend in chosen))
    missing = [name for backend in chosen for name in CASES if verdict(backend, name) is None]
    right, wrong = (sum(row["ok"] is each for row in rows) for each in (True, False))
    words = [f"{right} right, {wrong} wrong, {len(rows) - right - wrong} refused"]
    words += [f"{len(missing)} not reached"] if missing else []
    left_out = [name for name in BACKENDS[run.settings.device] if name not in chosen]
    words += [f"without {', '.join(left_out)}"] if left_out else []
    return False if wrong else None if missing or left_out else True, ", ".join(words)


def tune(run: Run, seconds: float) -> Outcome:
    """Candidate rows of the Triton backend's tile table, beside the rows in it."""
    rows = run.record["tune"] = []
    task = {"device": run.settings.device, "seconds": seconds}
    variables = {"TRITON_INTERPRET": "1"} if run.settings.device == "cpu" else {}
    child = run.child(
        ["fastattn.kernels.host.tune", json.dumps(task)], seconds + gpu_cells.AFTER_THE_END, float("inf"), variables
    )
    for row in objects(run.listen(child)):
        rows.append(row)
        if row["ms"] is not None:
            run.say(f"{row['tflops']:.1f} TFLOP/s, {row['table_ms'] / row['ms']:.2f}x: {row['mask']} {row['row']}")
    ending = ended(child)
    timed = sum(row["ms"] is not None for row in rows)
    words = f"{timed} rows timed, {len(rows) - timed} refused"
    ok = None if ending.code is None else ending.well
    return ok, ", ".join(filter(None, [words, ending.words]))


def _cells(step: str) -> Callable[[Run, float], Outcome]:
    return lambda run, seconds: gpu_cells.time_cells(run, step, seconds, backends(run), BACKENDS[run.settings.device])


def _tests(step: str) -> Callable[[Run, float], Outcome]:
    return lambda run, seconds: gpu_tests.run_tests(run, step, seconds, backends(run))


DOES: dict[str, Callable[[Run, float], Outcome]] = {
    "build": build,
    "smoke": smoke,
    "check": check,
    "headline": _cells("headline"),
    "instructions": _tests("instructions"),
    "tests": _tests("tests"),
    "sweep": _cells("sweep"),
    "flex": _cells("flex"),
    "sanitizers": _tests("sanitizers"),
    "tune": tune,
}
STEPS = tuple(name for name in DOES if name != "tune")
"""In order of what each is worth where the budget ends after it; tuning is asked for by name."""
