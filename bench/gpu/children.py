"""How steps of `make gpu` hear children: JSON lines, and a queue of pieces of work that a crash or a hang costs one of.

{"begin": name}     {"at": "who within it"}     {"done": name, ...}
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from fastattn.bench.gpu.child import Child, Ending

if TYPE_CHECKING:
    from fastattn.bench.gpu.pipeline import Run

Outcome = tuple[bool | None, str]

AFTER_THE_END = 5.0
"""Seconds that a child gets to finish its piece once its time is up."""


def objects(lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    """The lines that are JSON objects; others are warnings of libraries."""
    for line in lines:
        if line.startswith("{"):
            try:
                yield json.loads(line)
            except ValueError:
                continue


def ended(child: Child) -> Ending:
    return child.ending or Ending(None, "did not run", ())


class Queue:
    """Pieces of work by name, done in order by one child after another.

    Args:
        command: the child for these names and so many seconds.
        done: is given each {"done": name, ...}.
        lost: is given the name of a piece that its child did not survive, how that ended, and at what it was.
    """

    def __init__(
        self,
        run: Run,
        command: Callable[[list[str], float], Child],
        done: Callable[[dict[str, Any]], None],
        lost: Callable[[str, Ending], None],
    ):
        self.run, self.command, self.done, self.lost = run, command, done, lost
        self.at = ""
        """What the child said last that it is at, within the piece that it began."""

    def go(self, names: list[str], until: float) -> list[str]:
        """Returns the names that there was no time for."""
        left = list(names)
        while left and self.run.now() < until:
            child = self.command(left, until - self.run.now() + AFTER_THE_END)
            begun, before, self.at = None, len(left), ""
            for line in objects(self.run.listen(child)):
                if "begin" in line:
                    begun, self.at = line["begin"], ""
                elif "at" in line:
                    self.at = line["at"]
                elif line.get("done") in left:
                    self.done(line)
                    left.remove(line["done"])
                    begun = None
            ending = ended(child)
            if ending.code is None and (ending.words == "was stopped" or self.run.now() >= until):
                break
            if begun in left:
                self._lose(left, begun, ending)
            elif not ending.well and len(left) == before:
                self._lose(left, left[0], ending)  # it died before it began
            elif ending.well and len(left) == before:
                break  # it had no time to begin one
        return left

    def _lose(self, left: list[str], name: str, ending: Ending) -> None:
        with self.run.lock:
            self.lost(name, ending)
            left.remove(name)
            self.run.save()
