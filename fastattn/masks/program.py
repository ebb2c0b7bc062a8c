"""Mask programs, as which the C++ backends read masks: terms joined by AND and OR, in postfix (csrc/ops.cpp).

    interval   int32 [2, batch or 1, num_heads or 1, q_len or 1]: first visible key and the one after the last, in
               [0, kv_len]
    elements   bool [.., q_len or 1, kv_len or 1], up to 4 axes
    ids        int64 [batch or 1, q_len], int64 [batch or 1, kv_len]: equal ids see each other, negative ones nobody
    band       no tensor; two more words, low and high: query i sees the keys i + low <= j < i + high. Asked for only
    reach      a band of each batch item: three more words, low, high and the sum of 1, 2, 4 for those of its tensors
               that are there, offset, first, end, int32 or int64 [batch or 1]: see Reach. Asked for only, and alone

Whatever has intervals becomes intervals, however it is put together; O(q_len) memory. Those of masks without tensors
are kept for the next call.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastattn.masks import serialize
from fastattn.masks.base import UNBOUNDED
from fastattn.masks.kinds import And, Causal, Dense, Full, Interval, Lengths, Mask, Or, Segments, Window

CPU = torch.device("cpu")
INTERVAL, ELEMENTS, IDS, BAND, PAGES, REACH = 0, 1, 2, 3, 4, 5
"""PAGES is no term: before the others, where keys lie in blocks; its tensor is their table."""
AND, OR = -1, -2
MOST_TERMS = 32
MOST_WORDS = 64
KEPT = 64
"""Masks whose programs are kept."""
LONGEST_KEPT = 2**14
"""Queries; longer tables are made each time, which their attention does not notice."""


class MaskProgram(NamedTuple):
    """Words in postfix, a term's kind or AND or OR; the terms' tensors in their order. No words: all is visible."""

    words: list[int]
    tensors: list[Tensor]


NOTHING_HIDDEN = MaskProgram([], [])


def why_not(mask: Mask) -> str | None:
    """Why a mask has no program, or None."""
    if type(mask) is Full:
        return None
    atoms = mask.atoms()
    for atom in atoms:
        if not (atom.is_interval or isinstance(atom, (Segments, Dense))):
            return f"mask {type(atom).__name__} has neither an interval nor a rule of its own; `Dense` of its table has"
    if len(atoms) > MOST_TERMS:
        return f"the mask is made of {len(atoms)} masks, at most {MOST_TERMS} can be joined"
    return None


def make_program(
    mask: Mask, q_len: int, kv_len: int, device: torch.device = CPU, *, bands: bool = False
) -> MaskProgram:
    """The program of a mask that `why_not` lets pass, on the device. `bands`: in closed form what is a `Reach`."""
    if type(mask) is Full:
        return NOTHING_HIDDEN
    closed = reach(mask, q_len, kv_len) if bands else None
    if closed is not None and any(each is not None for each in closed[2:]):
        there = sum(1 << n for n, each in enumerate(closed[2:]) if each is not None)
        return MaskProgram([REACH, *closed[:2], there], [each for each in closed[2:] if each is not None])
    if bands or device != CPU:
        return _program(mask, q_len, kv_len, device, bands)
    if q_len <= LONGEST_KEPT and serialize.is_plain(mask):
        code, numbers, _ = serialize.pack(mask)
        return _kept(code, tuple(numbers), q_len, kv_len)
    return _program(mask, q_len, kv_len, CPU, False)


@functools.lru_cache(KEPT)
def _kept(code: str, numbers: tuple[int, ...], q_len: int, kv_len: int) -> MaskProgram:
    return _program(serialize.unpack(code, list(numbers), []), q_len, kv_len, CPU, False)


def _program(mask: Mask, q_len: int, kv_len: int, device: torch.device, bands: bool) -> MaskProgram:
    found = MaskProgram([], [])
    _put(mask, q_len, kv_len, device, bands, found)
    return found


def over_blocks(found: MaskProgram, table: Tensor) -> MaskProgram:
    """The program of a mask over keys in blocks: their table, int32 [batch, blocks of an item], comes first."""
    table = table if table.stride(1) == 1 else table.contiguous()
    return MaskProgram([PAGES, *found.words], [table, *found.tensors])


def stack_of(words: list[int]) -> int:
    """How many terms wait to be joined at most while a program runs."""
    most = waiting = skip = 0
    for word in words:
        if skip:
            skip -= 1
            continue
        waiting += -1 if word < 0 else 1
        skip = 2 if word == BAND else 0
        most = max(most, waiting)
    return most


class Reach(NamedTuple):
    """In batch item b query i sees the keys from i + low + offset[b] up to and without i + high + offset[b], of those
    from first[b] up to and without end[b].
    """

    low: int
    high: int
    offset: Tensor | None = None
    first: Tensor | None = None
    end: Tensor | None = None


def reach(mask: Mask, q_len: int, kv_len: int) -> Reach | None:
    """What a mask shows, where that is a `Reach`; None of any other. Computes nothing."""
    if isinstance(mask, And):
        one, other = reach(mask.left, q_len, kv_len), reach(mask.right, q_len, kv_len)
        return None if one is None or other is None else _intersect(one, other)
    if isinstance(mask, Full):
        return Reach(-UNBOUNDED, UNBOUNDED)
    if isinstance(mask, Lengths):
        return Reach(-UNBOUNDED, UNBOUNDED, None, mask.kv_starts, mask.kv_lengths) if mask.q_lengths is None else None
    if not isinstance(mask, (Causal, Window)):
        return None
    left, right = (None, 0) if isinstance(mask, Causal) else (mask.left, mask.right)
    offset = mask.offset if isinstance(mask.offset, Tensor) else None
    place: Any = 0 if offset is not None else mask.position(0, q_len, kv_len)  # type: ignore[arg-type]
    low, high = -UNBOUNDED if left is None else place - left, UNBOUNDED if right is None else place + right + 1
    return Reach(max(-UNBOUNDED, min(UNBOUNDED, low)), max(-UNBOUNDED, min(UNBOUNDED, high)), offset)


def _intersect(one: Reach, other: Reach) -> Reach | None:
    """What both show; None where that would take more than one tensor of a kind."""
    moved = [each for each in (one, other) if (each.low, each.high) != (-UNBOUNDED, UNBOUNDED)]
    if len(moved) == 2 and one.offset is not other.offset:
        return None
    if (one.first is not None and other.first is not None) or (one.end is not None and other.end is not None):
        return None
    return Reach(
        max(one.low, other.low),
        min(one.high, other.high),
        moved[0].offset if moved else None,
        other.first if one.first is None else one.first,
        other.end if one.end is None else one.end,
    )


def band(mask: Mask, q_len: int, kv_len: int) -> tuple[int, int] | None:
    """low, high of a mask that shows query i the keys i + low <= j < i + high; None of any other."""
    found = reach(mask, q_len, kv_len)
    return None if found is None or any(each is not None for each in found[2:]) else found[:2]


def _put(mask: Mask, q_len: int, kv_len: int, device: torch.device, bands: bool, found: MaskProgram) -> None:
    words, tensors = found
    closed = band(mask, q_len, kv_len) if bands else None
    if closed is not None:
        words.extend((BAND, *closed))
        return
    if isinstance(mask, Dense):
        words.append(ELEMENTS)
        tensors.append(mask.table)
        return
    intervals = mask.intervals(q_len, kv_len, device)
    if intervals is not None:
        words.extend([INTERVAL] * len(intervals) + [OR] * (len(intervals) - 1))
        tensors.extend(_table(interval, kv_len) for interval in intervals)
    elif isinstance(mask, Segments):
        words.append(IDS)
        tensors.extend((mask.q_ids.long(), mask.key_ids.long()))
    elif isinstance(mask, (And, Or)):
        parts = [_program(part, q_len, kv_len, device, bands) for part in (mask.left, mask.right)]
        for part in sorted(parts, key=lambda part: -stack_of(part.words)):  # the shallower one waits for less
            words.extend(part.words)
            tensors.extend(part.tensors)
        words.append(AND if isinstance(mask, And) else OR)
    else:
        raise NotImplementedError(f"mask {type(mask).__name__} has no program")


def _table(interval: Interval, kv_len: int) -> Tensor:
    """Both ends as one int32 tensor, clipped to the keys."""
    return torch.stack(torch.broadcast_tensors(*interval)).clamp_(0, kv_len).to(torch.int32)
