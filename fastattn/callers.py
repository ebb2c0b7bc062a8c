"""Warnings that name the line of the program that called fastattn, not one of ours or torch's."""

from __future__ import annotations

import sys
import warnings

OURS = ("fastattn", "torch")


def warn(sentence: str, category: type[Warning] = RuntimeWarning) -> None:
    """Warn, at the first line on the way out that is neither ours nor torch's; the outermost where there is none."""
    level = 1
    frame = sys._getframe(1)
    while frame.f_back is not None and str(frame.f_globals.get("__name__")).split(".")[0] in OURS:
        frame = frame.f_back
        level += 1
    warnings.warn(sentence, category, stacklevel=level + 1)
