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
from fastattn.masks import Dense, Lengths, Mask, Segments

__all__ = ["ModelMask", "padding"]


class ModelMask(BlockMask):
    """A `Mask` that says of itself what eager attention's mask would: floats [batch, 1, q_len, kv_len], 0 where a query
    attends and the least number of their dtype where it does not.

    Models hand their mask from layer to layer, and transformers lets a 4-D tensor or a BlockMask pass as finished: this
    is one by name alone, and holds a `Mask` in `.mask`. Code of a model's own that computes with it (GIT's attention,
    NLLB-MoE's router) gets eager's floats, which are made then and there, and so computes what it does with eager
    attention. A part of it stays a ModelMask.

    Args:
        dtype: of the floats; torch.bool for a model whose code takes SDPA's masks alone, True = attend.
        causal_alone: torch's SDPA would get no mask, and the module's `is_causal`, in its place.
    """

    def __init__(
        self,
        mask: Mask,
        batch: int,
        q_len: int,
        kv_len: int,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        *,
        causal_alone: bool = False,
    ) -> None:
        # BlockMask's own fields are left out on purpose: nobody runs FlexAttention on this.
        self.mask, self.sizes, self.device, self.dtype = mask, (batch, 1, q_len, kv_len), device, dtype
        self.causal_alone = causal_alone

    @property
    def shape(self) -> torch.Size:
        return torch.Size(self.sizes)

    @property
    def ndim(self) -> int:
        return 4

    def dim(self) -> int:
        return 4

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.sizes[dim]

    def is_floating_point(self) -> bool:
        return self.dtype.is_floating_point

    def table(self) -> Tensor:
        """Bool [batch, 1, q_len, kv_len], True = attend."""
        batch, _, q_len, kv_len = self.sizes
        return self.mask.dense(q_len, kv_len, device=self.device).expand(batch, 1, q_len, kv_len)

    def tensor(self) -> Tensor:
        """What a model's own code gets, [batch, 1, q_len, kv_len] in `dtype`: eager attention's mask."""
        if self.dtype == torch.bool:
            return self.table()
        zero = torch.zeros((), dtype=self.dtype, device=self.device)
        return torch.where(self.table(), zero, torch.finfo(self.dtype).min)

    def to_dense(self) -> Tensor:
        """As `tensor`."""
        return self.tensor()

    def contiguous(self, *args: Any, **kwargs: Any) -> ModelMask:
        return self

    def clone(self, *args: Any, **kwargs: Any) -> ModelMask:
        return self

    def detach(self) -> ModelMask:
        return self

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """Itself where nothing changes; else as a tensor would."""
        targets = [*args, *kwargs.values()]
        same = (self.device, str(self.device), self.dtype, False, True, None)
        return (
            self
            if all(any(each is one or each == one for one in same) for each in targets)
            else self.tensor().to(*args, **kwargs)
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
        if len(parts) <= 4 and all(isinstance(part, slice) for part in parts):
            if all(_takes_all(part, size) for part, size in zip(parts, self.sizes, strict=False)):
                return self
            part = self.table()[tuple(parts)]
            if part.shape[1] == 1:
                return ModelMask(Dense(part), part.shape[0], part.shape[2], part.shape[3], self.device, self.dtype)
        return self.tensor()[index]

    def __repr__(self) -> str:
        return f"ModelMask({self.mask}, shape={list(self.sizes)})"

    __str__ = __repr__
    __hash__ = object.__hash__

    def __getattr__(self, name: str) -> Any:
        """What else a tensor has."""
        if name in ("mask", "sizes", "device", "dtype") or name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.tensor(), name)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """torch's functions take it for the tensor."""
        return func(*map(_as_tensor, args), **{name: _as_tensor(each) for name, each in (kwargs or {}).items()})


def _operator(name: str) -> Callable[..., Any]:
    def operate(self: ModelMask, *others: Any) -> Any:
        return getattr(self.tensor(), name)(*map(_as_tensor, others))

    operate.__name__ = name
    return operate


OPERATORS = "neg invert abs eq ne lt le gt ge add radd sub rsub mul rmul truediv rtruediv and rand or ror xor rxor"
"""Which Python looks up in the class, past __getattr__."""
for _name in OPERATORS.split():
    setattr(ModelMask, f"__{_name}__", _operator(f"__{_name}__"))


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


def _as_tensor(value: Any) -> Any:
    if isinstance(value, ModelMask):
        return value.tensor()
    return type(value)(map(_as_tensor, value)) if type(value) in (list, tuple) else value
