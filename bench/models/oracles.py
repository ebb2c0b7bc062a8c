"""What fastattn is held against inside transformers: the plain formula, written out for its attention interface.

Eager attention is no such thing: it takes its softmax in float32 and hides by a number, which in float64 overflows.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

from fastattn.bench.models.zoo import WINDOW

__all__ = ["EAGER_TRUNCATED", "EXACT", "EXACT_TRUNCATED", "register"]

EXACT, EXACT_TRUNCATED, EAGER_TRUNCATED = "exact", "exact-truncated", "eager-truncated"


def register() -> None:
    """Make the names above attention implementations of transformers."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask, sdpa_mask

    def table(*args: Any, **kwargs: Any) -> Any:
        return sdpa_mask(*args, **{**kwargs, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False})

    for name, forward, mask in (
        (EXACT, exact, table), (EXACT_TRUNCATED, exact_truncated, table),
        (EAGER_TRUNCATED, eager_truncated, eager_mask),
    ):  # fmt: skip
        AttentionInterface.register(name, forward)
        AttentionMaskInterface.register(name, mask)


def exact(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *,
    scaling: float | None = None, is_causal: bool | None = None, softcap: float | None = None,
    s_aux: Tensor | None = None, position_bias: Tensor | None = None, **kwargs: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attention in the dtype of its inputs, with tables; out [batch, q_len, num_heads, head_dim_v] and the weights."""
    group = query.shape[1] // key.shape[1]
    key, value = (each.repeat_interleave(group, 1) for each in (key, value))
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if position_bias is not None:
        scores = scores + position_bias
    if attention_mask is None:
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        if causal and query.shape[2] > 1:
            attention_mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attention_mask, -torch.inf)
    elif attention_mask is not None:
        scores = scores + attention_mask
    if s_aux is not None:
        scores = torch.cat([scores, s_aux[:, None, None].expand(*scores.shape[:-1], 1)], -1)
    weights = torch.softmax(scores, -1)
    nothing = (scores == -torch.inf).all(-1, keepdim=True)
    weights = torch.where(nothing, 0.0, weights)[..., : key.shape[2]]
    return (weights @ value).transpose(1, 2).contiguous(), weights


def exact_truncated(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[Tensor, Tensor]:
    """The same, each query seeing WINDOW neighbours to each side."""
    return exact(module, query, key, value, _band(query), **kwargs)


def eager_truncated(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[Tensor, Tensor]:
    """The model's own eager attention, likewise."""
    eager = sys.modules[type(module).__module__].eager_attention_forward
    hidden = torch.where(_band(query), 0.0, torch.finfo(query.dtype).min).to(query.dtype)
    return eager(module, query, key, value, hidden[None, None], **kwargs)


def _band(query: Tensor) -> Tensor:
    at = torch.arange(query.shape[2])
    return (at[:, None] - at).abs() <= WINDOW
