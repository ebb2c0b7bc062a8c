"""A child process read line by line, with an end: what crashes, hangs or takes too long costs itself alone."""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from fastattn.bench.gpu import watchdog

LAST_LINES = 12
"""Last lines that an ending keeps."""

STACK_LINES = 400
"""Last lines in which the stacks of a process that hung are looked for."""


class Ending(NamedTuple):
    """How a child ended: its exit code, or None where it was stopped; why, in words; the last lines it said; and
    where it hung, the innermost call first (watchdog.py), empty where it did not.
    """

    code: int | None
    words: str
    tail: tuple[str, ...]
    stack: tuple[str, ...] = ()

    @property
    def well(self) -> bool:
        return self.code == 0

    @property
    def sentence(self) -> str:
        """Why, with where it hung or the last line it said."""
        last = self.stack[:1] or self.tail[-1:]
        return ": ".join([self.words, *last])


class Child:
    """One process. Iterate over `lines()`, then look at `ending`.

    Args:
        command: the words of the command line.
        seconds: it is stopped after so many.
        silence: it is stopped when it has said nothing for so many seconds.
        environment: variables beside those of this process.
        idle: called when everything that it said has been read, and it goes on.
    """

    def __init__(
        self,
        command: Sequence[str],
        seconds: float,
        silence: float = float("inf"),
        environment: dict[str, str] | None = None,
        now: Callable[[], float] = time.monotonic,
        idle: Callable[[], None] = lambda: None,
    ):
        self.command, self.seconds, self.silence, self.now = command, seconds, silence, now
        self.environment, self.idle = environment or {}, idle
        self.ending: Ending | None = None
        self.stopped = threading.Event()

    def stop(self) -> None:
        """From another thread: `lines` ends it within a second."""
        self.stopped.set()

    def lines(self) -> Iterator[str]:
        """What it says, stdout and stderr together, without line ends. Leaving early stops it."""
        until, heard = self.now() + self.seconds, self.now()
        tail: list[str] = []
        process = subprocess.Popen(
            self.command,
            env={**os.environ, **self.environment, "PYTHONUNBUFFERED": "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        said: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=_pump, args=(process, said), daemon=True).start()
        why = "was left early"
        try:
            while True:
                left = min(until, heard + self.silence) - self.now()
                if self.stopped.is_set():
                    why = "was stopped"
                    return
                if left <= 0:
                    why = (
                        f"took longer than {self.seconds:.0f} s"
                        if self.now() >= until
                        else f"said nothing for {self.silence:.0f} s"
                    )
                    return
                if said.empty():
                    self.idle()
                try:
                    line = said.get(timeout=min(left, 1.0))
                except queue.Empty:
                    continue
                if line is None:
                    why = ""
                    return
                heard = self.now()
                tail = [*tail, line][-STACK_LINES:]
                yield line
        finally:
            if why:
                _stop(process)
            code = process.wait()
            stack = () if why else watchdog.stack(tail) or ()
            words = why or ("hung" if stack else "" if code == 0 else _how(code))
            self.ending = Ending(None if why else code, words, tuple(tail[-LAST_LINES:]), stack)


def _pump(process: subprocess.Popen[str], said: queue.Queue[str | None]) -> None:
    for line in process.stdout or ():
        said.put(line.rstrip("\n"))
    said.put(None)


def _stop(process: subprocess.Popen[str]) -> None:
    """It, and everything that it started: ninja puts each compiler into a process group of its own, but the session
    stays the child's.
    """
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if os.getsid(int(path.name)) == process.pid:
                os.kill(int(path.name), signal.SIGKILL)


def _how(code: int) -> str:
    return f"ended with {code}" if code >= 0 else f"was killed by {signal.Signals(-code).name}"
