"""transformers' mask functions read as masks: a function of indices is asked with symbols, and answers with a rule.

transformers describes a mask by a function (batch_idx, head_idx, q_idx, kv_idx) -> bool, made of comparisons and of
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

from fastattn.masks import Causal, Chunked, Full, Mask, Segments, Window

__all__ = ["Call", "Unreadable", "read"]


class Unreadable(Exception):
    """A mask function does something that has no rule here."""


@dataclass(frozen=True)
class Call:
    """Where the queries and the keys of one call lie in their sequences; offsets may be 0-d int tensors."""

    q_len: int
    kv_len: int
    q_offset: int | Tensor
    kv_offset: int | Tensor
    device: torch.device

    def offset(self, more: int = 0) -> int | Tensor:
        """As masks take it: query i sits on the key axis at i + offset."""
        offset = self.q_offset - self.kv_offset + more
        return offset.reshape(1) if isinstance(offset, Tensor) else offset

    @property
    def starts_at_zero(self) -> bool:
        """Whether the first key is the sequence's first."""
        return not isinstance(self.kv_offset, Tensor) and self.kv_offset == 0

    def positions(self, axis: str) -> Tensor:
        """Of the queries ("q") or the keys ("kv"), int64 [q_len] or [kv_len]."""
        length, offset = (self.q_len, self.q_offset) if axis == "q" else (self.kv_len, self.kv_offset)
        return torch.arange(length, device=self.device) + offset

    def columns(self, table: Tensor, axis: str) -> Tensor:
        """Of a table [batch, sequence], those of the queries or of the keys."""
        length, offset = (self.q_len, self.q_offset) if axis == "q" else (self.kv_len, self.kv_offset)
        if isinstance(offset, Tensor):
            return table.index_select(1, self.positions(axis))
        if table.shape[1] < offset + length:
            raise Unreadable("a table shorter than the sequence")
        return table[:, offset : offset + length]


def read(function: Callable[..., Any], call: Call) -> Mask:
    """The mask that a mask function describes for one call.

    Raises:
        Unreadable: it does something that has no rule here.
    """
    try:
        with _Lookups():
            rule = function(Place("batch"), Place("head"), Place("q"), Place("kv"))
    except (TypeError, AttributeError, IndexError) as failure:
        raise Unreadable(f"{type(failure).__name__}: {failure}") from failure
    if not isinstance(rule, Rule):
        raise Unreadable(f"a rule is needed, got {type(rule).__name__}")
    return rule.mask(call)


class _Lookups(TorchFunctionMode):
    """`table[batch_idx, q_idx]` with symbols for indices."""

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
                return Looked(table, axes[1])
            if places:
                raise Unreadable(f"a table looked up by {', '.join(axes)}")
        return func(*args, **(kwargs or {}))


# ---- what is compared


@dataclass(frozen=True, eq=False)
class PerItem:
    """A number for each batch item, [batch]."""

    values: Tensor


class Place:
    """The index on an axis, moved by a number and by one for each batch item."""

    __hash__ = None  # type: ignore[assignment]

    def __init__(self, axis: str, moved: int = 0, moved_by: Tensor | None = None) -> None:
        self.axis, self.moved, self.moved_by = axis, moved, moved_by

    @property
    def is_plain(self) -> bool:
        """Whether it is the index itself."""
        return type(self) is Place and self.moved == 0 and self.moved_by is None

    def like(self, moved: int, moved_by: Tensor | None) -> Place:
        """The same, moved differently."""
        return Place(self.axis, moved, moved_by)

    def __add__(self, other: Any) -> Place:
        if isinstance(other, PerItem):
            if self.moved_by is not None:
                raise Unreadable("a place moved twice by a table")
            return self.like(self.moved, other.values)
        if not isinstance(other, int):
            raise Unreadable(f"a place and a {type(other).__name__}")
        return self.like(self.moved + other, self.moved_by)

    def __sub__(self, other: Any) -> Any:
        if isinstance(other, Place):
            return Between(self, other)
        return self + (PerItem(-other.values) if isinstance(other, PerItem) else -other)

    def __floordiv__(self, size: int) -> Group:
        return Group(self, size)

    def same_scale(self, other: Place) -> bool:
        """Whether the two can be compared."""
        return type(other) is type(self)

    def at_least(self, other: Any, more: int) -> Rule:
        """self >= other + more."""
        if isinstance(other, int) and self.is_plain and self.axis == "q" and other + more <= 0:
            return All()  # no position is negative
        if not isinstance(other, Place) or not self.same_scale(other) or self.moved_by is not other.moved_by:
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
    """A table's entries [batch, sequence] at the queries or at the keys: ids; or positions within packed sequences,
    which grow by one from token to token.
    """

    __hash__ = None

    def __init__(self, table: Tensor, axis: str, moved: int = 0, moved_by: Tensor | None = None) -> None:
        super().__init__(axis, moved, moved_by)
        self.table = table

    def like(self, moved: int, moved_by: Tensor | None) -> Place:
        return Looked(self.table, self.axis, moved, moved_by)

    def same_scale(self, other: Place) -> bool:
        return isinstance(other, Looked) and other.table is self.table

    def __ge__(self, other: Any) -> Rule:
        return NotNegative(self.table) if isinstance(other, int) and other == 0 else self.at_least(other, 0)

    def __eq__(self, other: object) -> Rule:  # type: ignore[override]
        if not isinstance(other, Looked) or not self.same_scale(other) or {self.axis, other.axis} != {"q", "kv"}:
            raise Unreadable("a table's entry equal to something else")
        return SameId(self.table)


class Group:
    """floor(place / size)."""

    __hash__ = None  # type: ignore[assignment]

    def __init__(self, place: Place, size: int) -> None:
        self.place, self.size = place, size

    def __eq__(self, other: object) -> Rule:  # type: ignore[override]
        mine = self.place
        theirs = other.place if isinstance(other, Group) and other.size == self.size else None
        if theirs is None or not mine.same_scale(theirs) or {mine.axis, theirs.axis} != {"q", "kv"}:
            raise Unreadable("a group equal to something else")
        if mine.moved != theirs.moved or (mine.moved_by is None) != (theirs.moved_by is None):
            raise Unreadable("groups that start apart")
        moved = mine.moved if mine.moved_by is None else mine.moved + mine.moved_by.long()[:, None]
        if isinstance(mine, Looked):
            return SameId(_groups(mine.table + moved, self.size), grouped=True)
        return SameGroup(self.size, moved)


class Between:
    """left - right, two places."""

    def __init__(self, left: Place, right: Place) -> None:
        self.left, self.right = left, right

    def __abs__(self) -> Distance:
        return Distance(self.left, self.right)


class Distance:
    """|left - right|."""

    def __init__(self, left: Place, right: Place) -> None:
        self.left, self.right = left, right

    def __le__(self, most: int) -> Rule:
        return (self.left <= self.right + most) & (self.left >= self.right - most)

    def __lt__(self, end: int) -> Rule:
        return self <= end - 1


# ---- what is said


class Rule:
    """What a comparison of symbols gives: what is visible."""

    device = None

    @property
    def parts(self) -> tuple[Rule, ...]:
        """Rules that must all hold."""
        return (self,)

    def to(self, *args: Any, **kwargs: Any) -> Rule:
        """Itself: a rule lies on no device."""
        return self

    def __and__(self, other: Any) -> Rule:
        if not isinstance(other, Rule):
            raise Unreadable(f"a rule and a {type(other).__name__}")
        return All(*self.parts, *other.parts)

    def __or__(self, other: Any) -> Rule:
        if not isinstance(other, Rule):
            raise Unreadable(f"a rule or a {type(other).__name__}")
        return Either(*(each for one in (self, other) for each in (one.ways if isinstance(one, Either) else (one,))))

    def mask(self, call: Call) -> Mask:
        """As a mask of the call's queries and keys."""
        return All(self).mask(call)


class All(Rule):
    """Every one of them; none hides nothing."""

    def __init__(self, *rules: Rule) -> None:
        self.rules = rules

    @property
    def parts(self) -> tuple[Rule, ...]:
        return self.rules

    def mask(self, call: Call) -> Mask:
        near = [each for each in self.rules if isinstance(each, Near)]
        tables = [each.table for each in self.rules if isinstance(each, NotNegative)]
        # Positions in packed sequences compare as indices do, where the sequence is the same.
        packed = any(each.within for each in near)
        if packed and not any(isinstance(each, SameId) and not each.grouped for each in self.rules):
            raise Unreadable("positions of packed sequences without the sequences")
        masks = [_window(near, call)] if near else []
        for each in self.rules:
            if isinstance(each, SameId):
                masks.append(each.ids(call, any(each.table is table for table in tables), packed and not each.grouped))
            elif isinstance(each, NotNegative):
                if not any(isinstance(other, SameId) and other.table is each.table for other in self.rules):
                    raise Unreadable("a sign without its ids")
            elif not isinstance(each, Near):
                masks.append(each.mask(call))
        if not masks:
            return Full()
        mask = masks[0]
        for more in masks[1:]:
            mask = mask & more
        return mask


class Either(Rule):
    """One of them at least; none shows nothing."""

    def __init__(self, *ways: Rule) -> None:
        self.ways = ways

    def mask(self, call: Call) -> Mask:
        if not self.ways:
            raise Unreadable("nothing is visible")
        mask = self.ways[0].mask(call)
        for way in self.ways[1:]:
            mask = mask | way.mask(call)
        return mask


@dataclass(frozen=True, eq=False)
class Near(Rule):
    """Keys from q + low to q + high, both included, None unbounded; `within` packed sequences."""

    low: int | None
    high: int | None
    within: bool


@dataclass(frozen=True, eq=False)
class SameGroup(Rule):
    """floor((q + moved) / size) == floor((kv + moved) / size); moved an int or [batch, 1]."""

    size: int
    moved: int | Tensor

    def mask(self, call: Call) -> Mask:
        if not isinstance(self.moved, Tensor) and self.moved == 0 and call.starts_at_zero:
            return Chunked(self.size, offset=call.offset(), validate=False)
        first = self.moved // self.size  # the group of position 0: ids start at 0
        q_ids, kv_ids = (_groups(call.positions(axis)[None] + self.moved, self.size) - first for axis in ("q", "kv"))
        return Segments(q_ids, kv_ids, sorted=True, validate=False)


@dataclass(frozen=True, eq=False)
class SameId(Rule):
    """Equal entries of one table [batch, sequence] at the query and at the key."""

    table: Tensor
    grouped: bool = False

    def ids(self, call: Call, hides: bool, ordered: bool) -> Mask:
        """As segments; `hides`: negative ids see nothing and are not seen; `ordered`: they never decrease."""
        ids = self.table.long() if hides else self.table.long() - self.table.amin()
        return Segments(call.columns(ids, "q"), call.columns(ids, "kv"), sorted=ordered, validate=False)


@dataclass(frozen=True, eq=False)
class NotNegative(Rule):
    """The entry of a table is not negative, at the query or at the key."""

    table: Tensor


def _window(near: list[Near], call: Call) -> Mask:
    lows = [each.low for each in near if each.low is not None]
    highs = [each.high for each in near if each.high is not None]
    low, high = max(lows) if lows else None, min(highs) if highs else None
    if low is None and high == 0:
        return Causal(offset=call.offset(), validate=False)
    # The window's centre: the query itself where it lies inside, else the bound that is there.
    if (low is None or low <= 0) and (high is None or high >= 0):
        centre = 0
    else:
        centre = high if high is not None else low  # type: ignore[assignment]
    left, right = None if low is None else centre - low, None if high is None else high - centre
    if left is not None and left < 0:
        raise Unreadable("a window that is empty")
    return Window(left, right, offset=call.offset(centre), validate=False)


def _groups(positions: Tensor, size: int) -> Tensor:
    return torch.div(positions, size, rounding_mode="floor")
