"""transformers models that compute attention in code of their own: that code's subclass, computing with fastattn.

Each keeps the module's parameters, hooks and outputs; only what lies between the projections changes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastattn.functional import attention, attention_weights

__all__ = ["OWN", "mask_as_bias", "own_class"]

MASKED = 1e30
"""What XLNet subtracts from a hidden score."""

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
    scores = torch.einsum("ibnd,jbnd->bnij", q_head + self.r_r_bias, k_head_r)
    scores = self.rel_shift_bnij(scores, klen=k_head_h.shape[0])
    if seg_mat is not None:
        by_segment = torch.einsum("ibnd,snd->ibns", q_head + self.r_s_bias, self.seg_embed)
        scores = scores + torch.einsum("ijbs,ibns->bnij", seg_mat, by_segment)
    query, key, value = (each.permute(1, 2, 0, 3) for each in (q_head + self.r_w_bias, k_head_h, v_head_h))
    bias = (scores if scores.dtype == torch.float64 else scores.float()) * self.scale
    hidden = None if attn_mask is None else attn_mask.permute(2, 3, 0, 1) > 0
    mask = None if hidden is None else ~hidden
    out, weights = _attend(self, query, key, value, mask, bias, self.scale, output_attentions)
    if hidden is not None:
        out, weights = _blind_rows(query, key, value, bias, self.scale, hidden, out, weights)
    out = out.permute(2, 0, 1, 3)  # [q_len, batch, heads, head_dim]
    return (out, weights.permute(2, 3, 0, 1)) if weights is not None else out


def _blind_rows(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scale: float, hidden: Tensor, out: Tensor,
    weights: Tensor | None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """XLNet lets a query that sees nothing, such as the first that is predicted, average all values: it hides by a
    number so large that all scores round to it. Those few queries are computed as it does.
    """
    item, row = hidden.all(-1).any(1).nonzero(as_tuple=True)
    if not len(item):
        return out, weights
    masked = MASKED_HALF if query.dtype == torch.float16 else MASKED
    scores = torch.einsum("rnd,rnjd->rnj", query[item, :, row], key[item]) * scale + bias[item, :, row] - masked
    averages = torch.softmax(scores, -1)
    rows = torch.einsum("rnj,rnjd->rnd", averages.to(value.dtype), value[item])
    out = out.transpose(1, 2).index_put((item, row), rows.to(out.dtype)).transpose(1, 2)
    if weights is not None:
        weights = weights.transpose(1, 2).index_put((item, row), averages.to(weights.dtype)).transpose(1, 2)
    return out, weights


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
    bias = None if attention_mask is None else mask_as_bias(attention_mask)
    out, weights = _attend(self, query, key, value, None, bias, None, bool(output_attentions))
    out = out.transpose(1, 2).flatten(2)
    return (out, weights) if weights is not None else (out,)


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    scale: float | None,
    weights_wanted: bool,
) -> tuple[Tensor, Tensor | None]:
    dropout_p = module.dropout.p if module.training else 0.0
    backend = getattr(module, "fastattn_backend", None)
    shared: dict[str, Any] = {"mask": mask, "bias": bias, "scale": scale}
    result: Any = attention(
        query, key, value, **shared, dropout_p=dropout_p, backend=backend, return_lse=weights_wanted
    )
    if not weights_wanted:
        return result, None
    out, lse = result
    return out, attention_weights(query, key, lse=lse, **shared).to(query.dtype)


def mask_as_bias(mask: Tensor) -> Tensor:
    """A float mask as a bias: what it hides by the least number of its dtype is hidden by -inf. A query that sees
    nothing then gives 0 and not the average of everything.
    """
    return mask.masked_fill(mask <= torch.finfo(mask.dtype).min / 2, -torch.inf)


OWN: dict[str, dict[str, Callable[..., Any]]] = {
    "transformers.models.xlnet.modeling_xlnet.XLNetRelativeAttention": {"rel_attn_core": xlnet_core},
    "transformers.models.superglue.modeling_superglue.SuperGlueSelfAttention": {"forward": superglue_forward},
}
"""By the class whose code it is: the methods that take another's place."""

_MADE: dict[type, type] = {}


def own_class(module: nn.Module) -> type | None:
    """The class that computes with fastattn what the module's class does, its own if it does already; None where none
    is known.
    """
    kind = type(module)
    if kind in _MADE.values():
        return kind
    methods = OWN.get(f"{kind.__module__}.{kind.__qualname__}")
    if methods is None:
        return None
    if kind not in _MADE:
        _MADE[kind] = type(f"Fast{kind.__name__}", (OnFastattn, kind), {**methods, "__module__": __name__})
    return _MADE[kind]


class OnFastattn:
    """Base of the classes made here: pickled by what they came from."""

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        made: Any = super().__reduce_ex__(max(int(protocol), 2))
        return (_blank, (type(self).__mro__[2],), *made[2:])


def _blank(kind: type) -> Any:
    bare: Any = object.__new__(kind)
    return object.__new__(own_class(bare) or kind)
