"""Each mask. This file is the definition of who sees whom; every kernel's rule is held against it.

`interval` is written once per mask; the dense table, the pictures, the counts and the tile lists (blocks.py) are all
derived from it. What masks have in common is said of the package.
"""

from __future__ import annotations

import dataclasses
from dataclasses import InitVar, dataclass
from typing import Any

import torch
from torch import Tensor

from fastattn.masks.base import (
    SATURATED,
    And,
    Interval,
    Length,
    Mask,
    Or,
    check_batch,
    check_batches,
    check_ends,
    check_ints,
    check_masks,
    check_not_negative,
    check_sizes,
    is_int,
    may_look,
    saturate,
    visible_pairs,
)

__all__ = [
    "And", "Causal", "Chunked", "Dense", "Full", "Lengths", "Mask", "Or", "Packed", "Prefix", "Segments", "Window",
    "visible_pairs",
]  # fmt: skip

ALIGNMENTS = ("bottom-right", "top-left")


@dataclass(frozen=True, eq=False)
class Full(Mask):
    """Every query sees every key.

    >>> print(Full().draw(2, 3))
    x x x
    x x x
    """

    def interval(self, q_idx: Tensor, q_len: Length, kv_len: Length) -> Interval:
        return torch.zeros_like(q_idx), torch.zeros_like(q_idx) + kv_len


@dataclass(frozen=True, eq=False)
class Placed(Mask):
    """Base of the masks that place query i at position i + offset. Not a mask by itself."""

    align: str = dataclasses.field(default="bottom-right", kw_only=True)
    offset: int | Tensor | None = dataclasses.field(default=None, kw_only=True)
    validate: InitVar[bool | None] = dataclasses.field(default=None, kw_only=True)

    def __post_init__(self, validate: bool | None) -> None:
        name = type(self).__name__
        if self.align not in ALIGNMENTS:
            raise ValueError(f"{name}: align must be one of {ALIGNMENTS}, got {self.align!r}")
        if is_int(self.offset):
            check_sizes(name, -(2**63), offset=self.offset)
        elif self.offset is not None:
            check_ints(name, "an int, or an int32 or int64 tensor", offset=self.offset)

    def position(self, q_idx: Tensor, q_len: Length, kv_len: Length) -> Tensor:
        """Where on the key axis each query sits."""
        if self.offset is None:
            return q_idx + (kv_len - q_len if self.align == "bottom-right" else 0)
        if isinstance(self.offset, Tensor):
            return q_idx + self.offset.long().clamp(-SATURATED, SATURATED)[:, None, None]
        return q_idx + saturate(self.offset)

    def check(self, batch: int, num_heads: int, q_len: int, kv_len: int) -> None:
        check_batch(self, batch, offset=self.offset)


@dataclass(frozen=True, eq=False)
class Causal(Placed):
    """A query at position p sees the keys up to p.

    >>> print(Causal().draw(3, 5))
    x x x . .
    x x x x .
    x x x x x
    >>> print(Causal(align="top-left").draw(3, 5))
    x . . . .
    x x . . .
    x x x . .
    """

    def interval(self, q_idx: Tensor, q_len: Length, kv_len: Length) -> Interval:
        position = self.position(q_idx, q_len, kv_len)
        return torch.zeros_like(position), position + 1


@dataclass(frozen=True, eq=False)
class Window(Placed):
    """Truncated attention: a query at position p sees the keys p - left ... p + right, both ends included.

    `None` leaves a side unbounded: Window(None, 0) is Causal().

    >>> print(Window(1, 0).draw(4, 4))
    x . . .
    x x . .
    . x x .
    . . x x
    >>> print(Window(2, 1).draw(3, 6))
    . x x x x .
    . . x x x x
    . . . x x x
    """

    left: int | None
    right: int | None

    def __post_init__(self, validate: bool | None) -> None:
        super().__post_init__(validate)
        check_sizes("Window", 0, left=self.left, right=self.right)

    def interval(self, q_idx: Tensor, q_len: Length, kv_len: Length) -> Interval:
        position = self.position(q_idx, q_len, kv_len)
        start = torch.zeros_like(position) if self.left is None else position - saturate(self.left)
        stop = torch.zeros_like(position) + kv_len if self.right is None else position + saturate(self.right) + 1
        return start, stop


@dataclass(frozen=True, eq=False)
class Chunked(Placed):
    """Chunk-wise attention: chunk(x) = floor(x / size); a query sees its own chunk, `left_chunks` before it and
    `right_chunks` after it (None = unbounded). Not causal by itself: `Chunked(size) & Causal()` is.

    >>> print(Chunked(2, left_chunks=1).draw(5, 5))
    x x . . .
    x x . . .
    x x x x .
    x x x x .
    . . x x x
    """

    size: int
    left_chunks: int | None = 0
    right_chunks: int | None = 0

    def __post_init__(self, validate: bool | None) -> None:
        super().__post_init__(validate)
        check_sizes("Chunked", 0, left_chunks=self.left_chunks, right_chunks=self.right_chunks)
        if not is_int(self.size) or not 1 <= self.size < 2**63:
            raise ValueError(f"Chunked: size must be an int of at least 1 and below 2**63, got {self.size!r}")

    def interval(self, q_idx: Tensor, q_len: Length, kv_len: Length) -> Interval:
        position = self.position(q_idx, q_len, kv_len)
        size = saturate(self.size)
        chunk = torch.div(position, size, rounding_mode="floor")
        none = torch.zeros_like(position)
        most = SATURATED // size
        start = none if self.left_chunks is None else (chunk - min(self.left_chunks, most)) * size
        stop = none + kv_len if self.right_chunks is None else (chunk + min(self.right_chunks, most) + 1) * size
        return start, stop


@dataclass(frozen=True, eq=False)
class Lengths(Mask):
    """Padding: in batch item b the keys kv_starts[b] <= j < kv_lengths[b] are real; queries from q_lengths[b] on see
    nothing.

    Each an int32 or int64 tensor [batch]. Left padding is `kv_starts`. Lengths never move a query: combine with
    `Causal(offset=...)` where the positions follow the lengths.

    >>> print(Lengths(torch.tensor([2]), q_lengths=torch.tensor([1])).draw(2, 4))
    x x . .
    . . . .
    """

    kv_lengths: Tensor
    q_lengths: Tensor | None = None
    kv_starts: Tensor | None = None
    validate: InitVar[bool | None] = None

    def __post_init__(self, validate: bool | None) -> None:
        named = {"kv_lengths": self.kv_lengths, "q_lengths": self.q_lengths, "kv_starts": self.kv_starts}
        given: dict[str, Any] = {name: each for name, each in named.items() if each is not None or name == "kv_lengths"}
        check_ints("Lengths", **given)
        check_batches("Lengths", **given)
        if may_look(validate, self.tensors):
            check_not_negative("Lengths", **named)

    def interval(self, q_idx: Tensor, q_len: Length, kv_len: Length) -> Interval:
        stop = self.kv_lengths.long()[:, None, None].expand(-1, 1, q_idx.shape[-1])
        start = stop.new_zeros(1, 1, 1) if self.kv_starts is None else self.kv_starts.long()[:, None, None]
        start, stop = torch.broadcast_tensors(start, stop)
        if self.q_lengths is not None:
            stop = torch.where(q_idx < self.q_lengths.long()[:, None, None], stop, start)
        return start, stop

    def check(self, batch: int, num_heads: int, q_len: int, kv_len: int) -> None:
        check_batch(self, batch, kv_lengths=self.kv_lengths, q_lengths=self.q_lengths, kv_starts=self.kv_starts)


@dataclass(frozen=True, eq=False)
class Prefix(Placed):
    """Prefix-LM: causal, and the first lengths[b] keys are seen by all. `lengths`: int32 or int64 [batch].

    >>> print(Prefix(torch.tensor([2])).draw(4, 4))
    x x . .
    x x . .
    x x x .
    x x x x
    """

    lengths: Tensor

    def __post_init__(self, validate: bool | None) -> None:
        super().__post_init__(validate)
        check_ints("Prefix", lengths=self.lengths)
        check_batches("Prefix", lengths=self.lengths, offset=self.offset)
        if may_look(validate, self.tensors):
            check_not_negative("Prefix", lengths=self.lengths)

    def interval(self, q_idx: Tensor, q_len: Length, kv_len: Length) -> Interval:
        start, causal_stop = Causal(align=self.align, offset=self.offset, validate=False).interval(q_idx, q_len, kv_len)
        _, prefix_stop = Lengths(self.lengths, validate=False).interval(q_idx, q_len, kv_len)
        return start, torch.maximum(causal_stop, prefix_stop)

    def check(self, batch: int, num_heads: int, q_len: int, kv_len: int) -> None:
        super().check(batch, num_heads, q_len, kv_len)
        check_batch(self, batch, lengths=self.lengths)


@dataclass(frozen=True, eq=False)
class Segments(Mask):
    """Documents in one row: equal ids see each other; a negative id sees nothing and is not seen.

    `q_ids` [batch or 1, q_len], `kv_ids` [batch or 1, kv_len] (the same tensor when None), int32 or int64.
    `sorted=True` promises ids that never decrease, negative ones last: kernels then walk spans; else they walk tile
    lists.

    >>> print(Segments(torch.tensor([[0, 1, 0, -1]])).draw(4, 4))
    x . x .
    . x . .
    x . x .
    . . . .
    """

    q_ids: Tensor
    kv_ids: Tensor | None = None
    sorted: bool = False
    validate: InitVar[bool | None] = None

    def __post_init__(self, validate: bool | None) -> None:
        check_ints("Segments", rank=2, q_ids=self.q_ids, kv_ids=self.key_ids)
        check_batches("Segments", q_ids=self.q_ids, kv_ids=self.key_ids)
        if self.sorted and may_look(validate, self.tensors):
            for name, ids in (("q_ids", self.q_ids), ("kv_ids", self.key_ids)):
                order = _negative_last(ids)
                if bool((order[:, 1:] < order[:, :-1]).any()):
                    raise ValueError(
                        f"Segments: sorted=True needs {name} that never decrease, with negative ids last; "
                        "sort the sequence or leave sorted=False"
                    )

    @property
    def key_ids(self) -> Tensor:
        """The keys' ids, [batch or 1, kv_len]."""
        return self.q_ids if self.kv_ids is None else self.kv_ids

    def interval(self, q_idx: Tensor, q_len: Length, kv_len: Length) -> Interval:
        keys, queries = _negative_last(self.key_ids), self.q_ids.long()
        batch = max(keys.shape[0], queries.shape[0])
        keys, queries = keys.expand(batch, -1).contiguous(), queries.expand(batch, -1).contiguous()
        start, stop = torch.searchsorted(keys, queries), torch.searchsorted(keys, queries, right=True)
        return start[:, None], torch.where(queries < 0, start, stop)[:, None]

    def interval_count(self) -> int | None:
        return 1 if self.sorted else None

    def dense(self, q_len: int, kv_len: int, *, device: torch.device | None = None) -> Tensor:
        queries, keys = self.q_ids[:, None, :, None], self.key_ids[:, None, None, :]
        return (queries == keys) & (queries >= 0)

    def check(self, batch: int, num_heads: int, q_len: int, kv_len: int) -> None:
        for name, ids, length in (("q_ids", self.q_ids, q_len), ("kv_ids", self.key_ids, kv_len)):
            if ids.shape[0] not in (1, batch) or ids.shape[1] != length:
                raise ValueError(f"mask Segments: {name} must be [{batch} or 1, {length}], got {list(ids.shape)}")


@dataclass(frozen=True, eq=False)
class Packed(Mask):
    """Sequences of different lengths laid end to end in one row (batch 1): each sees itself, through `inside`.

    `cu_q`, `cu_kv`: int32 or int64 [segments + 1], cumulative lengths from 0; tokens after the last segment see
    nothing.
    `inside` is a mask of its own lengths in each segment: Full, Causal, Window, Chunked and their `&`.

    >>> print(Packed(torch.tensor([0, 2, 5]), torch.tensor([0, 2, 5])).draw(5, 5))
    x . . . .
    x x . . .
    . . x . .
    . . x x .
    . . x x x
    """

    cu_q: Tensor
    cu_kv: Tensor
    inside: Mask = dataclasses.field(default_factory=Causal)
    validate: InitVar[bool | None] = None

    def __post_init__(self, validate: bool | None) -> None:
        check_ints("Packed", cu_q=self.cu_q, cu_kv=self.cu_kv)
        if self.cu_q.shape != self.cu_kv.shape or self.cu_q.shape[0] < 1:
            raise ValueError(
                "Packed: cu_q and cu_kv must both be [segments + 1], "
                f"got {list(self.cu_q.shape)} and {list(self.cu_kv.shape)}"
            )
        check_masks("Packed", inside=self.inside)
        for part in self.inside.conjuncts():
            if not isinstance(part, (Full, Causal, Window, Chunked)) or part.tensors:
                raise ValueError(
                    "Packed: inside must be made of Full, Causal, Window and Chunked without tensors, "
                    f"got {type(part).__name__}; combine other masks with Packed by &"
                )
        if may_look(validate, [self.cu_q, self.cu_kv]):
            for name, cu in (("cu_q", self.cu_q), ("cu_kv", self.cu_kv)):
                if cu[0] != 0 or bool((cu[1:] < cu[:-1]).any()):
                    raise ValueError(f"Packed: {name} must start at 0 and never decrease, got {cu.tolist()}")

    def interval(self, q_idx: Tensor, q_len: Length, kv_len: Length) -> Interval:
        cu_q, cu_kv = self.cu_q.long(), self.cu_kv.long()
        if cu_q.shape[0] == 1:
            return torch.zeros_like(q_idx), torch.zeros_like(q_idx)
        real = q_idx < cu_q[-1]
        segment = torch.where(real, torch.searchsorted(cu_q, q_idx.contiguous(), right=True) - 1, 0)
        q_start, kv_start = cu_q[segment], cu_kv[segment]
        kv_size = cu_kv[segment + 1] - kv_start
        start, stop = self.inside.interval(q_idx - q_start, cu_q[segment + 1] - q_start, kv_size)
        start, stop = kv_start + start.clamp(min=0), kv_start + torch.minimum(stop, kv_size)
        return start, torch.where(real, stop, start)

    def check(self, batch: int, num_heads: int, q_len: int, kv_len: int) -> None:
        if batch != 1:
            raise ValueError(f"mask Packed: packed sequences are one row, batch must be 1, got batch {batch}")
        if may_look(None, [self.cu_q, self.cu_kv]):
            check_ends("mask Packed", cu_q=(self.cu_q, q_len), cu_kv=(self.cu_kv, kv_len))


@dataclass(frozen=True, eq=False)
class Dense(Mask):
    """Any bool table broadcastable to [batch, num_heads, q_len, kv_len], True = attend.

    >>> print(Dense(torch.tensor([[True, False], [False, True]])).draw(2, 2))
    x .
    . x
    """

    table: Tensor

    def __post_init__(self) -> None:
        if not isinstance(self.table, Tensor) or self.table.dtype != torch.bool or self.table.dim() > 4:
            got = f"{self.table.dtype} {list(self.table.shape)}" if isinstance(self.table, Tensor) else repr(self.table)
            raise ValueError(
                "mask: a tensor mask must be bool (True = attend) with at most 4 dimensions, "
                f"got {got}; numbers to add to the scores go into bias="
            )

    def dense(self, q_len: int, kv_len: int, *, device: torch.device | None = None) -> Tensor:
        table = self.table[(None,) * (4 - self.table.dim())]
        return table.expand(-1, -1, q_len, kv_len)

    def check(self, batch: int, num_heads: int, q_len: int, kv_len: int) -> None:
        want = (batch, num_heads, q_len, kv_len)
        if any(have not in (1, size) for have, size in zip(self.table.shape[::-1], want[::-1], strict=False)):
            raise ValueError(
                f"mask: a table of shape {list(self.table.shape)} does not broadcast to "
                f"[batch, num_heads, q_len, kv_len] = {list(want)}"
            )


def _negative_last(ids: Tensor) -> Tensor:
    """Ids as int64 with the negative ones moved past every other, so that a sorted row stays sorted."""
    ids = ids.long()
    return torch.where(ids < 0, torch.iinfo(torch.int64).max, ids)
