"""torch.nn.functional.multi_head_attention_forward on fastattn: projections, torch.nn's masks, weights.

In torch.nn a bool mask is True where a key is *hidden*, the opposite of the rest of this library; `_visibility` is the
one place where that is turned round. Masks are never merged into one tensor over batch and heads.
"""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from fastattn import sharding
from fastattn.dropout import dropout_mask, new_dropout_seed
from fastattn.functional import all_weights, attention
from fastattn.masks import Causal, Dense, Lengths, Mask, Window
from fastattn.torch_api import projections, sdpa

__all__ = ["multi_head_attention_forward"]

TORCH_MHA = F.multi_head_attention_forward
"""Torch's own, whatever a patch has put in its place."""
EXTRAS = ("window", "num_kv_heads", "backend")
"""What `forward` takes and torch's function does not know."""


def multi_head_attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Drop-in for `torch.nn.functional.multi_head_attention_forward`; see there for what each argument is for.

    Args:
        query: [q_len, batch, embed_dim] or [q_len, embed_dim], floating.
        key, value: [kv_len, batch, kdim or vdim] or [kv_len, kdim or vdim].
        key_padding_mask: [batch, kv_len] or [kv_len]; bool, True = hidden, or floating, added to the scores.
        attn_mask: [q_len, kv_len] or [batch * num_heads, q_len, kv_len]; likewise.
        static_k, static_v: [batch * num_heads, kv_len, head_dim], in place of the projected ones.
        is_causal: a hint that attn_mask is the causal one. Without key_padding_mask and need_weights the mask is then
            not read, and query i sees keys 0 to i; otherwise the mask is used.

    Returns:
        out [q_len, batch, embed_dim] or [q_len, embed_dim], and with need_weights the weights after dropout,
        [batch, q_len, kv_len] averaged over heads or [batch, num_heads, q_len, kv_len] (no batch for an unbatched
        query), in the projected query's dtype, differentiable. A query that sees no key has weights 0.

    Raises:
        AssertionError, RuntimeError, ValueError: as torch does, with its messages.
    """
    tensors = (
        query,
        key,
        value,
        in_proj_weight,
        in_proj_bias,
        bias_k,
        bias_v,
        out_proj_weight,
        out_proj_bias,
    )
    arguments = {
        "training": training,
        "key_padding_mask": key_padding_mask,
        "need_weights": need_weights,
        "attn_mask": attn_mask,
        "use_separate_proj_weight": use_separate_proj_weight,
        "q_proj_weight": q_proj_weight,
        "k_proj_weight": k_proj_weight,
        "v_proj_weight": v_proj_weight,
        "static_k": static_k,
        "static_v": static_v,
        "average_attn_weights": average_attn_weights,
        "is_causal": is_causal,
    }
    positional = (*tensors[:3], embed_dim_to_check, num_heads, *tensors[3:7], add_zero_attn, dropout_p, *tensors[7:])
    if has_torch_function(tensors):
        return sdpa.overridden(multi_head_attention_forward, TORCH_MHA, tensors, positional, arguments)
    return forward(*positional, **arguments)  # type: ignore[arg-type]


def route(*positional: Any, **arguments: Any) -> tuple[Tensor, Tensor | None]:
    """`forward`, past the modes and tensor subclasses that override torch's function.

    A subclass is handed torch's function where that says the same, else this one: what torch has no word for (a
    backend, a window, fewer key heads) is never dropped.
    """
    tensors = (*positional[:3], *positional[5:9], *positional[11:13])
    if not has_torch_function(tensors):
        return forward(*positional, **arguments)
    flip = arguments.pop("batch_first", False) and positional[0].dim() == 3
    if flip:
        positional = (*projections.each(lambda tensor: tensor.transpose(0, 1), *positional[:3]), *positional[3:])
    given = {name: arguments.pop(name, None) for name in EXTRAS}
    extras = {name: value for name, value in given.items() if value is not None}
    if extras:
        out, weights = handle_torch_function(partial(route, **extras), tensors, *positional, **arguments)
    else:
        out, weights = sdpa.overridden(multi_head_attention_forward, TORCH_MHA, tensors, positional, arguments)
    return (out.transpose(0, 1) if flip else out), weights


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
    *,
    batch_first: bool = False,
    window: tuple[int | None, int | None] | None = None,
    num_kv_heads: int | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`multi_head_attention_forward` behind overrides, and what modules add to it.

    Args:
        batch_first: query, key, value and out are [batch, length, embed_dim].
        window: (left, right) of a `Window` over the keys given; keys that the module adds are seen by everybody.
        num_kv_heads: heads of key and value: in_proj_weight is [(num_heads + 2 * num_kv_heads) * head_dim, embed_dim],
            k_proj_weight and v_proj_weight, bias_k and bias_v, static_k and static_v have num_kv_heads likewise.
        backend: the backend, by name.
    """
    batched = F._mha_shape_check(query, key, value, key_padding_mask, attn_mask, num_heads)  # type: ignore[attr-defined]
    batch_first = batch_first and batched
    length_dim, batch_dim = (1, 0) if batch_first else (0, 1)
    if not batched:
        query, key, value = projections.each(lambda tensor: tensor.unsqueeze(1), query, key, value)
        key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
    q_len, batch, embed_dim = query.shape[length_dim], query.shape[batch_dim], query.shape[2]
    kv_len = key.shape[length_dim]

    _check_mask_kinds(key_padding_mask, attn_mask)
    if is_causal and attn_mask is None:
        raise RuntimeError(
            "Need attn_mask if specifying the is_causal hint. "
            "You may use the Transformer module method "
            "`generate_square_subsequent_mask` to create this mask."
        )
    trust_hint = is_causal and key_padding_mask is None and not need_weights
    if trust_hint:
        attn_mask = None
    elif attn_mask is not None:
        check_floating_or_bool(attn_mask, "attn_mask")
    if embed_dim != embed_dim_to_check:
        raise AssertionError(f"was expecting embedding dimension of {embed_dim_to_check}, but got {embed_dim}")
    head_dim = embed_dim // num_heads
    if head_dim * num_heads != embed_dim:
        raise AssertionError(f"embed_dim {embed_dim} not divisible by num_heads {num_heads}")
    kv_heads = num_heads if num_kv_heads is None else num_kv_heads
    kv_dim = kv_heads * head_dim
    _check_key_value(key, value, use_separate_proj_weight, batch_first)
    if attn_mask is not None:
        _check_attn_mask_shape(attn_mask, batch * num_heads, q_len, kv_len)
    _check_added_keys(bias_k, bias_v, static_k, static_v, batch * kv_heads, head_dim)
    dropout_p = dropout_p if training else 0.0
    if not 0.0 <= dropout_p <= 1.0:
        kind = ValueError if need_weights else RuntimeError
        raise kind(f"dropout probability has to be between 0 and 1, but got {dropout_p}")

    if use_separate_proj_weight:
        separate = (q_proj_weight, k_proj_weight, v_proj_weight)
        q, k, v = projections.separate(query, key, value, *separate, in_proj_bias, kv_dim)
    else:
        q, k, v = projections.packed(query, key, value, in_proj_weight, in_proj_bias, kv_dim)
    if bias_k is not None and bias_v is not None:
        one = (batch, 1, kv_dim) if batch_first else (1, batch, kv_dim)
        k, v = torch.cat([k, bias_k.expand(one)], length_dim), torch.cat([v, bias_v.expand(one)], length_dim)
    # As [batch, num_heads, length, head_dim]: views of the projections.
    q, k, v = (
        t.view(*t.shape[:2], heads, head_dim).permute(batch_dim, 2, length_dim, 3)
        for t, heads in ((q, num_heads), (k, kv_heads), (v, kv_heads))
    )
    k = k if static_k is None else static_k.unflatten(0, (batch, kv_heads))
    v = v if static_v is None else static_v.unflatten(0, (batch, kv_heads))
    if add_zero_attn:
        k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
    q, k, v, _ = sdpa._autocast(q, k, v, None)
    sdpa._check_tensors(q, k, v, None)
    if k.shape[2] != v.shape[2]:
        raise RuntimeError(
            f"static_k, static_v: the lengths of keys and values must be equal, got {k.shape[2]} and {v.shape[2]}"
        )

    added = (bias_k is not None) + bool(add_zero_attn)
    mask, bias = _visibility(attn_mask, key_padding_mask, batch, num_heads, k.shape[2], added)
    if bias is not None and bias.dtype not in (torch.float32, q.dtype):
        *_, bias = sdpa._autocast(q, k, v, bias)
        sdpa._check_tensors(q, k, v, bias)
    if trust_hint:
        mask = Causal(align="top-left")
    if window is not None:
        near = _near(window, q_len, k.shape[2], added, q.device)
        mask = near if mask is None else near & mask
    seed = new_dropout_seed(q.device) if dropout_p > 0 else None
    backend = sdpa._selected_backend(q.device, backend)
    out, lse = attention(
        q, k, v, mask=mask, bias=bias, dropout_p=dropout_p, dropout_seed=seed, backend=backend, return_lse=True
    )
    out = out.permute(0, 2, 1, 3) if batch_first else out.permute(2, 0, 1, 3)
    out = F.linear(out.flatten(2), out_proj_weight, out_proj_bias)
    out = out if batched else out.squeeze(1)
    if not need_weights:
        return out, None
    average_first = average_attn_weights and seed is None
    weights = all_weights(q, k, lse=lse, mask=mask, bias=bias, heads="mean" if average_first else "all")
    if seed is not None:
        kept = sharding.alike(dropout_mask(batch, num_heads, q_len, k.shape[2], p=dropout_p, seed=seed), weights)
        weights = weights * kept / (1.0 - dropout_p) if dropout_p < 1 else torch.zeros_like(weights)
        weights = weights.mean(1) if average_attn_weights else weights
    weights = weights.to(q.dtype)
    return out, weights if batched else weights.squeeze(0)


def _visibility(
    attn_mask: Tensor | None, key_padding_mask: Tensor | None, batch: int, num_heads: int, kv_len: int, added: int
) -> tuple[Mask | None, Tensor | None]:
    """torch.nn's two masks as a mask (True = attend) and a bias. The `added` last keys are seen by everybody.

    attn_mask becomes [1, 1, q_len, kv_len] or [batch, num_heads, q_len, kv_len], key_padding_mask
    [batch, 1, 1, kv_len]; two bool ones stay two, so that nothing of the size of their product is made.
    """
    found = []
    if attn_mask is not None:
        found.append(attn_mask[None, None] if attn_mask.dim() == 2 else attn_mask.unflatten(0, (batch, num_heads)))
    if key_padding_mask is not None:
        found.append(key_padding_mask[:, None, None])
    if added:
        found = [F.pad(mask, (0, added)) for mask in found]  # with 0 or False: not hidden
    if key_padding_mask is not None:
        for dim, (have, want) in enumerate(((found[-1].shape[0], batch), (found[-1].shape[3], kv_len))):
            if have != want:
                raise AssertionError(f"Expected key_padded_mask.shape[{dim}] to be {want}, but got {have}")
    mask: Mask | None = None
    bias: Tensor | None = None
    for one in found:
        if one.dtype == torch.bool:
            visible = Dense(~one)
            mask = visible if mask is None else mask & visible
        else:
            bias = one if bias is None else bias + one
    return mask, bias


def _near(window: tuple[int | None, int | None], q_len: int, kv_len: int, added: int, device: torch.device) -> Mask:
    """The window over the keys that were given, and the `added` ones after them, which have no place of their own."""
    if not added:
        return Window(*window)
    given = int(kv_len - added)
    mask = Window(*window, offset=given - int(q_len))
    first, end = (torch.full((1,), size, dtype=torch.int32, device=device) for size in (given, kv_len))
    return (mask & Lengths(first, validate=False)) | Lengths(end, kv_starts=first, validate=False)


def _check_mask_kinds(key_padding_mask: Tensor | None, attn_mask: Tensor | None) -> None:
    if key_padding_mask is None:
        return
    check_floating_or_bool(key_padding_mask, "key_padding_mask")
    if attn_mask is not None and attn_mask.dtype != key_padding_mask.dtype:
        warnings.warn(
            "Support for mismatched key_padding_mask and attn_mask is deprecated. Use same type for both instead.",
            stacklevel=4,
        )


def check_floating_or_bool(mask: Tensor, name: str) -> None:
    """Raise torch's AssertionError about a mask of another dtype."""
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise AssertionError(f"only bool and floating types of {name} are supported")


def _check_key_value(key: Tensor, value: Tensor, separate: bool, batch_first: bool) -> None:
    order = (1, 0, 2) if batch_first else (0, 1, 2)  # torch names sizes in the order [length, batch, embed_dim]
    shape_k, shape_v = (torch.Size([tensor.shape[dim] for dim in order]) for tensor in (key, value))
    if separate and shape_k[:2] != shape_v[:2]:
        raise AssertionError(f"key's sequence and batch dims {shape_k[:2]} do not match value's {shape_v[:2]}")
    if not separate and shape_k != shape_v:
        raise AssertionError(f"key shape {shape_k} does not match value shape {shape_v}")


def _check_attn_mask_shape(attn_mask: Tensor, batch_heads: int, q_len: int, kv_len: int) -> None:
    want = (q_len, kv_len) if attn_mask.dim() == 2 else (batch_heads, q_len, kv_len)
    if tuple(attn_mask.shape) != want:
        raise RuntimeError(f"The shape of the {attn_mask.dim()}D attn_mask is {attn_mask.shape}, but should be {want}.")


def _check_added_keys(
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    static_k: Tensor | None,
    static_v: Tensor | None,
    batch_heads: int,
    head_dim: int,
) -> None:
    if bias_k is not None and bias_v is not None:
        if static_k is not None:
            raise AssertionError("bias cannot be added to static key.")
        if static_v is not None:
            raise AssertionError("bias cannot be added to static value.")
    elif bias_k is not None:
        raise AssertionError("bias_k is set but bias_v is None")
    elif bias_v is not None:
        raise AssertionError("bias_v is set but bias_k is None")
    for name, static in (("static_k", static_k), ("static_v", static_v)):
        if static is None:
            continue
        for dim, want in ((0, batch_heads), (2, head_dim)):
            if static.size(dim) != want:
                raise AssertionError(f"expecting {name}.size({dim}) of {want}, but got {static.size(dim)}")
