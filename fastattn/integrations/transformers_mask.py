"""A mask on its way through a transformers model: a mask object where the model expects a [batch, 1, q_len, kv_len]
tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from fastattn import tracing
from fastattn.masks import Lengths, Mask, Segments

__all__ = ["ModelMask", "padding"]


class ModelMask(BlockMask):
    """A `Mask` that says of itself what a bool tensor [batch, 1, q_len, kv_len] (True = attend) would.

    Models hand their mask from layer to layer, and transformers lets a 4-D tensor or a BlockMask pass as finished: this
    is one by name alone, and holds a `Mask` in `.mask`. A model that computes with its mask gets the bool table, which
    is made then and there, and pays what it would pay with torch's own attention.
    """

    def __init__(self, mask: Mask, batch: int, q_len: int, kv_len: int, device: torch.device) -> None:
        # BlockMask's own fields are left out on purpose: nobody runs FlexAttention on this.
        self.mask, self.sizes, self.device = mask, (batch, 1, q_len, kv_len), device

    @property
    def shape(self) -> tuple[int, ...]:
        return self.sizes

    @property
    def ndim(self) -> int:
        return 4

    @property
    def dtype(self) -> torch.dtype:
        return torch.bool

    def dim(self) -> int:
        return 4

    def size(self, dim: int | None = None) -> Any:
        return self.sizes if dim is None else self.sizes[dim]

    def table(self) -> Tensor:
        """The bool tensor [batch, 1, q_len, kv_len]."""
        batch, _, q_len, kv_len = self.sizes
        return self.mask.dense(q_len, kv_len, device=self.device).expand(batch, 1, q_len, kv_len)

    def to_dense(self) -> Tensor:
        """The bool tensor [batch, 1, q_len, kv_len]."""
        return self.table()

    def contiguous(self, *args: Any, **kwargs: Any) -> ModelMask:
        return self

    def clone(self, *args: Any, **kwargs: Any) -> ModelMask:
        return self

    def detach(self) -> ModelMask:
        return self

    def bool(self) -> ModelMask:
        return self

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """Itself where nothing changes; else as a tensor would."""
        targets = [*args, *kwargs.values()]
        same = (self.device, str(self.device), torch.bool, False, True, None)
        return (
            self
            if all(any(each is one or each == one for one in same) for each in targets)
            else self.table().to(*args, **kwargs)
        )

    def numel(self) -> int:
        batch, heads, q_len, kv_len = self.sizes
        return batch * heads * q_len * kv_len

    def __len__(self) -> int:
        return self.sizes[0]

    def __getitem__(self, index: Any) -> Any:
        """Itself where the index takes everything, as models do that cut a mask to the keys' length."""
        parts = list(index) if isinstance(index, tuple) else [index]
        if parts[:1] == [Ellipsis]:
            parts = [slice(None)] * (5 - len(parts)) + parts[1:]
        if len(parts) <= 4 and all(_takes_all(part, size) for part, size in zip(parts, self.sizes, strict=False)):
            return self
        return self.table()[index]

    def __repr__(self) -> str:
        return f"ModelMask({self.mask}, shape={list(self.sizes)})"

    __str__ = __repr__

    def __getattr__(self, name: str) -> Any:
        """What else a tensor has."""
        if name in ("mask", "sizes", "device") or name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.table(), name)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """torch's functions take it for the table."""
        return func(*map(_table, args), **{name: _table(each) for name, each in (kwargs or {}).items()})

    def __invert__(self) -> Tensor:
        return ~self.table()

    def __and__(self, other: Any) -> Tensor:
        return self.table() & _table(other)

    def __rand__(self, other: Any) -> Tensor:
        return _table(other) & self.table()

    def __or__(self, other: Any) -> Tensor:
        return self.table() | _table(other)

    def __ror__(self, other: Any) -> Tensor:
        return _table(other) | self.table()

    def __mul__(self, other: Any) -> Tensor:
        return self.table() * _table(other)

    __rmul__ = __mul__


def padding(real: Tensor, q_len: int) -> Mask | None:
    """Which keys are padding, as a mask; None where none is.

    Looks at the values once (one device sync) to say it as starts and lengths. While somebody traces, and where the
    real tokens of a row lie apart, it is ids, which say the same of any pattern.

    Args:
        real: bool [batch, kv_len], True = a real token.
        q_len: queries of the call.
    """
    if not (tracing.being_traced() or tracing.transforms_active()):
        flags = torch.nn.functional.pad(real.to(torch.int8), (1, 1))
        runs = (flags[:, 1:] > flags[:, :-1]).sum(-1)
        whole, unbroken = torch.stack([real.all(), (runs <= 1).all()]).tolist()
        if whole:
            return None
        if unbroken:
            starts = real.to(torch.int8).argmax(-1)  # 0 where nothing is real
            return Lengths(starts + real.sum(-1), kv_starts=starts, validate=False)
    q_ids = torch.zeros(1, q_len, dtype=torch.int64, device=real.device)
    return Segments(q_ids, torch.where(real, 0, -1), validate=False)


def _takes_all(part: Any, size: int) -> bool:
    return (
        isinstance(part, slice)
        and part.start in (None, 0)
        and part.step in (None, 1)
        and (part.stop is None or (isinstance(part.stop, int) and part.stop >= size))
    )


def _table(value: Any) -> Any:
    if isinstance(value, ModelMask):
        return value.table()
    return type(value)(map(_table, value)) if type(value) in (list, tuple) else value
