"""transformers models that compute attention in code of their own: that code's subclass, computing with fastattn.

Each keeps the module's parameters, hooks and outputs; only what lies between the projections changes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastattn.functional import attention, attention_weights

__all__ = ["OWN", "own_class"]

MASKED = 1e30
"""What XLNet subtracts from a hidden score, so that a row which sees nothing averages all values."""

MASKED_HALF = 65500
"""The same in float16."""


def xlnet_core(
    self: Any,
    q_head: Tensor,
    k_head_h: Tensor,
    v_head_h: Tensor,
    k_head_r: Tensor,
    seg_mat: Tensor | None = None,
    attn_mask: Tensor | None = None,
    output_attentions: bool = False,
) -> Any:
    """XLNetRelativeAttention.rel_attn_core (Yang et al. 2019): content scores fused; positions and segments a bias.

    q_head [q_len, batch, heads, head_dim]; k_head_h, v_head_h [kv_len, ...]; k_head_r [positions, ...];
    seg_mat [q_len, kv_len, batch, 2]; attn_mask [q_len, kv_len, batch, 1 or heads], 1 = hidden.
    """
    kv_len = k_head_h.shape[0]
    scores = torch.einsum("ibnd,jbnd->bnij", q_head + self.r_r_bias, k_head_r)
    scores = self.rel_shift_bnij(scores, klen=kv_len)
    if seg_mat is not None:
        by_segment = torch.einsum("ibnd,snd->ibns", q_head + self.r_s_bias, self.seg_embed)
        scores = scores + torch.einsum("ijbs,ibns->bnij", seg_mat, by_segment)
    bias = scores.float() * self.scale
    if attn_mask is not None:
        far = MASKED_HALF if attn_mask.dtype == torch.float16 else MASKED
        bias = bias - far * attn_mask.permute(2, 3, 0, 1).float()
    query, key, value = (each.permute(1, 2, 0, 3) for each in (q_head + self.r_w_bias, k_head_h, v_head_h))
    out, weights = _attend(query, key, value, bias, self.scale, self.dropout, output_attentions)
    out = out.permute(2, 0, 1, 3)  # [q_len, batch, heads, head_dim]
    return (out, weights.permute(2, 3, 0, 1)) if weights is not None else out


def superglue_forward(
    self: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    encoder_hidden_states: Tensor | None = None,
    encoder_attention_mask: Tensor | None = None,
    output_attentions: bool | None = False,
) -> tuple[Tensor, ...]:
    """SuperGlueSelfAttention.forward (Sarlin et al. 2020): self-attention, or cross-attention to the other image.

    hidden_states [batch, keypoints, dim]; masks are added to the scores, [batch, 1, 1, keypoints].
    """
    if encoder_hidden_states is not None:
        attention_mask = encoder_attention_mask
    source = hidden_states if encoder_hidden_states is None else encoder_hidden_states
    query, key, value = (
        project(x).unflatten(-1, (self.num_attention_heads, self.attention_head_size)).transpose(1, 2)
        for project, x in ((self.query, hidden_states), (self.key, source), (self.value, source))
    )
    out, weights = _attend(query, key, value, attention_mask, None, self.dropout, bool(output_attentions))
    out = out.transpose(1, 2).flatten(2)
    return (out, weights) if weights is not None else (out,)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    scale: float | None,
    dropout: nn.Dropout,
    weights_wanted: bool,
) -> tuple[Tensor, Tensor | None]:
    dropout_p = dropout.p if dropout.training else 0.0
    result: Any = attention(query, key, value, bias=bias, scale=scale, dropout_p=dropout_p, return_lse=weights_wanted)
    if not weights_wanted:
        return result, None
    out, lse = result
    return out, attention_weights(query, key, lse=lse, bias=bias, scale=scale).to(query.dtype)


OWN: dict[str, dict[str, Callable[..., Any]]] = {
    "transformers.models.xlnet.modeling_xlnet.XLNetRelativeAttention": {"rel_attn_core": xlnet_core},
    "transformers.models.superglue.modeling_superglue.SuperGlueSelfAttention": {"forward": superglue_forward},
}
"""By the class whose code it is: the methods that take another's place."""

_MADE: dict[type, type] = {}


def own_class(module: nn.Module) -> type | None:
    """The class that computes with fastattn what the module's class does, or None where none is known."""
    kind = type(module)
    methods = OWN.get(f"{kind.__module__}.{kind.__qualname__}")
    if methods is None:
        return None
    if kind not in _MADE:
        _MADE[kind] = type(f"Fast{kind.__name__}", (kind,), {**methods, "__module__": __name__})
    return _MADE[kind]
