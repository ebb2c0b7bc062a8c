"""What `replace_attention` did, module by module, and the way back."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

ALREADY = "it is on fastattn already"


class Replacement(NamedTuple):
    """One row of a report: the module's path, its class, whether it was changed, and how or why not."""

    path: str
    module: str
    changed: bool
    what: str
    attends: bool = True
    """Whether the module computes attention itself; what was changed besides does not count."""


class Report:
    """What `replace_attention` did. `str()` is a table, `restore()` undoes it, `len()` counts the exchanged modules.

    A report that is deep-copied or pickled together with its model, as an attribute of it or beside it in one
    container, is then the copy's: `restore()` acts on the copy alone. By itself it takes copies of its modules along,
    which nothing else holds.
    """

    def __init__(self) -> None:
        self.rows: list[Replacement] = []
        self._undo: list[Callable[[], None]] = []

    def add(self, row: Replacement, undo: Callable[[], None] | None = None) -> None:
        """A row, and what takes the change back."""
        self.rows.append(row)
        if undo is not None:
            self._undo.append(undo)

    def __len__(self) -> int:
        return sum(row.changed and row.attends for row in self.rows)

    def __str__(self) -> str:
        if not self.rows:
            return (
                "no torch.nn.MultiheadAttention found, nor another module that is known; attention that calls "
                "F.scaled_dot_product_attention itself runs on fastattn inside fastattn.patch()"
            )
        head = Replacement("path", "module", False, "")
        path, module = (max(len(str(row[column])) for row in (head, *self.rows)) for column in (0, 1))
        lines = [f"{'path':<{path}}  {'module':<{module}}  changed  what"]
        for row in self.rows:
            lines.append(f"{row.path:<{path}}  {row.module:<{module}}  {'yes' if row.changed else 'no':<7}  {row.what}")
        return "\n".join(lines)

    def restore(self) -> None:
        """Put back what was changed, last first. A second call does nothing."""
        while self._undo:
            self._undo.pop()()
