"""What every cache of keys and values has, and what `attention` takes of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastattn import tracing
from fastattn.masks import And, Full, Lengths, Mask, Or, Packed, Prefix, Window, flex
from fastattn.masks.kinds import Placed as _Placed
from fastattn.spec import DTYPES

__all__ = ["CacheView", "KVCache", "placed"]

FIRST = 16
"""Tokens that a growing cache starts with space for."""


class CacheView:
    """The keys or the values of a cache, as `attention` takes them. Shape, dtype and device are those of a tensor
    [batch, num_kv_heads, tokens, head_dim] of what is held, of all slots where these never move (static, in blocks).
    """

    def __init__(self, cache: KVCache, part: int) -> None:
        self.cache, self.part = cache, part

    @property
    def shape(self) -> torch.Size:
        heads, dim = self.tensor.shape[1], self.tensor.shape[3]
        return torch.Size((self.cache.batch, heads, self.cache.kv_len, dim))

    @property
    def tensor(self) -> Tensor:
        """What lies in memory: [batch, num_kv_heads, slots, head_dim], or a pool of blocks."""
        return self.cache.tensors()[self.part]

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    @property
    def device(self) -> torch.device:
        return self.tensor.device

    def __repr__(self) -> str:
        return f"CacheView({'value' if self.part else 'key'} of {self.cache})"


class KVCache:
    """Keys and values of a batch of sequences. Made by `static`, `growing`, `sliding`, `paged` and `from_blocks`.

    `held` counts each sequence's tokens, on the host; `lengths` is the same as int32 [batch] on the device. (A static
    cache counts on the device alone: its `held` waits for it.)
    """

    def __init__(self, batch: int, device: torch.device | str | None, starts: Tensor | None) -> None:
        check_size("batch", batch)
        self.batch = batch
        self.lengths = torch.zeros(batch, dtype=torch.int32, device=device)
        self.before = self.lengths.clone()  # the last update
        self.ragged = False  # whether that update brought padding along
        self._forget()
        if starts is not None:
            _check_starts(starts, self.lengths)
        self.starts = starts

    @staticmethod
    def static(batch: int, num_kv_heads: int, capacity: int, head_dim: int, **options: Any) -> KVCache:
        """Space for `capacity` tokens of each sequence, taken at once and never moved: for CUDA graphs and compilers.

        Args:
            batch, num_kv_heads, capacity, head_dim: sizes.
            options: head_dim_v (head_dim where missing), dtype, device; starts, int [batch]: tokens of left padding.
        """
        from fastattn.cache.contiguous import StaticCache

        return StaticCache(batch, num_kv_heads, capacity, head_dim, **options)

    @staticmethod
    def growing(batch: int, num_kv_heads: int, head_dim: int, **options: Any) -> KVCache:
        """Space that doubles when it is full: n tokens cost O(n) copies. Options as `static` takes them."""
        from fastattn.cache.contiguous import GrowingCache

        return GrowingCache(batch, num_kv_heads, head_dim, **options)

    @staticmethod
    def sliding(batch: int, num_kv_heads: int, window: int, head_dim: int, **options: Any) -> KVCache:
        """The last tokens alone: a query sees itself and the `window` - 1 tokens before it. Options as `static`."""
        from fastattn.cache.contiguous import SlidingCache

        return SlidingCache(batch, num_kv_heads, window, head_dim, **options)

    @staticmethod
    def paged(
        batch: int, num_kv_heads: int, head_dim: int, *, blocks: int, block_size: int = 64, **options: Any
    ) -> KVCache:
        """Blocks of `block_size` tokens, any size, handed out of a pool of `blocks` as the sequences grow. `free(item)`
        hands a sequence's blocks back. Options as `static`; `table_width`: the most blocks of one sequence.
        """
        from fastattn.cache.paged import PagedCache

        return PagedCache(batch, num_kv_heads, head_dim, blocks=blocks, block_size=block_size, **options)

    @staticmethod
    def from_blocks(key_pool: Tensor, value_pool: Tensor, table: Tensor, lengths: Sequence[int] | Tensor) -> KVCache:
        """Somebody else's blocks, read and never written.

        Args:
            key_pool [blocks, block_size, num_kv_heads, head_dim], value_pool [..., head_dim_v]: any strides.
            table: int32 [batch, blocks of a sequence].
            lengths: tokens of each sequence, ints or int32 [batch] on the pools' device.
        """
        from fastattn.cache.paged import ForeignBlocks

        return ForeignBlocks(key_pool, value_pool, table, lengths)

    @property
    def key(self) -> CacheView:
        """The keys held, to be passed to `attention` together with `value`."""
        return CacheView(self, 0)

    @property
    def value(self) -> CacheView:
        """The values held."""
        return CacheView(self, 1)

    def update(
        self, key: Tensor, value: Tensor, *, new_lengths: Sequence[int] | Tensor | None = None
    ) -> tuple[CacheView, CacheView]:
        """Append tokens to every sequence.

        Args:
            key [batch, num_kv_heads, new, head_dim], value [..., head_dim_v]: copied in; no gradient comes back.
            new_lengths: how many of `new` are real in each sequence, the rest right padding: ints, or a tensor on the
                CPU. All when None. Where they differ, query i of a sequence stands at its token held before + i.

        Returns:
            The views of keys and values.

        Raises:
            ValueError: shapes that do not fit, gradients asked for, no space left.
        """
        self._check(key, value)
        new = key.shape[2]
        counts = None if new_lengths is None else self._counts(new_lengths, new)
        if counts is not None and len(set(counts)) > 1 and not self.takes_ragged:
            raise ValueError(
                f"new_lengths: {type(self).__name__} keeps sequences of one length, got {counts}; "
                "KVCache.static and KVCache.paged keep different ones"
            )
        with torch.no_grad():
            self._write(key, value, counts)
            self.before.copy_(self.lengths)
            self.lengths.add_(new if counts is None else torch.tensor(counts, dtype=torch.int32, device=key.device))
        self.ragged = counts is not None and any(count != new for count in counts)
        self._count([new] * self.batch if counts is None else counts)
        return self.key, self.value

    def _count(self, counts: list[int]) -> None:
        """The host's part of an update."""
        self.was = list(self.held)
        self.held = [held + count for held, count in zip(self.held, counts, strict=True)]

    takes_ragged = False
    """Whether its sequences may differ in length."""

    @property
    def kv_len(self) -> int:
        """Keys that `attention` is given: those held, or the slots there are."""
        raise NotImplementedError

    def tensors(self) -> tuple[Tensor, Tensor]:
        """Keys and values as they lie in memory."""
        raise NotImplementedError

    def mask(self, mask: Mask, q_len: int) -> Mask:
        """What is visible of the tensors to q_len queries at the end, where `mask` is about what is held."""
        raise NotImplementedError

    def torchs(self, mask: object, query: Tensor, key: CacheView) -> Mask:
        """What a call's `mask` says, as `flex.as_mask` reads it: a CausalBias is about what is held, a BlockMask
        about the keys that `attention` is given.
        """
        if flex.is_causal_bias(mask) and not tracing.being_traced():
            bias: Any = mask
            for held in set(self.held):
                flex.of_causal_bias(bias, query.shape[2], held)  # made for other lengths: refused
            return flex.of_causal_bias(bias, bias.seq_len_q, bias.seq_len_kv)
        return flex.as_mask(mask, query, key)  # type: ignore[arg-type]

    def reset(self) -> None:
        """Forget every token and keep the memory."""
        self._check_writable()
        self.lengths.zero_()
        self.before.zero_()
        self.ragged = False
        self._forget()

    def _forget(self) -> None:
        """The host's part of it."""
        self.held = [0] * self.batch
        self.was = list(self.held)

    def __repr__(self) -> str:
        held = self.held[0] if len(set(self.held)) == 1 else self.held
        return f"{type(self).__name__}(batch={self.batch}, held={held})"

    held: list[int]
    was: list[int]  # held before the last update

    def _write(self, key: Tensor, value: Tensor, counts: list[int] | None) -> None:
        raise NotImplementedError

    def _real(self, counts: list[int] | None, new: int) -> tuple[Tensor | None, Tensor, Tensor]:
        """Which of the new tokens to write: their items and numbers, and where in its sequence each goes. Items None:
        all of them, [1, new] and [batch, new].
        """
        device = self.lengths.device
        if counts is None:
            token = torch.arange(new, device=device)[None]
            return None, token, self.lengths.long()[:, None] + token
        pairs = [(item, token) for item, count in enumerate(counts) for token in range(count)]
        item, token = torch.tensor(pairs, dtype=torch.int64, device=device).reshape(-1, 2).unbind(1)
        return item, token, self.lengths.long()[item] + token

    def _check_writable(self) -> None:
        traced = tracing.being_traced()
        if not traced and self.lengths.is_inference() and not torch.is_inference_mode_enabled():
            raise ValueError(
                "KVCache: it was made under torch.inference_mode, and torch lets nothing else write into it; update it "
                "there, or make it outside"
            )

    def _check(self, key: Tensor, value: Tensor) -> None:
        self._check_writable()
        for name, new, kept in zip(("key", "value"), (key, value), self.tensors(), strict=True):
            want = (self.batch, kept.shape[1], kept.shape[3])
            if not isinstance(new, Tensor) or new.dim() != 4 or (new.shape[0], new.shape[1], new.shape[3]) != want:
                got = list(new.shape) if isinstance(new, Tensor) else type(new).__name__
                raise ValueError(
                    f"{name}: [batch, num_kv_heads, new, head_dim] = [{want[0]}, {want[1]}, new, {want[2]}] is needed, "
                    f"got {got}"
                )
            if new.dtype != kept.dtype or new.device != kept.device:
                raise ValueError(
                    f"{name}: the cache holds {kept.dtype} on {kept.device}, got {new.dtype} on {new.device}"
                )
            if new.requires_grad and torch.is_grad_enabled():
                raise ValueError(
                    f"{name}: a cache gives no gradients back; update it under torch.no_grad() or detached"
                )
        if key.shape[2] != value.shape[2]:
            raise ValueError(f"key, value: the same tokens are needed, got {key.shape[2]} and {value.shape[2]}")

    def _counts(self, new_lengths: Sequence[int] | Tensor, new: int) -> list[int]:
        if isinstance(new_lengths, Tensor):
            if new_lengths.device.type != "cpu":
                raise ValueError("new_lengths: ints or a tensor on the CPU are needed, as the host hands out the space")
            new_lengths = new_lengths.tolist()
        counts: list[Any] = list(new_lengths) if isinstance(new_lengths, (list, tuple)) else []
        if len(counts) != self.batch or any(type(count) is not int or not 0 <= count <= new for count in counts):
            raise ValueError(f"new_lengths: {self.batch} ints from 0 to {new} are needed, got {new_lengths!r}")
        return counts


def placed(query: Any, key: Any, value: Any, mask: Any) -> tuple[Tensor, Tensor, Mask]:
    """Tensors and a mask for `attention` in place of a cache's views.

    Raises:
        TypeError, ValueError: views of different caches, or a mask that a cache cannot place.
    """
    if not isinstance(key, CacheView) or not isinstance(value, CacheView) or key.cache is not value.cache:
        raise TypeError(
            "key, value: cache.key and cache.value of one KVCache are needed together, got "
            f"{_kind(key)} and {_kind(value)}"
        )
    if key.part != 0:
        raise ValueError("key: cache.key is needed, got cache.value")
    if not isinstance(query, Tensor) or query.dim() != 4:
        raise ValueError(f"query: [batch, num_heads, q_len, head_dim] is needed, got {_kind(query)}")
    kind = key.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        autocast_dtype = torch.get_autocast_dtype(kind)
        if key.dtype not in (autocast_dtype, torch.float64):
            raise ValueError(
                f"key, value: autocast would copy the cache from {key.dtype} to {autocast_dtype} at every call; "
                f"make it with dtype={autocast_dtype}"
            )
    mask = key.cache.mask(key.cache.torchs(mask, query, key), query.shape[2])
    return key.tensor, value.tensor, mask


def move(mask: Mask, offset: int | Tensor, first: int = 0) -> Mask:
    """The mask with what is aligned bottom-right at `offset`, over keys of which the first is token `first`."""
    if isinstance(mask, (And, Or)):
        return type(mask)(move(mask.left, offset, first), move(mask.right, offset, first))
    if isinstance(mask, Packed):
        raise ValueError("mask Packed: packed sequences have no cache; a cache's sequences are the batch")
    changes: dict[str, Any] = {}
    if isinstance(mask, _Placed) and mask.offset is None and mask.align == "bottom-right":
        changes["offset"] = offset
    elif isinstance(mask, _Placed) and first:
        changes["offset"] = (0 if mask.offset is None else mask.offset) - first
    for name in _COUNTS.get(type(mask), ()) if first else ():
        if getattr(mask, name) is not None:
            changes[name] = (getattr(mask, name) - first).clamp(min=0)
    return dataclasses.replace(mask, validate=False, **changes) if changes else mask  # type: ignore[type-var]


_COUNTS: dict[type, tuple[str, ...]] = {Lengths: ("kv_lengths", "kv_starts"), Prefix: ("lengths",)}
"""Fields of a mask that count keys from the first."""


def both(mask: Mask, more: Mask | None) -> Mask:
    """`mask & more`, without what hides nothing."""
    if more is None:
        return mask
    return more if type(mask) is Full else mask & more


def window_of(size: int, offset: int | Tensor) -> Mask:
    """No farther back than size - 1 tokens."""
    return Window(size - 1, None, offset=offset, validate=False)


def padding_of(starts: Tensor | None, kv_len: int, first: int = 0) -> Mask | None:
    """Left padding among the keys from token `first` on."""
    if starts is None:
        return None
    return Lengths(torch.full_like(starts, kv_len), kv_starts=(starts - first).clamp(min=0), validate=False)


def check_size(name: str, size: object) -> None:
    """An int of at least 1."""
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise ValueError(f"{name}: an int of at least 1 is needed, got {size!r}")


def check_dtype(dtype: object) -> None:
    """Something that attention computes with, or None for torch's default."""
    if dtype is not None and dtype not in DTYPES:
        names = ", ".join(str(each).removeprefix("torch.") for each in DTYPES)
        raise ValueError(f"dtype: one of {names} is needed, got {dtype!r}")


def _check_starts(starts: object, lengths: Tensor) -> None:
    want = f"starts: int32 or int64 {list(lengths.shape)} on {lengths.device} is needed"
    if not isinstance(starts, Tensor):
        raise ValueError(f"{want}, got {type(starts).__name__}")
    if starts.shape != lengths.shape or starts.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{want}, got {starts.dtype} {list(starts.shape)}")
    if starts.device != lengths.device:
        raise ValueError(f"{want}, got {starts.device}")
    if starts.device.type == "cpu" and not tracing.being_traced() and bool((starts < 0).any()):
        raise ValueError(f"starts: how many tokens are padding, from 0 on, got {starts.tolist()}")


def _kind(value: object) -> str:
    return f"a tensor {list(value.shape)}" if isinstance(value, Tensor) else repr(value)
