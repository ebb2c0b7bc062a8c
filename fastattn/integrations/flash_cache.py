"""flash-attn's caches of keys and values: rows of one capacity, or blocks found through a table."""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn.masks import Lengths, Mask
from fastattn.paged import Paged

Rows = tuple[Tensor, Tensor]


class Cache:
    """The cache of one call.

    Args:
        keys, values: [cache rows, capacity, num_kv_heads, head_dim], or with a table
            [blocks, block_size, num_kv_heads, head_dim].
        held: tokens that are there, a number or an int tensor [batch]; all when None.
        rows: int [batch], the cache's row of each item, or None.
        starts: int [batch], padding before the first token, or None.
        table: int [batch, blocks of an item], or None.
        batch: the queries' batch.

    Raises:
        ValueError: shapes that do not fit, or a choice of rows together with a table.
    """

    def __init__(
        self,
        keys: Tensor,
        values: Tensor,
        held: int | Tensor | None,
        rows: Tensor | None,
        starts: Tensor | None,
        table: Tensor | None,
        batch: int,
    ) -> None:
        for name, tensor in (("k_cache", keys), ("v_cache", values)):
            if tensor.dim() != 4:
                raise ValueError(
                    f"{name}: [rows, capacity, heads, head_dim], or [blocks, block_size, heads, head_dim] with "
                    f"block_table, is needed, got shape {list(tensor.shape)}"
                )
        if table is not None and rows is not None:
            raise ValueError("block_table, cache_batch_idx: only one of them can say where an item's tokens lie")
        if table is None and rows is None and keys.shape[0] != batch:
            raise ValueError(
                f"k_cache: {batch} rows are needed for a batch of {batch}, got {keys.shape[0]}; "
                "cache_batch_idx chooses among more"
            )
        self.keys, self.values, self.rows, self.starts, self.table = keys, values, rows, starts, table
        self.capacity = keys.shape[1] * (1 if table is None else table.shape[1])
        self.written = held is not None
        if not isinstance(held, Tensor):
            held = torch.full((batch,), self.capacity if held is None else held, dtype=torch.int32, device=keys.device)
        if held.shape != (batch,):
            raise ValueError(f"cache_seqlens: a number or [{batch}] is needed, got shape {list(held.shape)}")
        self.held = self.lengths = held

    def rotate(
        self, query: Tensor, key: Tensor | None, cos: Tensor, sin: Tensor | None, interleaved: bool, ordered: bool
    ) -> tuple[Tensor, Tensor | None]:
        """query [batch, heads, q_len, dim] and new keys [batch, new, heads, dim], turned by their positions."""
        if sin is None or cos.shape != sin.shape or cos.dim() != 2 or 2 * cos.shape[1] > query.shape[-1]:
            raise ValueError(
                "rotary_cos, rotary_sin: both [positions, rotary_dim / 2] are needed, with rotary_dim at most "
                f"{query.shape[-1]}, got {list(cos.shape)} and {None if sin is None else list(sin.shape)}"
            )
        steps = torch.arange(query.shape[2], device=query.device) if ordered else query.new_zeros(1, dtype=torch.int32)
        place = (self.held[:, None] + steps).long()
        query = turned(query, cos[place][:, None], sin[place][:, None], interleaved)
        if key is not None:
            place = (self.held[:, None] + torch.arange(key.shape[1], device=key.device)).long()
            key = turned(key, cos[place][:, :, None], sin[place][:, :, None], interleaved)
        return query, key

    def write(self, key: Tensor, value: Tensor | None) -> None:
        """New tokens [batch, new, heads, dim] behind those that are there, in place."""
        if value is None or value.shape[:2] != key.shape[:2]:
            raise ValueError("k, v: both are needed, with the same batch and length, or neither")
        if not self.written:
            raise ValueError("cache_seqlens: it must be given with k and v, to say where they are written")
        batch, new = key.shape[:2]
        if self.held.device.type == "cpu" and bool((self.held + new > self.capacity).any()):
            raise ValueError(
                f"k: {new} new tokens do not fit behind {self.held.tolist()} in a cache for {self.capacity}; "
                "make a larger cache"
            )
        place = (self.held[:, None] + torch.arange(new, device=key.device)).long()  # [batch, new]
        if self.table is not None:
            size = self.keys.shape[1]
            index: Rows = (self.table.gather(1, place // size).long(), place % size)
        else:
            row = torch.arange(batch, device=key.device) if self.rows is None else self.rows.long()
            index = (row[:, None].expand_as(place), place)
        with torch.no_grad():
            self.keys[index] = key.to(self.keys.dtype)
            self.values[index] = value.to(self.values.dtype)
        self.lengths = self.held + new

    @property
    def real(self) -> Mask:
        """Which keys are there."""
        return Lengths(self.lengths, kv_starts=self.starts, validate=False)

    def read(self, mask: Mask) -> tuple[Tensor, Tensor, Mask]:
        """Keys and values as `attention` takes them, in place, and a mask over them that knows where they lie."""
        keys, values = self.keys.transpose(1, 2), self.values.transpose(1, 2)
        table = self.table if self.rows is None else self.rows[:, None]
        return keys, values, mask if table is None else Paged(mask, table.int(), keys.shape[2])


def turned(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Rotary position embedding (Su et al. 2021) of x's first dimensions; cos and sin broadcast to half of them."""
    width = 2 * cos.shape[-1]
    head = x[..., :width].float()
    one, other = (head[..., 0::2], head[..., 1::2]) if interleaved else head.chunk(2, -1)
    cos, sin = cos.float(), sin.float()
    parts = (one * cos - other * sin, one * sin + other * cos)
    head = torch.stack(parts, -1).flatten(-2) if interleaved else torch.cat(parts, -1)
    return torch.cat([head.to(x.dtype), x[..., width:]], -1)


def tokens(pool: Tensor, table: Tensor, cu: Tensor) -> Tensor:
    """Sequences laid end to end, out of a pool of blocks [blocks, block_size, heads, dim]; `cu` [sequences + 1] says
    where each begins. As many tokens as the table can hold, so that no length is read back.
    """
    if pool.dim() != 4 or table.dim() != 2 or table.shape[0] != cu.shape[0] - 1:
        raise ValueError(
            "block_table: [sequences, blocks] is needed for k and v of [blocks, block_size, heads, head_dim], got "
            f"{list(table.shape)}, {cu.shape[0] - 1} sequences and {list(pool.shape)}"
        )
    size = pool.shape[1]
    token = torch.arange(table.numel() * size, device=pool.device)
    sequence = (torch.searchsorted(cu.long(), token, right=True) - 1).clamp(max=cu.shape[0] - 2)
    place = (token - cu[sequence]).clamp(max=table.shape[1] * size - 1)
    block = table[sequence, place // size].long().clamp(0, pool.shape[0] - 1)
    return pool[block, place % size]
