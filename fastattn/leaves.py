"""A mask as the C++ rooms read it: leaves, joined by a program in postfix (csrc/common/params.h, csrc/ops.cpp).

    interval   int32 [2, batch or 1, num_heads or 1, q_len or 1]: first visible key and the one after the last, in
               [0, kv_len]
    elements   bool [.., q_len or 1, kv_len or 1], up to 4 axes
    ids        int64 [batch or 1, q_len], int64 [batch or 1, kv_len]: equal ids see each other, negative ones nobody

Whatever has intervals becomes intervals, however it is put together; O(q_len) memory. Those of masks without tensors
are kept for the next call.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from fastattn import flat
from fastattn.masks import And, Dense, Full, Interval, Mask, Or, Segments

CPU = torch.device("cpu")
INTERVAL, ELEMENTS, IDS = 0, 1, 2
PAGES = 3
"""No leaf: before the others, where keys lie in blocks; its tensor is their table."""
AND, OR = -1, -2
MOST_LEAVES = 32
MOST_WORDS = 64
KEPT = 64
"""Masks whose leaves are kept."""
LONGEST_KEPT = 2**14
"""Queries; longer tables are made each time, which their attention does not notice."""


class Leaves(NamedTuple):
    """Words in postfix, a leaf's kind or AND or OR; the leaves' tensors in their order. No words: all is visible."""

    words: list[int]
    tensors: list[Tensor]


NOTHING_HIDDEN = Leaves([], [])


def why_not(mask: Mask) -> str | None:
    """Why a mask has no leaves, or None."""
    if type(mask) is Full:
        return None
    atoms = mask.atoms()
    for atom in atoms:
        if not (atom.is_interval or isinstance(atom, (Segments, Dense))):
            return f"mask {type(atom).__name__} has neither an interval nor a rule of its own; `Dense` of its table has"
    if len(atoms) > MOST_LEAVES:
        return f"the mask is made of {len(atoms)} masks, at most {MOST_LEAVES} can be joined"
    return None


def make_leaves(mask: Mask, q_len: int, kv_len: int) -> Leaves:
    """The leaves of a mask that `why_not` lets pass, on the CPU."""
    if type(mask) is Full:
        return NOTHING_HIDDEN
    if q_len <= LONGEST_KEPT and flat.is_plain(mask):
        code, numbers, _ = flat.pack(mask)
        return _kept(code, tuple(numbers), q_len, kv_len)
    return _leaves(mask, q_len, kv_len)


@functools.lru_cache(KEPT)
def _kept(code: str, numbers: tuple[int, ...], q_len: int, kv_len: int) -> Leaves:
    return _leaves(flat.unpack(code, list(numbers), []), q_len, kv_len)


def _leaves(mask: Mask, q_len: int, kv_len: int) -> Leaves:
    found = Leaves([], [])
    _put(mask, q_len, kv_len, found)
    return found


def _put(mask: Mask, q_len: int, kv_len: int, found: Leaves) -> None:
    words, tensors = found
    if isinstance(mask, Dense):
        words.append(ELEMENTS)
        tensors.append(mask.table)
        return
    intervals = mask.intervals(q_len, kv_len, CPU)
    if intervals is not None:
        words.extend([INTERVAL] * len(intervals) + [OR] * (len(intervals) - 1))
        tensors.extend(_table(interval, kv_len) for interval in intervals)
    elif isinstance(mask, Segments):
        words.append(IDS)
        tensors.extend((mask.q_ids.long(), mask.key_ids.long()))
    elif isinstance(mask, (And, Or)):
        _put(mask.left, q_len, kv_len, found)
        _put(mask.right, q_len, kv_len, found)
        words.append(AND if isinstance(mask, And) else OR)
    else:
        raise NotImplementedError(f"mask {type(mask).__name__} has no leaves")


def _table(interval: Interval, kv_len: int) -> Tensor:
    """Both ends as one int32 tensor, clipped to the keys."""
    return torch.stack(torch.broadcast_tensors(*interval)).clamp_(0, kv_len).to(torch.int32)
