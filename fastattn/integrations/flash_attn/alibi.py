"""ALiBi as flash-attn takes it (Press et al. 2022): slopes a head, a head and batch item, or a head and sequence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastattn import tracing
from fastattn.dropout import kept_of_rows
from fastattn.masks.base import Mask

AT_ONCE = 2**21
"""Weights that the slopes' gradient takes at once: 8 MiB of float32."""


def check_slopes(slopes: object, query: Tensor, sequences: int | None = None) -> None:
    """One slope for each head of query [batch, num_heads, q_len, head_dim], or for each head of each batch item.

    Args:
        sequences: how many there are, where they are packed and not the batch.

    Raises:
        TypeError, ValueError: something else.
    """
    batch, num_heads = query.shape[0] if sequences is None else sequences, query.shape[1]
    each = "batch" if sequences is None else "sequences"
    want = (
        f"alibi_slopes: float32 [num_heads] = [{num_heads}] or [{each}, num_heads] = [{batch}, {num_heads}] is needed"
    )
    if not isinstance(slopes, Tensor):
        raise TypeError(f"{want}, got {type(slopes).__name__}")
    if list(slopes.shape) not in ([num_heads], [batch, num_heads]) or not slopes.is_floating_point():
        raise ValueError(f"{want}, got {slopes.dtype} {list(slopes.shape)}")
    if slopes.device != query.device:
        raise ValueError(f"alibi_slopes: they must be on q's device {query.device}, got {slopes.device}")


@dataclass(frozen=True)
class Alibi:
    """-slope * |row - place| for each query's row and each key's place, both counted back from the last key.

    Where nobody looks ahead, this is slope * place but for a number that all keys of a row share, which the softmax
    does not feel and lse does: a row of numbers a head then serves in place of a table.
    """

    q_slopes: Tensor  # [batch or 1, num_heads, q_len or 1], part of the slopes' graph
    k_slopes: Tensor  # [batch or 1, num_heads, kv_len or 1], likewise
    rows: Tensor  # [batch or 1, q_len]
    places: Tensor  # [batch or 1, kv_len]
    by_key: bool

    @classmethod
    def of_lengths(cls, slopes: Tensor, q_len: int, kv_len: int, by_key: bool) -> Alibi:
        """For one length of queries and one of keys."""
        each = (slopes[None] if slopes.dim() == 1 else slopes)[..., None]
        rows, places = (torch.arange(1 - length, 1, device=slopes.device)[None] for length in (q_len, kv_len))
        return cls(each, each, rows, places, by_key)

    @classmethod
    def of_cache(cls, slopes: Tensor, lengths: Tensor, q_len: int, kv_len: int, by_key: bool) -> Alibi:
        """For keys whose last one lies at lengths[batch] - 1, and queries that end there."""
        alibi = cls.of_lengths(slopes, q_len, kv_len, by_key)
        places = torch.arange(1, kv_len + 1, device=slopes.device) - lengths[:, None]
        return cls(alibi.q_slopes, alibi.k_slopes, alibi.rows, places, by_key)

    @classmethod
    def of_packed(
        cls, slopes: Tensor, cu_q: Tensor, cu_kv: Tensor, q_tokens: int, kv_tokens: int, by_key: bool
    ) -> Alibi:
        """For sequences laid end to end, cu_q and cu_kv [sequences + 1] saying where each begins."""
        found = []
        for cu, tokens in ((cu_q, q_tokens), (cu_kv, kv_tokens)):
            token = torch.arange(tokens, device=cu.device)
            sequence = (torch.searchsorted(cu.long(), token, right=True) - 1).clamp(max=cu.shape[0] - 2)
            each = slopes[:, None] if slopes.dim() == 1 else slopes[sequence].T
            found.append(((token - cu[sequence + 1] + 1)[None], each[None]))
        (rows, q_slopes), (places, k_slopes) = found
        return cls(q_slopes, k_slopes, rows, places, by_key)

    @property
    def is_learned(self) -> bool:
        """Whether the slopes want a gradient."""
        return self.q_slopes.requires_grad and torch.is_grad_enabled()

    def bias(self, dtype: torch.dtype) -> Tensor:
        """What is added to the scores, [batch or 1, num_heads, q_len or 1, kv_len]; float32, float64 for float64.

        Learned slopes get their gradient by `learned` and none by this one. Where compilers or transforms look, which
        that is hidden from, it is the table, whose gradient is theirs: that of numbers by key would be the small
        difference of large sums.
        """
        plain = tracing.being_transformed() or tracing.being_traced()
        if self.is_learned and plain:
            return self.table(dtype)
        if self.by_key:
            return (self.k_slopes.detach() * self.places[:, None]).to(_computed(dtype))[:, :, None]
        return self.table(dtype).detach()

    def table(self, dtype: torch.dtype) -> Tensor:
        """The same for each pair, [batch or 1, num_heads, q_len, kv_len], differentiable."""
        away = (self.rows[:, None, :, None] - self.places[:, None, None]).abs()
        return (-self.q_slopes[..., None] * away).to(_computed(dtype))

    def whole(self, lse: Tensor, bias: Tensor) -> Tensor:
        """lse with what every key of a row shares, where the bias left that out."""
        shared = bias.shape[2] == 1 and self.by_key
        return lse - (self.q_slopes.detach() * self.rows[:, None]).to(lse.dtype) if shared else lse

    def learned(self, out: Tensor, lse: Tensor, call: Call, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        """out and lse as functions of the slopes, too.

        Args:
            tensors: query, key and value of the call.
        """
        if not self.is_learned or tracing.being_transformed() or tracing.being_traced():
            return out, lse
        return _Learned.apply(self.q_slopes, out, lse, self, call, *tensors)


class Call(NamedTuple):
    """What else a call of attention was given."""

    mask: Mask
    scale: float | None
    softcap: float | None
    dropout_p: float
    dropout_seed: Tensor | None


def _computed(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


class _Learned(torch.autograd.Function):
    """Passes out and lse on, and gives the slopes their gradient: a second pass over the weights, some queries at a
    time, so that it takes O(q_len + kv_len) memory.
    """

    @staticmethod
    def forward(
        ctx: Any, q_slopes: Tensor, out: Tensor, lse: Tensor, alibi: Alibi, call: Call, *tensors: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(q_slopes, *tensors)
        ctx.alibi, ctx.call = alibi, call
        ctx.set_materialize_grads(False)
        return out.view_as(out), lse.view_as(lse)

    @staticmethod
    def backward(ctx: Any, d_out: Tensor | None, d_lse: Tensor | None) -> tuple[Any, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "alibi_slopes: second derivatives are not there for learned slopes; detach them, or give "
                "fastattn.attention(bias=) the table -slope * |i - j|, which has them all"
            )
        q_slopes, *tensors = ctx.saved_tensors
        d_slopes = None
        if d_out is not None or d_lse is not None:
            with tracing.without_autocast(q_slopes.device):
                d_slopes = _slopes_gradient(ctx.alibi, ctx.call, q_slopes, tensors, d_out, d_lse)
        return d_slopes, d_out, d_lse, *(None,) * 5


def _slopes_gradient(
    alibi: Alibi, call: Call, q_slopes: Tensor, tensors: list[Tensor], d_out: Tensor | None, d_lse: Tensor | None
) -> Tensor:
    """The gradient of q_slopes, in its shape. A score's derivative by its slope is -|row - place|."""
    dtype = _computed(tensors[0].dtype)
    query, key, value = (each.detach().to(dtype) for each in tensors)
    batch, num_heads, q_len, head_dim = query.shape
    groups = num_heads // max(key.shape[1], 1)
    key, value = (each.repeat_interleave(groups, 1) for each in (key, value))
    kv_len = key.shape[2]
    scale = head_dim**-0.5 if call.scale is None else call.scale
    intervals = call.mask.intervals(q_len, kv_len, query.device)
    found = q_slopes.new_zeros(batch, num_heads, q_len)
    at_once = max(1, AT_ONCE // max(batch * num_heads * kv_len, 1))
    for first in range(0, q_len, at_once):
        rows = slice(first, min(first + at_once, q_len))
        scores = scale * query[:, :, rows] @ key.mT
        if call.softcap is not None:
            scores = call.softcap * torch.tanh(scores / call.softcap)
        away = (alibi.rows[:, None, rows, None] - alibi.places[:, None, None]).abs()
        slopes = q_slopes if q_slopes.shape[2] == 1 else q_slopes[:, :, rows]
        scores -= slopes[..., None] * away
        hidden = ~_visible(intervals, rows, kv_len, query.device)
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1).masked_fill(hidden, 0.0)
        by_weight = torch.zeros_like(weights)
        if d_out is not None:
            by_weight = d_out[:, :, rows].to(dtype) @ value.mT
            if call.dropout_seed is not None:
                places = torch.arange(rows.start, rows.stop, device=query.device)
                kept = kept_of_rows(batch, num_heads, places, kv_len, p=call.dropout_p, seed=call.dropout_seed)
                by_weight = (by_weight * kept) / (1 - call.dropout_p) if call.dropout_p < 1 else by_weight * 0
            by_weight = by_weight.masked_fill(hidden, 0.0)
            by_weight -= (weights * by_weight).sum(-1, keepdim=True)
        if d_lse is not None:
            by_weight = (by_weight + d_lse[:, :, rows, None].to(dtype)).masked_fill(hidden, 0.0)
        found[:, :, rows] = -(weights * by_weight * away).sum(-1).to(found.dtype)
    return found.sum_to_size(q_slopes.shape)


def _visible(intervals: Any, rows: slice, kv_len: int, device: torch.device) -> Tensor:
    """Which keys some queries see, bool [batch or 1, num_heads or 1, rows, kv_len]."""
    place = torch.arange(kv_len, device=device)
    shown = torch.zeros((), dtype=torch.bool, device=device)
    for ends in intervals:
        start, stop = (each if each.shape[-1] == 1 else each[..., rows] for each in ends)
        shown = shown | ((place >= start[..., None]) & (place < stop[..., None]))
    return shown
