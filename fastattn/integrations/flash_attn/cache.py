"""flash-attn's caches of keys and values: rows of one capacity, or blocks found through a table."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastattn import tracing
from fastattn.masks import Lengths, Mask
from fastattn.masks.paged import Paged, check_held, check_pools, check_table

Rows = tuple[Tensor, Tensor]


class Cache:
    """The cache of one call, checked; nothing is written before `write`.

    Args:
        query: [batch, num_heads, q_len, head_dim].
        keys, values: [cache rows, capacity, num_kv_heads, head_dim], or with a table
            [blocks, block_size, num_kv_heads, head_dim].
        held: tokens that are there, a number or an int tensor [batch]; all when None.
        rows: int [batch], the cache's row of each item, or None.
        starts: int [batch], padding before the first token, or None.
        table: int [batch, blocks of an item], or None.

    Raises:
        TypeError, ValueError: what does not fit, or a choice of rows together with a table; on a CPU also numbers that
            lie outside of the cache.
    """

    def __init__(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        held: int | Tensor | None,
        rows: Tensor | None,
        starts: Tensor | None,
        table: Tensor | None,
    ) -> None:
        _check_stores(query, keys, values)
        batch = query.shape[0]
        if table is not None and rows is not None:
            raise ValueError("block_table, cache_batch_idx: only one of them can say where an item's tokens lie")
        if table is None and rows is None and keys.shape[0] != batch:
            raise ValueError(
                f"k_cache: {batch} rows are needed for a batch of {batch}, got {keys.shape[0]}; "
                "cache_batch_idx chooses among more"
            )
        for name, ints in (("cache_batch_idx", rows), ("cache_leftpad", starts)):
            if ints is not None:
                _check_ints(name, ints, batch, keys.device)
        if table is not None:
            check_pools("k_cache", keys, "v_cache", values)
            check_table("block_table", table, batch, keys.device)
        self.keys, self.values, self.rows, self.starts, self.table = keys, values, rows, starts, table
        self.capacity = keys.shape[1] * (1 if table is None else table.shape[1])
        self.written = held is not None
        if held is None or type(held) is int:
            held = torch.full((batch,), self.capacity if held is None else held, dtype=torch.int32, device=keys.device)
        counts: Any = held
        _check_ints("cache_seqlens", counts, batch, keys.device, "a number or ")
        self.held: Tensor = counts
        self.lengths = self.held  # with the new ones
        self.new: Rows | None = None
        if self._looked_at:
            _check_range("cache_seqlens", self.held, self.capacity, "tokens that the cache has space for")
            for name, ints, most, what in (
                ("cache_batch_idx", rows, keys.shape[0] - 1, "the last row of k_cache"),
                ("cache_leftpad", starts, self.capacity, "tokens that the cache has space for"),
            ):
                if ints is not None:
                    _check_range(name, ints, most, what)
            self._check_blocks()

    @property
    def _looked_at(self) -> bool:
        """Whether numbers inside of tensors are checked: where looking waits for nobody."""
        watched = tracing.being_traced() or tracing.transforms_active()
        return self.keys.device.type == "cpu" and not watched

    def _check_blocks(self) -> None:
        """Of each item's row in the table, the entries that its tokens need."""
        if self.table is not None:
            check_held("block_table", self.table, self.lengths, self.keys.shape[0], self.keys.shape[1])

    def expect(self, key: Tensor | None, value: Tensor | None) -> None:
        """New tokens [batch, new, heads, dim] to come behind those that are there."""
        if key is None and value is None:
            return
        if key is None or value is None:
            raise ValueError("k, v: both are needed, with the same batch and length, or neither")
        if not self.written:
            raise ValueError("cache_seqlens: it must be given with k and v, to say where they are written")
        batch, new = self.held.shape[0], key.shape[1] if isinstance(key, Tensor) and key.dim() == 4 else "new"
        for name, tensor, store in (("k", key, self.keys), ("v", value, self.values)):
            want = [batch, new, *store.shape[2:]]
            if not isinstance(tensor, Tensor) or list(tensor.shape) != want:
                got = list(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
                raise ValueError(f"{name}: [batch, new, num_kv_heads, head_dim] = {want} is needed, got {got}")
            if tensor.dtype != store.dtype or tensor.device != store.device:
                raise ValueError(
                    f"{name}: the cache holds {store.dtype} on {store.device}, got {tensor.dtype} on {tensor.device}"
                )
        refuse_gradients(k=key, v=value, k_cache=self.keys, v_cache=self.values)
        self.new, self.lengths = (key, value), self.held + key.shape[1]
        if self._looked_at:
            if bool((self.lengths > self.capacity).any()):
                raise ValueError(
                    f"k: {new} new tokens do not fit behind {self.held.tolist()} in a cache for {self.capacity}; "
                    "make a larger cache"
                )
            self._check_blocks()

    def rotate(self, query: Tensor, cos: Tensor | None, sin: Tensor | None, interleaved: bool, ordered: bool) -> Tensor:
        """query [batch, heads, q_len, dim] turned by its positions, and the new keys by theirs."""
        given = [each for each in (cos, sin) if isinstance(each, Tensor) and each.dim() == 2]
        if cos is None or len(given) < 2 or given[0].shape != given[1].shape or 2 * cos.shape[1] > query.shape[-1]:
            got = [list(each.shape) if isinstance(each, Tensor) else each for each in (cos, sin)]
            raise ValueError(
                "rotary_cos, rotary_sin: both [positions, rotary_dim / 2] are needed, with rotary_dim at most "
                f"{query.shape[-1]}, got {got[0]} and {got[1]}"
            )
        if self.new is None:
            raise ValueError("rotary_cos, rotary_sin: they turn new tokens; k and v are needed with them")
        refuse_gradients(rotary_cos=cos, rotary_sin=sin)
        cos, sin = given
        key, value = self.new
        steps = torch.arange(query.shape[2], device=query.device) if ordered else query.new_zeros(1, dtype=torch.int32)
        last = max(key.shape[1], steps.shape[0])
        if self._looked_at and len(self.held) and int(self.held.max()) + last > cos.shape[0]:
            raise ValueError(
                f"rotary_cos: {int(self.held.max()) + last} positions are needed, with cache_seqlens up to "
                f"{int(self.held.max())}, got {cos.shape[0]}"
            )
        place = (self.held[:, None] + steps).long()
        query = turned(query, cos[place][:, None], sin[place][:, None], interleaved)
        place = (self.held[:, None] + torch.arange(key.shape[1], device=key.device)).long()
        self.new = turned(key, cos[place][:, :, None], sin[place][:, :, None], interleaved), value
        return query

    def write(self) -> None:
        """The new tokens, in place."""
        if self.new is None:
            return
        key, value = self.new
        batch, new = key.shape[:2]
        place = (self.held[:, None] + torch.arange(new, device=key.device)).long()  # [batch, new]
        if self.table is not None:
            size = self.keys.shape[1]
            index: Rows = (self.table.long().gather(1, place // size), place % size)
        else:
            row = torch.arange(batch, device=key.device) if self.rows is None else self.rows.long()
            index = (row[:, None].expand_as(place), place)
        with torch.no_grad():
            self.keys[index] = key
            self.values[index] = value

    @property
    def real(self) -> Mask:
        """Which keys are there."""
        return Lengths(self.lengths, kv_starts=self.starts, validate=False)

    def read(self, mask: Mask) -> tuple[Tensor, Tensor, Mask]:
        """Keys and values as `attention` takes them, in place, and a mask over them that knows where they lie."""
        keys, values = self.keys.transpose(1, 2), self.values.transpose(1, 2)
        table = self.table if self.rows is None else self.rows[:, None]
        return keys, values, mask if table is None else Paged(mask, table.int(), keys.shape[2])


def _check_stores(query: Tensor, keys: Tensor, values: Tensor) -> None:
    """Kinds, shapes and dtypes of the cache itself."""
    for name, tensor in (("k_cache", keys), ("v_cache", values)):
        if not isinstance(tensor, Tensor) or tensor.dim() != 4:
            got = f"shape {list(tensor.shape)}" if isinstance(tensor, Tensor) else type(tensor).__name__
            raise ValueError(
                f"{name}: [rows, capacity, heads, head_dim], or [blocks, block_size, heads, head_dim] with "
                f"block_table, is needed, got {got}"
            )
        if tensor.dtype != query.dtype or tensor.device != query.device:
            raise ValueError(
                f"{name}: q's dtype and device are needed, {query.dtype} on {query.device}, got {tensor.dtype} on "
                f"{tensor.device}"
            )
    if keys.shape[:3] != values.shape[:3]:
        raise ValueError(
            f"k_cache, v_cache: the same rows, capacity and heads are needed, got {list(keys.shape)} and "
            f"{list(values.shape)}"
        )


def refuse_gradients(**tensors: Tensor | None) -> None:
    """Refuse what wants a gradient and takes part in what is written into a cache.

    Raises:
        ValueError: a tensor requires one, and gradients are being recorded.
    """
    for name, tensor in tensors.items():
        if isinstance(tensor, Tensor) and tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{name}: it requires a gradient, and flash_attn_with_kvcache gives none, as it writes into the cache; "
                "call under torch.no_grad() or with it detached, or take flash_attn_func over whole sequences"
            )


def _check_ints(name: str, ints: object, batch: int, device: torch.device, also: str = "") -> None:
    want = f"[{batch}]"
    if not isinstance(ints, Tensor):
        raise TypeError(f"{name}: {also}an int tensor {want} is needed, got {type(ints).__name__}")
    if ints.dtype not in (torch.int32, torch.int64) or list(ints.shape) != [batch]:
        raise ValueError(f"{name}: {also}int32 {want} is needed, got {ints.dtype}, shape {list(ints.shape)}")
    if ints.device != device:
        raise ValueError(f"{name}: it must be on the cache's device {device}, got {ints.device}")


def _check_range(name: str, ints: Tensor, most: int, what: str) -> None:
    if bool(((ints < 0) | (ints > most)).any()):
        raise ValueError(f"{name}: 0 to {most}, {what}, got {ints.tolist()}")


def turned(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Rotary position embedding (Su et al. 2021) of x's first dimensions; cos and sin broadcast to half of them."""
    width = 2 * cos.shape[-1]
    head = x[..., :width].float()
    one, other = (head[..., 0::2], head[..., 1::2]) if interleaved else head.chunk(2, -1)
    cos, sin = cos.float(), sin.float()
    parts = (one * cos - other * sin, one * sin + other * cos)
    head = torch.stack(parts, -1).flatten(-2) if interleaved else torch.cat(parts, -1)
    return torch.cat([head.to(x.dtype), x[..., width:]], -1)


def tokens(keys: Tensor, values: Tensor, table: Tensor, cu: Tensor) -> Rows:
    """Sequences laid end to end, out of pools of blocks [blocks, block_size, heads, dim]; `cu` int [sequences + 1] says
    where each begins. As many tokens as the table can hold, so that no length is read back.

    Raises:
        TypeError, ValueError: pools, a table or lengths that do not fit each other.
    """
    check_pools("k", keys, "v", values)
    check_table("block_table", table, cu.shape[0] - 1, keys.device)
    blocks, size = keys.shape[:2]
    check_held("block_table", table, cu[1:] - cu[:-1], blocks, size)
    token = torch.arange(table.numel() * size, device=keys.device)
    sequence = (torch.searchsorted(cu.long(), token, right=True) - 1).clamp(max=max(cu.shape[0] - 2, 0))
    place = (token - cu[sequence]).clamp(max=table.shape[1] * size - 1)
    block = table[sequence, place // size].long().clamp(0, blocks - 1)
    return keys[block, place % size], values[block, place % size]
