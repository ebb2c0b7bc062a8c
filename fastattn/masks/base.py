"""What every mask has: a table, a picture, intervals; and the two ways to combine masks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastattn.tracing import functorch_active

Length = int | Tensor  # one length for all rows, or one for each row
Interval = tuple[Tensor, Tensor]  # start, stop: int64, broadcastable to [batch, num_heads, q_len]
INTS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
UNBOUNDED = 2**29 - 1
"""A bound of a band where it has none, beyond every position; the sum of three fits an int32. Triton's and C++'s
constants of this name are equal to it.
"""
SATURATED = 2**60
"""Sizes and offsets saturate here, beyond every position; sums of a few still fit an int64. It never leaves Python."""
_CONSTANT = (int, str, bool, type(None))
_OWN = ("fastattn.masks.base", "fastattn.masks.kinds")


class Mask:
    """Base of all masks: the table, its picture, its combinations.

    The library's masks of numbers and words alone are equal and hashable by value; with a tensor, a mask equals itself
    only, and so does one of the user's classes, which may hold more than its fields say.
    """

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        if type(self) is not type(other):
            return NotImplemented
        value = self._value()
        return value is not None and value == other._value()

    def __hash__(self) -> int:
        value = self._value()
        return object.__hash__(self) if value is None else hash(value)

    def _value(self) -> tuple[object, ...] | None:
        """The class and its fields; None where one of them may change, or the class is not the library's."""
        if type(self).__module__ not in _OWN:
            return None
        value: list[object] = [type(self)]
        for name in self.__dataclass_fields__:  # type: ignore[attr-defined]
            part = getattr(self, name)
            if isinstance(part, Mask):
                part = part._value()
                if part is None:
                    return None
            elif type(part) not in _CONSTANT:
                return None
            value.append(part)
        return tuple(value)

    def interval(self, q_idx: Tensor, q_len: Length, kv_len: Length) -> Interval:
        """First visible key and the one after the last, for each query of `q_idx` (int64, [..., q_len]), not
        clipped.
        """
        raise NotImplementedError(f"{type(self).__name__} is not an interval mask")

    def intervals(self, q_len: int, kv_len: int, device: torch.device | None = None) -> list[Interval] | None:
        """At most two intervals a row whose union is what the row sees; None where there is no such closed form."""
        return None if self.interval_count() is None else [self.interval(rows(q_len, device), q_len, kv_len)]

    def interval_count(self) -> int | None:
        """How many `intervals` gives, told from the kinds of masks alone: 1, 2 or None."""
        return 1 if self.is_interval else None

    def dense(self, q_len: int, kv_len: int, *, device: torch.device | None = None) -> Tensor:
        """The mask as a bool table [batch or 1, num_heads or 1, q_len, kv_len], True = attend."""
        device = device or self.device
        [(start, stop)] = self.intervals(q_len, kv_len, device)  # type: ignore[misc]
        return between(start, stop, kv_len)

    def check(self, batch: int, num_heads: int, q_len: int, kv_len: int) -> None:
        """Raise ValueError where the mask's tensors do not fit a problem of these sizes."""

    @property
    def tensors(self) -> list[Tensor]:
        """Every tensor the mask holds, inner masks' too."""
        found: list[Tensor] = []
        for name in self.__dataclass_fields__:  # type: ignore[attr-defined]
            value = getattr(self, name)
            if isinstance(value, Tensor):
                found.append(value)
            elif isinstance(value, Mask):
                found += value.tensors
        return found

    @property
    def device(self) -> torch.device:
        """Where the mask's tensors live; the CPU for a mask without tensors."""
        return next((tensor.device for tensor in self.tensors), torch.device("cpu"))

    def conjuncts(self) -> list[Mask]:
        """The masks that must all agree: the parts of an `And`, or the mask itself."""
        return [self]

    def atoms(self) -> list[Mask]:
        """The masks that it is made of, below every `&` and `|`."""
        return [self]

    @property
    def is_interval(self) -> bool:
        """Whether `interval` says what the mask is."""
        return type(self).interval is not Mask.interval

    def draw(self, q_len: int, kv_len: int, *, batch: int = 0, head: int = 0) -> str:
        """The small table as text: a row a query, x = attends, . = hidden."""
        table = self.dense(q_len, kv_len)
        table = table.expand(
            *(max(have, want + 1) for have, want in zip(table.shape, (batch, head), strict=False)), -1, -1
        )
        table = table[batch, head].expand(q_len, kv_len)
        return "\n".join(" ".join("x" if seen else "." for seen in row) for row in table.tolist())

    def __and__(self, other: Mask) -> Mask:
        return And(self, other) if isinstance(other, Mask) else NotImplemented

    def __or__(self, other: Mask) -> Mask:
        return Or(self, other) if isinstance(other, Mask) else NotImplemented


@dataclass(frozen=True, eq=False)
class And(Mask):
    """What both masks show: `left & right`.

    >>> print((Causal() & Chunked(2)).draw(4, 4))
    x . . .
    x x . .
    . . x .
    . . x x
    """

    left: Mask
    right: Mask

    def __post_init__(self) -> None:
        check_masks("And", left=self.left, right=self.right)

    def interval(self, q_idx: Tensor, q_len: Length, kv_len: Length) -> Interval:
        return intersect(self.left.interval(q_idx, q_len, kv_len), self.right.interval(q_idx, q_len, kv_len))

    def intervals(self, q_len: int, kv_len: int, device: torch.device | None = None) -> list[Interval] | None:
        if self.interval_count() is None:
            return None
        left, right = (part.intervals(q_len, kv_len, device) for part in (self.left, self.right))
        return [intersect(a, b) for a in left or () for b in right or ()]

    def interval_count(self) -> int | None:
        left, right = self.left.interval_count(), self.right.interval_count()
        return None if left is None or right is None or left * right > 2 else left * right

    def dense(self, q_len: int, kv_len: int, *, device: torch.device | None = None) -> Tensor:
        device = device or self.device
        return self.left.dense(q_len, kv_len, device=device) & self.right.dense(q_len, kv_len, device=device)

    def check(self, batch: int, num_heads: int, q_len: int, kv_len: int) -> None:
        for part in (self.left, self.right):
            part.check(batch, num_heads, q_len, kv_len)

    def conjuncts(self) -> list[Mask]:
        return [*self.left.conjuncts(), *self.right.conjuncts()]

    def atoms(self) -> list[Mask]:
        return [*self.left.atoms(), *self.right.atoms()]


@dataclass(frozen=True, eq=False)
class Or(Mask):
    """What either mask shows: `left | right`, such as a window and a few sink tokens.

    >>> print((Window(1, 0) | Lengths(torch.tensor([1]))).draw(4, 4))
    x . . .
    x x . .
    x x x .
    x . x x
    """

    left: Mask
    right: Mask

    def __post_init__(self) -> None:
        check_masks("Or", left=self.left, right=self.right)

    def intervals(self, q_len: int, kv_len: int, device: torch.device | None = None) -> list[Interval] | None:
        if self.interval_count() is None:
            return None
        left, right = (part.intervals(q_len, kv_len, device) for part in (self.left, self.right))
        return [*(left or ()), *(right or ())]

    def interval_count(self) -> int | None:
        left, right = self.left.interval_count(), self.right.interval_count()
        return None if left is None or right is None or left + right > 2 else 2

    def dense(self, q_len: int, kv_len: int, *, device: torch.device | None = None) -> Tensor:
        device = device or self.device
        return self.left.dense(q_len, kv_len, device=device) | self.right.dense(q_len, kv_len, device=device)

    def check(self, batch: int, num_heads: int, q_len: int, kv_len: int) -> None:
        for part in (self.left, self.right):
            part.check(batch, num_heads, q_len, kv_len)

    def atoms(self) -> list[Mask]:
        return [*self.left.atoms(), *self.right.atoms()]


def visible_pairs(mask: Mask, batch: int, num_heads: int, q_len: int, kv_len: int) -> int:
    """How many (query, key) pairs the mask shows over all batch items and heads. Reads values: syncs a device."""
    intervals = mask.intervals(q_len, kv_len, mask.device)
    if intervals is None:
        table = mask.dense(q_len, kv_len)
        return int(table.sum()) * (batch // max(table.shape[0], 1)) * (num_heads // max(table.shape[1], 1))
    total = 0
    parts = [(1, part) for part in intervals]
    if len(intervals) == 2:
        parts.append((-1, intersect(*intervals)))
    for sign, (start, stop) in parts:
        rows = (stop.clamp(max=kv_len) - start.clamp(min=0)).clamp(min=0)
        heads_and_batch = (batch // max(rows.shape[0], 1) if rows.dim() == 3 else batch) * num_heads
        total += sign * int(rows.sum()) * heads_and_batch
    return total


def rows(q_len: int, device: torch.device | None) -> Tensor:
    return torch.arange(q_len, device=device)[None, None]  # [1, 1, q_len]


def between(start: Tensor, stop: Tensor, kv_len: int) -> Tensor:
    kv_idx = torch.arange(kv_len, device=start.device)
    return (kv_idx >= start[..., None]) & (kv_idx < stop[..., None])


def intersect(a: Interval, b: Interval) -> Interval:
    return torch.maximum(a[0], b[0]), torch.minimum(a[1], b[1])


def is_int(value: object) -> bool:
    return isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool)


def may_look(validate: bool | None, tensors: list[Tensor]) -> bool:
    """Whether values may be read: asked for, or on the CPU outside of tracing and transforms."""
    if validate is not None or torch.compiler.is_compiling():
        return bool(validate) and not torch.compiler.is_compiling()
    return not functorch_active() and all(type(tensor) is Tensor and tensor.device.type == "cpu" for tensor in tensors)


def check_masks(name: str, **parts: object) -> None:
    for argument, part in parts.items():
        if not isinstance(part, Mask):
            raise TypeError(f"{name}: {argument} must be a mask, got {type(part).__name__}")


def check_sizes(name: str, least: int, **sizes: Any) -> None:
    for argument, size in sizes.items():
        if size is not None and not (is_int(size) and least <= size < 2**63):
            raise ValueError(
                f"{name}: {argument} must be an int of at least {least} and below 2**63, or None (unbounded), "
                f"got {size!r}"
            )


def saturate(number: int) -> int:
    """A size or an offset no farther from 0 than SATURATED, which is beyond every position."""
    return max(-SATURATED, min(SATURATED, number))


def check_ints(name: str, kind: str = "an int32 or int64 tensor", *, rank: int = 1, **tensors: object) -> None:
    for argument, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: {argument} must be {kind}, got {type(tensor).__name__}")
        if tensor.dtype not in (torch.int32, torch.int64) or tensor.dim() != rank:
            raise ValueError(
                f"{name}: {argument} must be int32 or int64 with {rank} dimension{'s' * (rank > 1)}, "
                f"got {tensor.dtype} {list(tensor.shape)}"
            )


def check_not_negative(name: str, **tensors: Tensor | None) -> None:
    for argument, tensor in tensors.items():
        if tensor is not None and tensor.numel() and tensor.min() < 0:
            raise ValueError(f"{name}: {argument} must not be negative, got {tensor.min().item()}")


def check_batch(mask: Mask, batch: int, **tensors: object) -> None:
    for argument, tensor in tensors.items():
        if isinstance(tensor, Tensor) and tensor.shape[0] not in (1, batch):
            raise ValueError(
                f"mask {type(mask).__name__}: {argument} must be [{batch}] (the batch), got {list(tensor.shape)}"
            )


def check_batches(name: str, **tensors: object) -> None:
    """Tensors of one mask: each is for all batch items alike, or for as many as the others."""
    sizes = [(argument, tensor.shape[0]) for argument, tensor in tensors.items() if isinstance(tensor, Tensor)]
    many = [size for _, size in sizes if size != 1]
    if any(size != many[0] for size in many):
        each = ", ".join(f"{argument} {size}" for argument, size in sizes)
        raise ValueError(f"{name}: batch sizes that are equal or 1 are needed, got {each}")


def holds_ints(tensor: Tensor) -> bool:
    """Whether its numbers are whole: no floats, complex numbers or bools."""
    return tensor.dtype in INTS


def check_ends(name: str, **ends: tuple[Tensor, int]) -> None:
    """Cumulative lengths, each with the tokens that are there: the last one may not lie beyond them."""
    for argument, (lengths, tokens) in ends.items():
        if lengths[-1] > tokens:
            raise ValueError(f"{name}: {argument} ends at {int(lengths[-1])}, and there are {tokens} tokens")
