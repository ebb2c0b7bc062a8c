"""The caches whose sequences lie each in one piece: of a fixed size, growing, sliding."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor

from fastattn import tracing
from fastattn.cache.base import FIRST, CacheView, KVCache, both, check_dtype, check_size, move, padding_of, window_of
from fastattn.masks import Chunked, Lengths, Mask, flex

__all__ = ["GrowingCache", "SlidingCache", "StaticCache"]


class _Slots(KVCache):
    """Keys [batch, num_kv_heads, slots, head_dim] and values [..., head_dim_v]."""

    def __init__(
        self,
        batch: int,
        num_kv_heads: int,
        slots: int,
        head_dim: int,
        *,
        head_dim_v: int | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        starts: Tensor | None = None,
    ) -> None:
        super().__init__(batch, device, starts)
        dims = head_dim, head_dim if head_dim_v is None else head_dim_v
        for name, size in (("num_kv_heads", num_kv_heads), ("head_dim", head_dim), ("head_dim_v", dims[1])):
            check_size(name, size)
        check_dtype(dtype)
        self.keys, self.values = (
            torch.empty(batch, num_kv_heads, slots, dim, dtype=dtype, device=device) for dim in dims
        )

    @property
    def slots(self) -> int:
        """Tokens there is space for."""
        return self.keys.shape[2]

    def _move_to(self, slots: int, first: int, count: int) -> None:
        """New memory of `slots`, beginning with `count` tokens from slot `first` on. Memory that is no inference
        tensor, under torch.inference_mode too, stays so: others may write into it later.
        """
        leave = torch.is_inference_mode_enabled() and not self.lengths.is_inference()
        for name in ("keys", "values"):
            old: Tensor = getattr(self, name)
            with torch.inference_mode(False) if leave else nullcontext():
                new = old.new_empty(*old.shape[:2], slots, old.shape[3])
            new[:, :, :count] = old[:, :, first : first + count]
            setattr(self, name, new)


class StaticCache(_Slots):
    """Slots that never move. The number of tokens enters as a tensor: a captured graph reads it anew each time."""

    takes_ragged = True

    def __init__(self, batch: int, num_kv_heads: int, capacity: int, head_dim: int, **options: object) -> None:
        check_size("capacity", capacity)
        super().__init__(batch, num_kv_heads, capacity, head_dim, **options)  # type: ignore[arg-type]

    @property
    def kv_len(self) -> int:
        return self.slots

    def tensors(self) -> tuple[Tensor, Tensor]:
        return self.keys, self.values

    def mask(self, mask: Mask, q_len: int) -> Mask:
        offset = self.before.long() if self.ragged else self.lengths.long() - q_len
        held = Lengths(self.lengths, kv_starts=self.starts, validate=False)
        return both(move(mask, offset), held)

    @property
    def held(self) -> list[int]:  # type: ignore[override]
        return self.lengths.tolist()

    def _count(self, counts: list[int]) -> None:
        """Nothing: what the host counts would be another graph at every token, and stand still in a captured one."""

    def _forget(self) -> None:
        """Nothing, likewise."""

    def _write(self, key: Tensor, value: Tensor, counts: list[int] | None) -> None:
        """Past the end torch's own index check stops what runs on a GPU or compiled, where nobody waits for counts."""
        new = key.shape[2]
        if self.lengths.device.type == "cpu" and not tracing.being_traced():
            most = max(held + count for held, count in zip(self.held, counts or [new] * self.batch, strict=True))
            if most > self.slots:
                raise ValueError(
                    f"KVCache.static: {new} more tokens do not fit, {max(self.held)} of {self.slots} are held; "
                    "make it larger or take KVCache.growing"
                )
        item, token, slot = self._real(counts, new)
        for kept, tokens in ((self.keys, key), (self.values, value)):
            if item is None:
                kept.scatter_(2, slot[:, None, :, None].expand_as(tokens), tokens)
            else:
                kept[item, :, slot] = tokens[item, :, token]


class GrowingCache(_Slots):
    """As many slots as are needed, doubled when they are full."""

    def __init__(self, batch: int, num_kv_heads: int, head_dim: int, **options: object) -> None:
        super().__init__(batch, num_kv_heads, FIRST, head_dim, **options)  # type: ignore[arg-type]

    @property
    def kv_len(self) -> int:
        return self.held[0]

    def tensors(self) -> tuple[Tensor, Tensor]:
        return self.keys[:, :, : self.kv_len], self.values[:, :, : self.kv_len]

    def mask(self, mask: Mask, q_len: int) -> Mask:
        offset = self.was[0] if self.ragged else self.kv_len - q_len
        return both(move(mask, offset), padding_of(self.starts, self.kv_len))

    def _write(self, key: Tensor, value: Tensor, counts: list[int] | None) -> None:
        held, new = self.held[0], key.shape[2] if counts is None else counts[0]
        if held + new > self.slots:
            self._move_to(max(2 * self.slots, held + new), 0, held)
        self.keys[:, :, held : held + new] = key[:, :, :new]
        self.values[:, :, held : held + new] = value[:, :, :new]


class SlidingCache(_Slots):
    """The tokens that the next query can see, and those that came with the last update, whose queries may still be
    asked for; older ones are refused. Memory for twice the window:
    what is still needed moves to the front once in a window's length.
    """

    def __init__(self, batch: int, num_kv_heads: int, window: int, head_dim: int, **options: object) -> None:
        check_size("window", window)
        super().__init__(batch, num_kv_heads, 2 * window, head_dim, **options)  # type: ignore[arg-type]
        self.window = window
        self.start = 0  # the slot of the first token that is still held
        self.first = 0  # that token's number in the sequence

    @property
    def kv_len(self) -> int:
        return self.held[0] - self.first

    def tensors(self) -> tuple[Tensor, Tensor]:
        span = slice(self.start, self.start + self.kv_len)
        return self.keys[:, :, span], self.values[:, :, span]

    def mask(self, mask: Mask, q_len: int) -> Mask:
        offset = self.was[0] - self.first if self.ragged else self.kv_len - q_len
        if self.first and any(isinstance(atom, Chunked) for atom in mask.atoms()):
            raise ValueError("mask Chunked: a sliding cache has lost where chunks begin; KVCache.growing keeps it")
        if self.first and offset < self.window - 1:
            most = self.kv_len - (self.window - 1)
            raise ValueError(
                f"query: {q_len} queries at the end of {self.held[0]} tokens see some that slid away; at most {most} "
                "can be asked for now, those of the last update; ask after each update, or take KVCache.growing"
            )
        seen = both(move(mask, offset, self.first), window_of(self.window, offset))
        return both(seen, padding_of(self.starts, self.kv_len, self.first))

    def torchs(self, mask: object, query: Tensor, key: CacheView) -> Mask:
        if flex.is_block_mask(mask):
            raise ValueError(
                "mask BlockMask: it numbers keys from the first, which a sliding cache has lost; a fastattn.masks.Mask "
                "says the same"
            )
        return super().torchs(mask, query, key)

    def reset(self) -> None:
        super().reset()
        self.start = self.first = 0

    def _write(self, key: Tensor, value: Tensor, counts: list[int] | None) -> None:
        new = key.shape[2] if counts is None else counts[0]
        if not new:
            return  # and nothing slides away
        gone = max(self.kv_len - (self.window - 1), 0)
        self.start, self.first = self.start + gone, self.first + gone
        kept = self.kv_len
        if self.start + kept + new > self.slots:
            self._move_to(max(2 * self.window, kept + new), self.start, kept)
            self.start = 0
        at = slice(self.start + kept, self.start + kept + new)
        self.keys[:, :, at] = key[:, :, :new]
        self.values[:, :, at] = value[:, :, :new]
