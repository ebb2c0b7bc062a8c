"""A process that ends itself when nothing is heard from it, and says where it stood: children of `make gpu`.

The parent gives the seconds in FASTATTN_SILENCE; without it nothing is watched. A kernel that never ends holds its
process in a call of the driver, which no exception and no signal of Python reaches: faulthandler's own thread ends it.
"""

from __future__ import annotations

import faulthandler
import os
import re
import sys
from collections.abc import Iterable
from typing import Any, TextIO

SILENCE = "FASTATTN_SILENCE"
"""The variable: seconds without a sign of life after which a process ends itself."""

BROKEN_DEVICE = 70
"""Exit code after an error that a CUDA context does not survive: the parent begins a new process."""

INNERMOST = 8
"""Calls of a stack that are kept."""

DUMP = re.compile(r"Timeout \(\d+:\d\d:\d\d(?:\.\d+)?\)!")
THREAD = re.compile(r"(?:Current thread|Thread) 0x[0-9a-f]+")
FRAME = re.compile(r'\s*File "(.*)", line (\d+) in (.*)')


class Watch:
    """What this process's silence is measured by; `file` gets the stacks when it lasts too long."""

    def __init__(self, file: TextIO | None = None) -> None:
        self.seconds = float(os.environ.get(SILENCE) or 0)
        self.file = file

    def heard(self) -> None:
        """A sign of life: the silence begins anew. A kernel that Triton has compiled is one, too."""
        if not self.seconds:
            return
        faulthandler.dump_traceback_later(self.seconds, exit=True, file=self.file or sys.stderr)
        compilation = getattr(getattr(sys.modules.get("triton"), "knobs", None), "compilation", None)
        if compilation is not None and compilation.listener is None:
            compilation.listener = self._compiled

    def _compiled(self, **_: Any) -> None:
        self.heard()

    def stop(self) -> None:
        """Nothing is expected until the next sign of life."""
        if self.seconds:
            faulthandler.cancel_dump_traceback_later()


def stack(lines: Iterable[str]) -> tuple[str, ...] | None:
    """The innermost calls of the main thread where `lines` hold what a Watch wrote; None where they hold none.

    faulthandler writes the threads with the newest first, and each with the innermost call first.
    """
    found: list[str] | None = None
    for line in lines:
        if DUMP.match(line) or (found is not None and THREAD.match(line)):
            found = []
        elif found is not None and (frame := FRAME.match(line)):
            found.append(f"{frame[1]}:{frame[2]} in {frame[3]}")
    return None if found is None else tuple(found[:INNERMOST])


def broken_device() -> str | None:
    """What the CUDA context of this process says where no later call can use it; None where all is well."""
    import torch

    if not torch.cuda.is_initialized():
        return None
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        return (str(error).splitlines() or ["the CUDA context is broken"])[0]
    return None
