"""What mask functions say, as rules that become masks: the half of mask_mod.py that knows masks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastattn.masks.kinds import Causal, Chunked, Full, Mask, Segments, Window

__all__ = ["All", "Call", "Either", "Near", "NotNegative", "Rule", "SameGroup", "SameId", "Unreadable", "groups"]


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


def undecided(symbol: object) -> bool:
    """A symbol's truth, which Python asks for in `if`, `and`, `or` and `not`: it has none."""
    raise Unreadable(f"a decision by a {type(symbol).__name__}")


class Rule:
    """What a comparison of symbols gives: what is visible."""

    device = None
    __bool__ = undecided

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
        q_ids, kv_ids = (groups(call.positions(axis)[None] + self.moved, self.size) - first for axis in ("q", "kv"))
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


def groups(positions: Tensor, size: int) -> Tensor:
    """floor(position / size)."""
    return torch.div(positions, size, rounding_mode="floor")
