"""Progress of a run: rich's bar on a terminal, plain lines to stderr elsewhere, for which rich has no mode."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich import progress
    from rich.console import Console


MANY = 100
"""Steps beyond which plain lines come only every tenth step."""


class Progress:
    """`step` begins the next of `total` pieces, `say` changes the words. This base shows nothing."""

    def __init__(self, total: int):
        self.total, self.done = total, 0

    def step(self, words: str) -> None:
        self.done += 1

    def say(self, words: str) -> None:
        pass


class Lines(Progress):
    """A line to stderr a step; where there are many steps, only every tenth."""

    def step(self, words: str) -> None:
        super().step(words)
        if self.total > MANY and self.done % 10 and self.done != self.total:
            return
        print(f"[{self.done}/{self.total}] {words}", file=sys.stderr, flush=True)


class Bar(Progress):
    """A task of rich's."""

    def __init__(self, total: int, bar: progress.Progress):
        super().__init__(total)
        self.bar, self.task = bar, bar.add_task("setting up", total=total)

    def step(self, words: str) -> None:
        super().step(words)
        self.bar.update(self.task, completed=self.done - 1, description=words)

    def say(self, words: str) -> None:
        self.bar.update(self.task, description=words)


@contextmanager
def progress_on(console: Console, total: int) -> Iterator[Progress]:
    """On a terminal a bar at its bottom, above which tables scroll and which is gone at the end."""
    if not console.is_terminal:
        yield Lines(total)
        return
    from rich import progress

    columns = (
        progress.SpinnerColumn(),
        progress.TextColumn("{task.description:<34.34}"),
        progress.BarColumn(bar_width=24),
        progress.MofNCompleteColumn(),
        progress.TimeElapsedColumn(),
    )
    with progress.Progress(*columns, console=console, transient=True) as bar:
        yield Bar(total, bar)
