"""The caches whose tokens lie in blocks: our own pool, and somebody else's."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastattn.cache.base import KVCache, both, check_dtype, check_size, move
from fastattn.masks import Lengths, Mask
from fastattn.masks.base import holds_ints
from fastattn.masks.paged import Paged, check_held, check_pools, check_table

__all__ = ["ForeignBlocks", "PagedCache"]


class _Blocks(KVCache):
    """Pools [blocks, num_kv_heads, block_size, head_dim] and a table int32 [batch, blocks of a sequence]."""

    takes_ragged = True
    keys: Tensor
    values: Tensor
    table: Tensor

    @property
    def block_size(self) -> int:
        """Tokens of a block."""
        return self.keys.shape[2]

    @property
    def kv_len(self) -> int:
        return self.table.shape[1] * self.block_size

    def tensors(self) -> tuple[Tensor, Tensor]:
        return self.keys, self.values

    def mask(self, mask: Mask, q_len: int) -> Mask:
        offset = self.before.long() if self.ragged else self.lengths.long() - q_len
        held = Lengths(self.lengths, kv_starts=self.starts, validate=False)
        return Paged(both(move(mask, offset), held), self.table, self.block_size)


class PagedCache(_Blocks):
    """A pool that hands out its blocks one by one."""

    def __init__(
        self,
        batch: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        blocks: int,
        block_size: int,
        head_dim_v: int | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        starts: Tensor | None = None,
        table_width: int | None = None,
    ) -> None:
        super().__init__(batch, device, starts)
        width = blocks if table_width is None else table_width
        dims = head_dim, head_dim if head_dim_v is None else head_dim_v
        sizes = {"num_kv_heads": num_kv_heads, "head_dim": head_dim, "head_dim_v": dims[1], "blocks": blocks,
                 "block_size": block_size, "table_width": width}  # fmt: skip
        for name, size in sizes.items():
            check_size(name, size)
        check_dtype(dtype)
        self.keys, self.values = (
            torch.empty(blocks, num_kv_heads, block_size, dim, dtype=dtype, device=device) for dim in dims
        )
        self.table = torch.zeros(batch, width, dtype=torch.int32, device=device)
        self.free_blocks = list(range(blocks - 1, -1, -1))
        self.owned: list[list[int]] = [[] for _ in range(batch)]

    def free(self, item: int) -> None:
        """Hand a sequence's blocks back and begin it anew.

        Raises:
            ValueError: there is no such sequence.
        """
        if type(item) is not int or not 0 <= item < self.batch:
            raise ValueError(f"item: a sequence from 0 to {self.batch - 1} is needed, got {item!r}")
        self._check_writable()
        self.free_blocks.extend(reversed(self.owned[item]))
        self.owned[item] = []
        self.held[item] = 0
        self.lengths[item] = 0
        self.before[item] = 0

    def reset(self) -> None:
        for item in range(self.batch):
            self.free(item)
        super().reset()

    def _write(self, key: Tensor, value: Tensor, counts: list[int] | None) -> None:
        new, size = key.shape[2], self.block_size
        after = [held + count for held, count in zip(self.held, counts or [new] * self.batch, strict=True)]
        wanted = [-(-most // size) - len(own) for most, own in zip(after, self.owned, strict=True)]
        missing = sum(max(want, 0) for want in wanted)
        longest = max(len(own) + max(want, 0) for own, want in zip(self.owned, wanted, strict=True))
        if missing > len(self.free_blocks) or longest > self.table.shape[1]:
            why = (
                f"{missing} more blocks are needed and {len(self.free_blocks)} are free; free(item) hands some back"
                if missing > len(self.free_blocks)
                else f"a sequence of {longest} blocks is wider than table_width={self.table.shape[1]}"
            )
            raise ValueError(f"KVCache.paged: {new} more tokens of each sequence do not fit: {why}")
        for item, want in enumerate(wanted):
            if want > 0:
                at = len(self.owned[item])
                fresh = [self.free_blocks.pop() for _ in range(want)]
                self.owned[item] += fresh
                self.table[item, at : at + want] = torch.tensor(fresh, dtype=torch.int32, device=self.table.device)
        items, token, place = self._real(counts, new)
        if items is None:
            block = self.table.long().gather(1, place // size)
            key, value = key.transpose(1, 2), value.transpose(1, 2)
        else:
            block = self.table.long()[items, place // size]
            key, value = key[items, :, token], value[items, :, token]
        self.keys[block, :, place % size] = key
        self.values[block, :, place % size] = value


class ForeignBlocks(_Blocks):
    """Blocks that somebody else fills."""

    def __init__(self, key_pool: Tensor, value_pool: Tensor, table: Tensor, lengths: Sequence[int] | Tensor) -> None:
        check_pools("key_pool", key_pool, "value_pool", value_pool)
        check_dtype(key_pool.dtype)
        check_table("table", table, table.shape[0] if isinstance(table, Tensor) and table.dim() else 0, key_pool.device)
        if not table.shape[1]:
            raise ValueError(f"table: at least one column is needed, got {list(table.shape)}")
        super().__init__(table.shape[0], key_pool.device, None)
        self.keys, self.values = key_pool.transpose(1, 2), value_pool.transpose(1, 2)
        self.table = table
        lengths = torch.as_tensor(lengths, device=key_pool.device)
        if lengths.shape != (self.batch,) or not holds_ints(lengths):
            raise ValueError(f"lengths: ints [{self.batch}] are needed, got {lengths.dtype} {list(lengths.shape)}")
        check_held("table", table, lengths, key_pool.shape[0], self.block_size)
        self.lengths = lengths.to(torch.int32)

    def mask(self, mask: Mask, q_len: int) -> Mask:
        check_held("table", self.table, self.lengths, self.keys.shape[0], self.block_size)
        return super().mask(mask, q_len)

    @property
    def held(self) -> list[int]:  # type: ignore[override]
        return self.lengths.tolist()

    def _forget(self) -> None:
        """Nothing: others count."""

    def _write(self, key: Tensor, value: Tensor, counts: list[int] | None) -> None:
        raise ValueError("KVCache.from_blocks: somebody else's blocks are read and never written")

    def reset(self) -> None:
        raise ValueError("KVCache.from_blocks: somebody else's blocks are read and never written")

    def __repr__(self) -> str:
        return f"ForeignBlocks(batch={self.batch}, blocks={self.keys.shape[0]}, block_size={self.block_size})"
