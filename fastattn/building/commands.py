"""Commands that a build runs: in a group of processes of their own, within a time limit, and what became of them."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

VERSION_LIMIT = 30.0
BUILD_LIMIT = 1800.0
"""Seconds: to say a version, and for a whole build, which takes a minute or some on two cores."""

ENDS_WITHIN = 2.0  # seconds, of a command that is asked to

PASSING = frozenset(
    getattr(errno, name)
    for name in ("ENOSPC", "EDQUOT", "EFBIG", "EMFILE", "ENFILE", "ENOMEM", "EAGAIN", "EINTR", "EBUSY", "ETXTBSY",
                 "EIO", "ESTALE", "ETIMEDOUT")
    if hasattr(errno, name)
)  # fmt: skip
"""What the system refuses for now: disks and quotas that are full, limits that are reached."""

PASSING_WORDS = re.compile(
    r"No space left on device|Disk quota exceeded|File too large|Cannot allocate memory|memory exhausted|out of memory|"
    r"Too many open files|Resource temporarily unavailable|Text file busy|Stale file handle|Input/output error|"
    r"signal terminated program|died due to signal|command failed due to signal|unable to execute command: Killed",
    re.IGNORECASE,
)
"""The same in a compiler's words, and that a part of it was killed: what is short of memory dies so."""


class BuildError(RuntimeError):
    """A library is not there and could not be made; the message is a sentence."""


class PassingError(BuildError):
    """The same, for a reason that may be over at the next try: nothing remembers it."""


class Done(NamedTuple):
    """How a command ended: negative codes are signals, as subprocess has it; what it said, errors included."""

    code: int
    said: str

    @property
    def passing(self) -> bool:
        """Whether it failed for a reason that may be over soon. A shell adds 128 to a signal."""
        return self.code < 0 or self.code > 128 or (self.code != 0 and PASSING_WORDS.search(self.said) is not None)


def call(command: tuple[str, ...], limit: float, folder: Path | None = None) -> Done:
    """Run a command to its end, and everything that it starts; its words are English ones, and it has nothing to read.

    Raises:
        BuildError: it did not end within `limit` seconds; it and what it has started are then ended.
        PassingError: the system has no process, file or memory left for it.
        OSError: it cannot be started.
    """
    environment = os.environ | {"LC_ALL": "C"}
    try:
        process = subprocess.Popen(
            command, cwd=folder, env=environment, text=True, errors="replace", start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
    except OSError as refusal:
        if refusal.errno in PASSING:
            raise PassingError(f"{command[0]} cannot be started for now ({refusal})") from refusal
        raise
    with process:
        try:
            said, _ = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired as expired:
            _end(process)
            raise BuildError(f"{command[0]} did not end within {limit:g} s and was stopped") from expired
        except BaseException:  # who waits was interrupted: the terminal's signal does not reach another session
            _end(process)
            raise
    return Done(process.returncode, said)


def _end(process: subprocess.Popen[str]) -> None:
    """End a command and all that it started. ninja puts its commands into groups of their own, and passes a SIGTERM on;
    what is left of the session is ended after it, where the system lists it.
    """
    if not hasattr(os, "killpg"):
        process.kill()
    else:
        with contextlib.suppress(OSError):
            os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(ENDS_WITHIN)
        for group in {process.pid, *_groups(process.pid)}:
            with contextlib.suppress(OSError):
                os.killpg(group, signal.SIGKILL)
    if process.stdout is not None:  # what has left the session may keep it open, and is not waited for
        process.stdout.close()
    process.wait()


def _groups(session: int) -> Iterator[int]:
    """The groups of processes that a session has, where there is a list of processes."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError):
            _, _, group, its = path.read_text(errors="replace").rpartition(")")[2].split()[:4]
            if int(its) == session:
                yield int(group)
