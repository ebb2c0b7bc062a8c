"""Block lists: for each tile of queries, the tiles of keys to visit, and which of them need no check.

For masks without a closed form (a bool tensor, scattered segments, unions of more than two intervals), and for any
other mask too. Built on the mask's own device, without a host sync; a tile is visited if any of its pairs may be
visible, and full if all are. "May": bounds over a tile can keep a tile that turns out empty, never lose one that is
not.

    visit, full     bool [batch or 1, num_heads or 1, q_tiles, kv_tiles]
    checked, full   int32 [..., q_tiles]             how many tiles to visit: partly visible ones, full ones
    tiles           int32 [..., q_tiles, kv_tiles]   their indices: checked ones first, each kind ascending; the rest
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fastattn.masks.kinds import And, Dense, Interval, Mask, Or, Segments

Reduce = Callable[[Tensor, int], Tensor]


@dataclass(frozen=True)
class Grid:
    """The tiling of one problem: BLOCK_M queries by BLOCK_N keys."""

    q_len: int
    kv_len: int
    block_m: int
    block_n: int
    device: torch.device

    @property
    def q_tiles(self) -> int:
        return -(-self.q_len // self.block_m)

    @property
    def kv_tiles(self) -> int:
        return -(-self.kv_len // self.block_n)

    def over_queries(self, reduce: Reduce, rows: Tensor) -> Tensor:
        """[..., q_len] -> [..., q_tiles]."""
        return _by_tile(reduce, rows, -1, self.block_m)

    def over_keys(self, reduce: Reduce, columns: Tensor) -> Tensor:
        """[..., kv_len] -> [..., kv_tiles]."""
        return _by_tile(reduce, columns, -1, self.block_n)


class TileClasses(NamedTuple):
    """Which tiles may show anything, and which show everything; shapes at the head of this file."""

    visit: Tensor
    full: Tensor


class BlockList(NamedTuple):
    """What a kernel walks: see the head of this file."""

    checked: Tensor
    full: Tensor
    tiles: Tensor


def block_list(mask: Mask, grid: Grid, *, mirror: bool = False) -> BlockList:
    """The block list of a mask for one tiling, O(tiles) memory; `mirror` lists tiles of queries for tiles of keys.

    A listed tile that reaches over the end is never full here: whoever walks it must check.
    """
    visit, full = (each.mT if mirror else each for each in classify(mask, grid))
    length, block = (grid.q_len, grid.block_m) if mirror else (grid.kv_len, grid.block_n)
    whole = torch.arange(1, visit.shape[-1] + 1, device=visit.device) * block <= length
    full = full & visit & whole
    order = torch.where(visit, full.to(torch.int8), 2)
    tiles = torch.argsort(order, dim=-1, stable=True).to(torch.int32).contiguous()
    return BlockList((visit & ~full).sum(-1, dtype=torch.int32), full.sum(-1, dtype=torch.int32), tiles)


def classify(mask: Mask, grid: Grid) -> TileClasses:
    """Visit and full for every tile of the grid."""
    if isinstance(mask, Dense):
        return _from_table(mask.dense(grid.q_len, grid.kv_len), grid)
    intervals = mask.intervals(grid.q_len, grid.kv_len, grid.device)
    if intervals is not None:
        return _union([_from_interval(interval, grid) for interval in intervals])
    if isinstance(mask, Segments):
        return _from_ids(mask, grid)
    if isinstance(mask, Or):
        return _union([classify(mask.left, grid), classify(mask.right, grid)])
    if isinstance(mask, And):
        left, right = classify(mask.left, grid), classify(mask.right, grid)
        return TileClasses(left.visit & right.visit, left.full & right.full)
    raise NotImplementedError(
        f"no tile rule for mask {type(mask).__name__}; give it `interval` or a case in blocks.classify"
    )


def _union(parts: list[TileClasses]) -> TileClasses:
    visit, full = parts[0]
    for part in parts[1:]:
        visit, full = visit | part.visit, full | part.full
    return TileClasses(visit, full)


def _from_table(table: Tensor, grid: Grid) -> TileClasses:
    """By looking at every element once; nothing of the table's size is made."""
    visit, full = (
        _by_tile(reduce, _by_tile(reduce, table, -1, grid.block_n), -2, grid.block_m)
        for reduce in (torch.any, torch.all)
    )
    return TileClasses(visit, full)


def _from_interval(interval: Interval, grid: Grid) -> TileClasses:
    """A tile of rows reaches from its first start to its last stop; it is sure of what lies between last start and
    first stop.
    """
    start, stop = (each.expand(*each.shape[:-1], grid.q_len) for each in interval)
    nothing = start >= stop
    least, most = -1, grid.kv_len + 1
    first = grid.over_queries(torch.amin, start.masked_fill(nothing, most)).unsqueeze(-1)
    last = grid.over_queries(torch.amax, stop.masked_fill(nothing, least)).unsqueeze(-1)
    sure_lo = grid.over_queries(torch.amax, start.masked_fill(nothing, most)).unsqueeze(-1)
    sure_hi = grid.over_queries(torch.amin, stop).unsqueeze(-1)
    kv_lo = torch.arange(grid.kv_tiles, device=start.device) * grid.block_n
    kv_hi = (kv_lo + grid.block_n).clamp(max=grid.kv_len)
    return TileClasses((kv_lo < last) & (kv_hi > first), (kv_lo >= sure_lo) & (kv_hi <= sure_hi))


def _from_ids(mask: Segments, grid: Grid) -> TileClasses:
    """Tiles whose ranges of ids overlap may meet; two tiles of one and the same id do everywhere."""

    def ranges(over: Callable[[Reduce, Tensor], Tensor], ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        hidden = ids < 0
        low = over(torch.amin, ids.masked_fill(hidden, torch.iinfo(torch.int64).max))
        high = over(torch.amax, ids)
        return low, high, (low == high) & ~over(torch.any, hidden)

    q_low, q_high, q_one = (each[:, None, :, None] for each in ranges(grid.over_queries, mask.q_ids.long()))
    k_low, k_high, k_one = (each[:, None, None, :] for each in ranges(grid.over_keys, mask.key_ids.long()))
    return TileClasses((q_low <= k_high) & (k_low <= q_high), q_one & k_one & (q_low == k_low))


def _by_tile(reduce: Reduce, tensor: Tensor, dim: int, block: int) -> Tensor:
    """Reduce a dimension tile by tile, the last one as short as it comes."""
    length = tensor.shape[dim]
    whole = length // block
    parts = [reduce(tensor.narrow(dim, 0, whole * block).unflatten(dim, (whole, block)), dim)] if whole else []
    if length % block or not parts:
        rest = tensor.narrow(dim, whole * block, length - whole * block)
        parts.append(reduce(rest, dim).unsqueeze(dim) if length % block else rest)
    return torch.cat(parts, dim) if len(parts) > 1 else parts[0]
