"""A progress line: a bar on a terminal, plain lines to stderr elsewhere."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console


MANY = 100
"""Steps beyond which plain lines come only every tenth step."""


class Progress:
    """`step` begins the next of `total` pieces, `say` changes the words. A context manager. This base shows nothing."""

    def __init__(self, total: int):
        self.total, self.done = total, 0

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *failure: object) -> None:
        pass

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
    """rich's bar at the bottom of the terminal, tables scroll above it."""

    def __init__(self, total: int, console: Console):
        super().__init__(total)
        from rich import progress

        self.bar = progress.Progress(
            progress.SpinnerColumn(),
            progress.TextColumn("{task.description:<34.34}"),
            progress.BarColumn(bar_width=24),
            progress.MofNCompleteColumn(),
            progress.TimeElapsedColumn(),
            console=console,
            transient=True,
        )
        self.task: Any = self.bar.add_task("setting up", total=total)

    def __enter__(self) -> Progress:
        self.bar.start()
        return self

    def __exit__(self, *failure: object) -> None:
        self.bar.stop()

    def step(self, words: str) -> None:
        super().step(words)
        self.bar.update(self.task, completed=self.done - 1, description=words)

    def say(self, words: str) -> None:
        self.bar.update(self.task, description=words)


def progress_on(console: Console, total: int) -> Progress:
    return Bar(total, console) if console.is_terminal else Lines(total)
