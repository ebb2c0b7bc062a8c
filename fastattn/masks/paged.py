"""Keys and values in blocks, found through a table: how they cross the library.

A pool [blocks, num_kv_heads, block_size, head_dim] (any strides) holds the tokens of many sequences; token j of batch
item b lies in block `table[b, j // block_size]`, at row j % block_size (Kwon et al. 2023, PagedAttention). The table
travels with the mask, as it says where the keys are that the mask is about; kernels read the blocks in place.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastattn import tracing
from fastattn.masks.base import Interval, Length, Mask, may_look

__all__ = ["Paged", "check_held", "check_pools", "check_table"]


@dataclass(frozen=True, eq=False)
class Paged(Mask):
    """A mask over keys in blocks. `table`: int32 [batch, blocks of an item]; entries are clamped to the pool's blocks,
    and those that hold nothing visible may be anything.
    """

    inside: Mask
    table: Tensor
    block_size: int

    @property
    def kv_len(self) -> int:
        """Keys that a row of the table has space for."""
        return self.table.shape[1] * self.block_size

    def interval(self, q_idx: Tensor, q_len: Length, kv_len: Length) -> Interval:
        return self.inside.interval(q_idx, q_len, kv_len)

    def intervals(self, q_len: int, kv_len: int, device: torch.device | None = None) -> list[Interval] | None:
        return self.inside.intervals(q_len, kv_len, device)

    def interval_count(self) -> int | None:
        return self.inside.interval_count()

    def dense(self, q_len: int, kv_len: int, *, device: torch.device | None = None) -> Tensor:
        return self.inside.dense(q_len, kv_len, device=device)

    def check(self, batch: int, num_heads: int, q_len: int, kv_len: int) -> None:
        check_table("block table", self.table, batch, self.table.device)
        self.inside.check(batch, num_heads, q_len, kv_len)

    def laid_out(self, pool: Tensor) -> Tensor:
        """The tokens of every item one after another, [batch, num_kv_heads, kv_len, head_dim]: a copy."""
        blocks, heads, size, dim = pool.shape
        batch, count = self.table.shape
        if not blocks:
            return pool.new_zeros(batch, heads, self.kv_len, dim)
        chosen = pool[self.table.long().clamp(0, blocks - 1)]  # [batch, count, heads, size, dim]
        return chosen.transpose(1, 2).reshape(batch, heads, count * size, dim)


def check_table(name: str, table: object, batch: int, device: torch.device) -> None:
    """A table of blocks, whatever call it comes with.

    Raises:
        TypeError, ValueError: it is no int32 [batch, blocks of an item] on the device of the pools.
    """
    want = f"{name}: int32 [{batch}, blocks of an item] is needed"
    if not isinstance(table, Tensor):
        raise TypeError(f"{want}, got {type(table).__name__}")
    if table.dtype != torch.int32 or table.dim() != 2 or table.shape[0] != batch:
        raise ValueError(f"{want}, got {table.dtype}, shape {list(table.shape)}")
    if table.device != device:
        raise ValueError(f"{name}: it must be on the pools' device {device}, got {table.device}")


def check_pools(key_name: str, keys: Any, value_name: str, values: Any) -> None:
    """Pools [blocks, block_size, num_kv_heads, head_dim] that one table is about.

    Raises:
        TypeError, ValueError: others, or none of any token.
    """
    for name, pool in ((key_name, keys), (value_name, values)):
        want = f"{name}: [blocks, block_size, num_kv_heads, head_dim] is needed"
        if not isinstance(pool, Tensor):
            raise TypeError(f"{want}, got {type(pool).__name__}")
        if pool.dim() != 4:
            raise ValueError(f"{want}, got shape {list(pool.shape)}")
        if 0 in pool.shape[:2]:
            raise ValueError(f"{want}, with at least one block of at least one token, got {list(pool.shape)}")
    if keys.shape[:3] != values.shape[:3]:
        raise ValueError(
            f"{key_name}, {value_name}: the same blocks, block_size and num_kv_heads are needed, got "
            f"{list(keys.shape)} and {list(values.shape)}"
        )
    if keys.dtype != values.dtype or keys.device != values.device:
        raise ValueError(
            f"{value_name}: {keys.dtype} on {keys.device} is needed, got {values.dtype} on {values.device}"
        )


def check_held(name: str, table: Tensor, lengths: Tensor, blocks: int, block_size: int) -> None:
    """Whether the tokens that each item holds lie in blocks that are there. Looks at a CPU's numbers alone, in every
    call; on a GPU, where looking would wait, the kernels clamp.

    Args:
        lengths: int [batch].

    Raises:
        ValueError: an item is longer than its row, or one of the entries that it needs names no block.
    """
    if tracing.being_traced() or not may_look(None, [table, lengths]):
        return
    width = table.shape[1]
    if bool(((lengths < 0) | (lengths > width * block_size)).any()):
        raise ValueError(
            f"{name}: a row of {width} blocks of {block_size} has space for lengths from 0 to {width * block_size}, "
            f"got {lengths.tolist()}"
        )
    needed = torch.arange(width) * block_size < lengths[:, None]
    wrong = needed & ((table < 0) | (table >= blocks))
    if bool(wrong.any()):
        raise ValueError(
            f"{name}: blocks from 0 to {blocks - 1} are there, got {table[wrong].tolist()[:4]} where tokens lie"
        )
