"""What pytest does, as JSON lines for `make gpu`: `pytest -p fastattn.bench.gpu.pytest_lines`.

    {"begin": id}    {"test": id, "outcome": "passed", "seconds": 0.1, "words": "", "stack": []}
    {"collection": file, "outcome": "failed", "words": "..."}    {"internal": "..."}

Outcomes are pytest's own: passed, failed, skipped, and error for what fails before or after the test. A test that hangs
(watchdog.py) or leaves a CUDA context that no later one can use ends its process; pytest-xdist starts another one, and
the test's line says where it hung. Tests named in the file of FASTATTN_TESTS_DONE, an id a line, are left out.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from fastattn.bench.gpu import watchdog

DONE, STACKS = "FASTATTN_TESTS_DONE", "FASTATTN_STACKS"
"""Variables: the file of ids, and the folder for what the processes leave that end themselves."""

MOST_WORDS = 1500
OUT = os.dup(1)
"""Where pytest began to write; what tests print is caught later."""


def say(line: dict[str, Any]) -> None:
    """On a line of its own, whatever pytest has begun to write."""
    os.write(OUT, f"\n{json.dumps(line)}\n".encode())


def pytest_configure(config: Any) -> None:
    """The process that reports, the one that runs tests, or both in one."""
    worker = getattr(config, "workerinput", {}).get("workerid")
    if worker is None:
        config.pluginmanager.register(Reporter())
    if worker is not None or not getattr(config.option, "numprocesses", None):
        config.pluginmanager.register(Watcher(worker or "main"))


def left_by(worker: str) -> str:
    """What a process wrote before it ended itself; empty where it wrote nothing."""
    path = Path(os.environ.get(STACKS, ""), f"{worker}.txt")
    return path.read_text(errors="replace") if STACKS in os.environ and path.exists() else ""


class Watcher:
    """In a process that runs tests."""

    def __init__(self, worker: str) -> None:
        folder = os.environ.get(STACKS)
        self.file = Path(folder, f"{worker}.txt").open("w") if folder else None  # noqa: SIM115 - as long as the process
        self.watch = watchdog.Watch(self.file)

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config: Any, items: list[Any]) -> None:
        path = os.environ.get(DONE)
        done = set(Path(path).read_text().splitlines()) if path else set()
        left_out = [item for item in items if item.nodeid in done]
        if left_out:
            config.hook.pytest_deselected(items=left_out)
            items[:] = [item for item in items if item.nodeid not in done]
        # A test of each file in turn: a run that is cut has heard of all of them.
        seen: Counter[Path] = Counter()
        turns = {}
        for item in items:
            turns[item.nodeid] = seen[item.path]
            seen[item.path] += 1
        items.sort(key=lambda item: turns[item.nodeid])

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_protocol(self, item: Any) -> Any:
        self.watch.heard()
        yield
        self.watch.stop()
        broken = watchdog.broken_device()
        if broken is not None:
            if self.file is not None:
                self.file.write(f"it left a CUDA context that no later test can use: {broken}\n")
                self.file.flush()
            os._exit(watchdog.BROKEN_DEVICE)


class Reporter:
    """In the process that knows of all tests."""

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        say({"begin": nodeid})

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or report.skipped:
            outcome = report.outcome
        elif report.when == "???":
            outcome = "failed"
        elif report.failed:
            outcome = "error"
        else:
            return
        words, stack = _why(report), ()
        if report.when == "???":  # its process has ended; pytest-xdist says so in the place of a report
            left = left_by(report.node.gateway.id)
            stack = watchdog.stack(left.splitlines()) or ()
            words = "hung" if stack else left.strip().splitlines()[-1] if left.strip() else words
        line = {"test": report.nodeid, "outcome": outcome, "seconds": round(report.duration, 3), "words": words}
        say({**line, "stack": stack})

    def pytest_collectreport(self, report: Any) -> None:
        if not report.passed:
            say({"collection": report.nodeid, "outcome": report.outcome, "words": _why(report)})

    def pytest_internalerror(self, excrepr: Any) -> None:
        say({"internal": str(excrepr)[-MOST_WORDS:]})


def _why(report: Any) -> str:
    """The failure's own words and its place, or why it was skipped; empty for what passed."""
    if report.skipped:
        reason = report.longrepr[-1] if isinstance(report.longrepr, tuple) else ""
        return getattr(report, "wasxfail", "") or str(reason).removeprefix("Skipped: ")
    if report.passed:
        return ""
    crash = getattr(report.longrepr, "reprcrash", None)
    if crash is None:
        return report.longreprtext.strip()[-MOST_WORDS:]
    return f"{crash.message[:MOST_WORDS]} ({crash.path}:{crash.lineno})"
