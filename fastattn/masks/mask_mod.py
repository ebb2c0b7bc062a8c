"""Mask functions of transformers and FlexAttention read as masks: called with symbols, one answers with a rule.

Both describe a mask by a function (batch_idx, head_idx, q_idx, kv_idx) -> bool, made of comparisons and of
look-ups in small tables. Called with this file's symbols for indices, it says what it compares: a window, chunks, equal
ids. Nothing of size [q_len, kv_len] is made, and it works while torch.compile traces. A function that says something
else raises `Unreadable`.

Positions count from the start of the sequence: query i of a call sits at i + q_offset, key j at j + kv_offset.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fastattn.masks.base import is_int
from fastattn.masks.kinds import Mask
from fastattn.masks.mask_mod_rules import (
    All,
    Call,
    Either,
    Near,
    NotNegative,
    Rule,
    SameGroup,
    SameId,
    Unreadable,
    groups,
    undecided,
)

__all__ = ["Call", "Unreadable", "read"]


def read(function: Callable[..., Any], call: Call, *, packed: bool = False) -> Mask:
    """The mask that a mask function describes for one call.

    Args:
        packed: numbers looked up and compared by order are positions within packed sequences, which grow by one from
            token to token, and equal ids lie together: transformers makes its tables so. Of anybody else's tables
            nothing is known, and such a comparison has no rule.

    Raises:
        Unreadable: it does something that has no rule here.
    """
    try:
        with _Lookups(packed):
            rule = function(Place("batch"), Place("head"), Place("q"), Place("kv"))
    except Unreadable:
        raise
    except Exception as failure:  # of anybody's code, on what it was not written for
        raise Unreadable(f"{type(failure).__name__}: {failure}") from failure
    if not isinstance(rule, Rule):
        raise Unreadable(f"a rule is needed, got {type(rule).__name__}")
    return rule.mask(call)


class _Lookups(TorchFunctionMode):
    """`table[batch_idx, q_idx]` and `table[q_idx]` with symbols for indices."""

    def __init__(self, packed: bool) -> None:
        super().__init__()
        self.packed = packed
        # By the id of a table [sequence], which is held so that the id stays its own: the same as [1, sequence].
        self.rows: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is Tensor.__getitem__:
            table, index = args
            places = [each for each in (index if isinstance(index, tuple) else (index,)) if isinstance(each, Place)]
            axes = [each.axis for each in places]
            if axes == ["batch"]:
                return PerItem(table)
            if axes in (["batch", "q"], ["batch", "kv"]) and places[1].is_plain:
                return self.looked(table, table, axes[1])
            if axes in (["q"], ["kv"]) and places[0].is_plain and table.dim() == 1:
                return self.looked(table, self.rows.setdefault(id(table), (table, table[None]))[1], axes[0])
            if places:
                raise Unreadable(f"a table looked up by {', '.join(axes)}")
        return func(*args, **(kwargs or {}))

    def looked(self, given: Tensor, table: Tensor, axis: str) -> Looked:
        if given.is_floating_point() or given.is_complex() or given.dtype == torch.bool:
            raise Unreadable(f"a table of {given.dtype}")
        return Looked(table, axis, positions=self.packed)


# ---- what is compared


@dataclass(frozen=True, eq=False)
class PerItem:
    """A number for each batch item, [batch]: `table`, or `table` with the other sign."""

    table: Tensor
    minus: bool = False

    @property
    def values(self) -> Tensor:
        return -self.table if self.minus else self.table

    def same(self, other: PerItem | None) -> bool:
        """Whether the two are one number."""
        return other is not None and other.table is self.table and other.minus == self.minus


class Place:
    """The index on an axis, moved by a number and by one for each batch item."""

    __hash__ = None  # type: ignore[assignment]
    __bool__ = undecided

    def __init__(self, axis: str, moved: int = 0, moved_by: PerItem | None = None) -> None:
        self.axis, self.moved, self.moved_by = axis, moved, moved_by

    @property
    def is_plain(self) -> bool:
        """Whether it is the index itself."""
        return type(self) is Place and self.is_unmoved

    @property
    def is_unmoved(self) -> bool:
        """Whether nothing was added to it."""
        return self.moved == 0 and self.moved_by is None

    def moved_alike(self, other: Place) -> bool:
        """Whether the same number of each batch item, or none, was added to both."""
        return self.moved_by is other.moved_by if self.moved_by is None else self.moved_by.same(other.moved_by)

    def like(self, moved: int, moved_by: PerItem | None) -> Place:
        """The same, moved differently."""
        return Place(self.axis, moved, moved_by)

    def __add__(self, other: Any) -> Place:
        if isinstance(other, PerItem):
            if self.moved_by is not None:
                raise Unreadable("a place moved twice by a table")
            return self.like(self.moved, other)
        if not isinstance(other, int):
            raise Unreadable(f"a place and a {type(other).__name__}")
        return self.like(self.moved + other, self.moved_by)

    def __sub__(self, other: Any) -> Any:
        if isinstance(other, Place):
            return Between(self, other)
        return self + (PerItem(other.table, not other.minus) if isinstance(other, PerItem) else -other)

    def __floordiv__(self, size: Any) -> Group:
        if not is_int(size) or size < 1:
            raise Unreadable(f"groups of {size!r}")
        return Group(self, size)

    def same_scale(self, other: Place) -> bool:
        """Whether the two can be compared."""
        return type(other) is type(self)

    def at_least(self, other: Any, more: int) -> Rule:
        """self >= other + more."""
        if isinstance(other, int) and self.is_plain and self.axis == "q" and other + more <= 0:
            return All()  # no position is negative
        if not isinstance(other, Place) or not self.same_scale(other) or not self.moved_alike(other):
            raise Unreadable("a place compared with something else")
        by = other.moved - self.moved + more  # own index >= the other's + by
        within = type(self) is Looked
        if (self.axis, other.axis) == ("kv", "q"):
            return Near(by, None, within)
        if (self.axis, other.axis) == ("q", "kv"):
            return Near(None, -by, within)
        raise Unreadable(f"{self.axis} compared with {other.axis}")

    def __ge__(self, other: Any) -> Rule:
        return self.at_least(other, 0)

    def __gt__(self, other: Any) -> Rule:
        return self.at_least(other, 1)

    def __le__(self, other: Any) -> Rule:
        return other.at_least(self, 0)

    def __lt__(self, other: Any) -> Rule:
        return other.at_least(self, 1)

    def new_ones(self, *size: Any, **kwargs: Any) -> Rule:
        """Where a conjunction starts."""
        return All()

    def new_zeros(self, *size: Any, **kwargs: Any) -> Rule:
        """Where a disjunction starts."""
        return Either()


class Looked(Place):
    """A table's entries [batch, sequence] at the queries or at the keys: ids; or, where somebody vouches for it,
    positions within packed sequences, which grow by one from token to token.
    """

    __hash__ = None

    def __init__(
        self, table: Tensor, axis: str, moved: int = 0, moved_by: PerItem | None = None, *, positions: bool
    ) -> None:
        super().__init__(axis, moved, moved_by)
        self.table, self.positions = table, positions

    def like(self, moved: int, moved_by: PerItem | None) -> Place:
        return Looked(self.table, self.axis, moved, moved_by, positions=self.positions)

    def at_least(self, other: Any, more: int) -> Rule:
        if not self.positions:
            raise Unreadable("numbers looked up, compared by order")
        return super().at_least(other, more)

    def same_scale(self, other: Place) -> bool:
        return isinstance(other, Looked) and other.table is self.table

    def __ge__(self, other: Any) -> Rule:
        if is_int(other) and other == 0 and self.is_unmoved:
            return NotNegative(self.table)
        return self.at_least(other, 0)

    def __eq__(self, other: object) -> Rule:  # type: ignore[override]
        if not isinstance(other, Looked) or not self.same_scale(other) or {self.axis, other.axis} != {"q", "kv"}:
            raise Unreadable("a table's entry equal to something else")
        if self.moved != other.moved or not self.moved_alike(other):
            raise Unreadable("a table's entries moved apart")
        return SameId(self.table)


class Group:
    """floor(place / size)."""

    __hash__ = None  # type: ignore[assignment]
    __bool__ = undecided

    def __init__(self, place: Place, size: int) -> None:
        self.place, self.size = place, size

    def __eq__(self, other: object) -> Rule:  # type: ignore[override]
        mine = self.place
        theirs = other.place if isinstance(other, Group) and other.size == self.size else None
        if theirs is None or not mine.same_scale(theirs) or {mine.axis, theirs.axis} != {"q", "kv"}:
            raise Unreadable("a group equal to something else")
        if mine.moved != theirs.moved or not mine.moved_alike(theirs):
            raise Unreadable("groups that start apart")
        moved = mine.moved if mine.moved_by is None else mine.moved + mine.moved_by.values.long()[:, None]
        if isinstance(mine, Looked):
            return SameId(groups(mine.table + moved, self.size), grouped=True)
        return SameGroup(self.size, moved)


class Between:
    """left - right, two places."""

    def __init__(self, left: Place, right: Place) -> None:
        self.left, self.right = left, right

    def __le__(self, most: int) -> Rule:
        return self.left <= self.right + most

    def __lt__(self, end: int) -> Rule:
        return self.left < self.right + end

    def __ge__(self, least: int) -> Rule:
        return self.left >= self.right + least

    def __gt__(self, end: int) -> Rule:
        return self.left > self.right + end

    def __abs__(self) -> Distance:
        return Distance(self.left, self.right)

    abs = __abs__


class Distance:
    """|left - right|."""

    def __init__(self, left: Place, right: Place) -> None:
        self.left, self.right = left, right

    def __le__(self, most: int) -> Rule:
        return (self.left <= self.right + most) & (self.left >= self.right - most)

    def __lt__(self, end: int) -> Rule:
        return self <= end - 1
