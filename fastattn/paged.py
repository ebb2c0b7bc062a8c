"""Keys and values in blocks, found through a table: how they cross the library.

A pool [blocks, num_kv_heads, block_size, head_dim] (any strides) holds the tokens of many sequences; token j of batch
item b lies in block `table[b, j // block_size]`, at row j % block_size (Kwon et al. 2023, PagedAttention). The table
travels with the mask, as it says where the keys are that the mask is about; kernels read the blocks in place.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastattn.mask import Interval, Length, Mask

__all__ = ["Paged"]


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
        """Keys that a row of the table has room for."""
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
        if self.table.dtype != torch.int32 or self.table.dim() != 2 or self.table.shape[0] != batch:
            raise ValueError(
                f"block table: int32 [{batch}, blocks of an item] is needed, got {self.table.dtype} "
                f"{list(self.table.shape)}"
            )
        self.inside.check(batch, num_heads, q_len, kv_len)

    def laid_out(self, pool: Tensor) -> Tensor:
        """The tokens of every item one after another, [batch, num_kv_heads, kv_len, head_dim]: a copy."""
        blocks, heads, size, dim = pool.shape
        batch, count = self.table.shape
        if not blocks:
            return pool.new_zeros(batch, heads, self.kv_len, dim)
        chosen = pool[self.table.long().clamp(0, blocks - 1)]  # [batch, count, heads, size, dim]
        return chosen.transpose(1, 2).reshape(batch, heads, count * size, dim)
