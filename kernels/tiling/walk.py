"""The walk: which program owns which tile, and which tiles of the other side it visits, in which order.

Every pass walks the same way. What a tile's owner visits comes in two parts: CHECKED tiles, in which the mask hides
something or the problem ends, and FULL ones, which need no check. `tile_start(VARIANT, walk, PART, n, BLOCK)` is where
the n-th tile of a part begins: from the mask's spans in closed form, or from block lists. Heavy tiles go first.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from fastattn.kernels.opaque_int import from_opaque
from fastattn.kernels.rules.masks import kv_span, q_span, read_numbers

CHECKED, FULL = tl.constexpr(0), tl.constexpr(1)


class Sizes(NamedTuple):
    """The lengths of a launch, all int32; opaque (opaque_int.py) until `read_sizes`."""

    batch: Any
    num_heads: Any
    kv_heads: Any
    group: Any  # query heads of a key head; may be 0 where there are none
    q_len: Any
    kv_len: Any
    programs: Any  # tiles to own, over all heads and splits
    l2_group: Any  # heads whose keys and values stay in the second-level cache together
    splits: Any  # programs that share one tile's walk


@triton.jit
def read_sizes(sizes):
    """The sizes of a launch, no longer opaque."""
    heads = from_opaque(sizes.num_heads), from_opaque(sizes.kv_heads), from_opaque(sizes.group)
    lengths = from_opaque(sizes.q_len), from_opaque(sizes.kv_len)
    walk = from_opaque(sizes.programs), from_opaque(sizes.l2_group), from_opaque(sizes.splits)
    return Sizes(
        from_opaque(sizes.batch), heads[0], heads[1], heads[2], lengths[0], lengths[1], walk[0], walk[1], walk[2]
    )


@triton.jit
def owned(program, tiles, heads, sizes, VARIANT: tl.constexpr):
    """program -> tile, head, batch, split. Splits of a tile run side by side, then the heads of an L2 group, then
    its tiles, then the groups. One axis, as the others of a grid end at 65,535.
    """
    split = 0
    if VARIANT.SPLIT:
        split, program = program % sizes.splits, program // sizes.splits
    first = program // (sizes.l2_group * tiles) * sizes.l2_group
    width = tl.minimum(sizes.l2_group, sizes.batch * heads - first)
    rest = program - first * tiles
    place = first + rest % width
    return rest // width, place % heads, place // heads, split


@triton.jit
def query_tile(program, sizes, mask_args, lists, VARIANT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """What a program owns that walks keys: batch, head, kv_head, q_lo, q_idx [BLOCK_M], numbers, walk, split.

    Last tiles come first: under a causal mask they see most. A PACKED tile holds all queries of a whole group of
    heads; `head` is then a vector like q_idx, whose rows past the last query lie outside the problem.
    """
    q_len, kv_len = sizes.q_len, sizes.kv_len
    if VARIANT.PACKED:
        tile, kv_head, batch, split = owned(program, 1, sizes.kv_heads, sizes, VARIANT)
        rows = tl.arange(0, BLOCK_M)
        mask_head = kv_head * sizes.group  # the mask is the same for all of the group
        q_lo, q_idx, head = 0, rows // sizes.group, mask_head + rows % sizes.group
    else:
        tiles = tl.cdiv(q_len, BLOCK_M)
        tile, head, batch, split = owned(program, tiles, sizes.num_heads, sizes, VARIANT)
        tile = tiles - 1 - tile
        q_lo, kv_head = tile * BLOCK_M, head // sizes.group
        q_idx = q_lo + tl.arange(0, BLOCK_M)
        mask_head = head
    numbers = read_numbers(VARIANT, mask_args, batch, mask_head, q_len, kv_len)
    if len(VARIANT.TERMS) == 0:
        walk = _listed(lists, batch, mask_head, tile, tl.cdiv(kv_len, BLOCK_N))
    else:
        q_hi = tl.minimum(q_lo + BLOCK_M, q_len)
        walk = _cut(kv_span(VARIANT, 0, q_lo, q_hi, numbers, BLOCK_M), BLOCK_N)
        if len(VARIANT.TERMS) == 2:
            walk = _both(walk, _cut(kv_span(VARIANT, 1, q_lo, q_hi, numbers, BLOCK_M), BLOCK_N))
        walk = _counted(walk, VARIANT, BLOCK_N)
    return batch, head, kv_head, q_lo, q_idx, numbers, walk, split


@triton.jit
def query_walk(
    batch, head, tile, sizes, mask_args, lists, VARIANT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """The mirror, for the owner of a tile of keys: numbers, and the walk over one head's queries."""
    numbers = read_numbers(VARIANT, mask_args, batch, head, sizes.q_len, sizes.kv_len)
    if len(VARIANT.TERMS) == 0:
        walk = _listed(lists, batch, head, tile, tl.cdiv(sizes.q_len, BLOCK_M))
    else:
        kv_lo = tile * BLOCK_N
        kv_hi = tl.minimum(kv_lo + BLOCK_N, sizes.kv_len)
        walk = _cut(q_span(VARIANT, 0, kv_lo, kv_hi, numbers, BLOCK_N), BLOCK_M)
        if len(VARIANT.TERMS) == 2:
            walk = _both(walk, _cut(q_span(VARIANT, 1, kv_lo, kv_hi, numbers, BLOCK_N), BLOCK_M))
        walk = _counted(walk, VARIANT, BLOCK_M)
    return numbers, walk


@triton.jit
def part(walk, PART: tl.constexpr, split, splits, VARIANT: tl.constexpr):
    """The numbers of the tiles of a part that this split visits: begin, end. Shares differ by one at most."""
    if VARIANT.SPLIT:
        total, before = walk[0] + walk[1], walk[0] if PART == FULL else 0
        begin, end = total * split // splits - before, total * (split + 1) // splits - before
        return tl.maximum(begin, 0), tl.minimum(end, walk[PART])
    else:
        return 0, walk[PART]


@triton.jit
def tile_start(VARIANT: tl.constexpr, walk, PART: tl.constexpr, n, BLOCK: tl.constexpr):
    """Where the n-th tile of a part begins."""
    if len(VARIANT.TERMS) == 0:
        if PART == FULL:
            n += walk[0]
        start = tl.load(walk[2] + n) * BLOCK
    elif len(VARIANT.TERMS) == 1:
        start = _in_span(walk[2], walk[3], walk[4], PART, n, BLOCK)
    else:
        before = walk[9] if PART == FULL else walk[8]
        first = _in_span(walk[2], walk[3], walk[4], PART, n, BLOCK)
        start = tl.where(n < before, first, _in_span(walk[5], walk[6], walk[7], PART, n - before, BLOCK))
    return tl.multiple_of(start, BLOCK)


@triton.jit
def _in_span(lo, full_lo, full_hi, PART: tl.constexpr, n, BLOCK: tl.constexpr):
    """The checked tiles lie before and after the full ones."""
    if PART == FULL:
        return full_lo + n * BLOCK
    else:
        start = lo + n * BLOCK
        return start + tl.where(start >= full_lo, full_hi - full_lo, 0)


@triton.jit
def _cut(span, BLOCK: tl.constexpr):
    """A span in whole tiles: lo <= full_lo <= full_hi <= hi."""
    lo = span[0] // BLOCK * BLOCK
    hi = tl.where(span[3] > span[0], tl.cdiv(span[3], BLOCK) * BLOCK, lo)
    full_lo = tl.maximum(tl.minimum(tl.cdiv(span[1], BLOCK) * BLOCK, hi), lo)
    full_hi = tl.maximum(tl.minimum(span[2], span[3]) // BLOCK * BLOCK, full_lo)
    return lo, full_lo, full_hi, hi


@triton.jit
def _both(a, b):
    """Two cut spans as two that do not meet: the earlier one, and what the later one has beyond it."""
    swap = b[0] < a[0]
    lo, full_lo = tl.where(swap, a[0], b[0]), tl.where(swap, a[1], b[1])
    full_hi, hi = tl.where(swap, a[2], b[2]), tl.where(swap, a[3], b[3])
    first_hi = tl.where(swap, b[3], a[3])
    lo, hi = tl.maximum(lo, first_hi), tl.maximum(hi, first_hi)
    full_lo = tl.maximum(full_lo, lo)
    first = tl.where(swap, b[0], a[0]), tl.where(swap, b[1], a[1]), tl.where(swap, b[2], a[2]), first_hi
    return first + (lo, full_lo, tl.maximum(full_hi, full_lo), hi)


@triton.jit
def _counted(cut, VARIANT: tl.constexpr, BLOCK: tl.constexpr):
    """Tiles to check, full tiles, then what says where they are."""
    checked, full = (cut[1] - cut[0] + cut[3] - cut[2]) // BLOCK, (cut[2] - cut[1]) // BLOCK
    if len(VARIANT.TERMS) == 1:
        return checked, full, cut[0], cut[1], cut[2]
    else:
        more, more_full = (cut[5] - cut[4] + cut[7] - cut[6]) // BLOCK, (cut[6] - cut[5]) // BLOCK
        spans = cut[0], cut[1], cut[2], cut[4], cut[5], cut[6]
        return (checked + more, full + more_full) + spans + (checked, full)


@triton.jit
def _listed(lists, batch, head, tile, others):
    """The same from block lists (mask_lowering.Lists): the two counts, and where the tiles are listed."""
    counts = lists.counts + batch.to(tl.int64) * from_opaque(lists.count_strides[0])
    counts += head * from_opaque(lists.count_strides[1]) + tile
    row = batch.to(tl.int64) * from_opaque(lists.tile_strides[0])
    row += head.to(tl.int64) * from_opaque(lists.tile_strides[1])
    row += tile * others.to(tl.int64)
    return tl.load(counts), tl.load(counts + from_opaque(lists.count_strides[2])), lists.tiles + row
