"""Query, key and value from a module's inputs: torch.nn's projections, with as few products as the inputs allow."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor


def each(
    change: Callable[[Tensor], Tensor], query: Tensor, key: Tensor, value: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The three tensors changed; what was one object stays one, which decides how many projections are made."""
    new_query = change(query)
    new_key = new_query if key is query else change(key)
    return new_query, new_key, new_key if value is key else change(value)


def packed(
    query: Tensor, key: Tensor, value: Tensor, weight: Tensor | None, bias: Tensor | None, kv_dim: int
) -> tuple[Tensor, ...]:
    """One product for self-attention, two where key is value, else three. The results are views of them."""
    if weight is None:
        raise AssertionError("use_separate_proj_weight is False but in_proj_weight is None")
    if bias is not None and bias.dtype != weight.dtype:  # torch allows it by accident of its layouts, and users do it
        bias = bias.to(weight.dtype)
    embed_dim = query.shape[-1]
    sizes = [embed_dim, kv_dim, kv_dim]
    if query is key and key is value:
        return F.linear(query, weight, bias).split_with_sizes(sizes, -1)
    if key is value:
        sizes = [embed_dim, 2 * kv_dim]
        w_q, w_kv = weight.split(sizes)
        b_q, b_kv = (None, None) if bias is None else bias.split(sizes)
        return F.linear(query, w_q, b_q), *F.linear(key, w_kv, b_kv).chunk(2, -1)
    biases = (None,) * 3 if bias is None else bias.split(sizes)
    return tuple(F.linear(x, w, b) for x, w, b in zip((query, key, value), weight.split(sizes), biases, strict=True))


def separate(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    w_q: Tensor | None,
    w_k: Tensor | None,
    w_v: Tensor | None,
    bias: Tensor | None,
    kv_dim: int,
) -> tuple[Tensor, ...]:
    """One product each: inputs of different widths, key and value kv_dim wide after it."""
    for name, weight in (("q", w_q), ("k", w_k), ("v", w_v)):
        if weight is None:
            raise AssertionError(f"use_separate_proj_weight is True but {name}_proj_weight is None")
    embed_dim = query.shape[-1]
    biases = (None,) * 3 if bias is None else bias.split([embed_dim, kv_dim, kv_dim])
    if kv_dim == embed_dim:  # torch's own, for what it says about shapes
        return F._in_projection(query, key, value, w_q, w_k, w_v, *biases)  # type: ignore[attr-defined]
    weights = (w_q, w_k, w_v)
    return tuple(F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True))  # type: ignore[arg-type]
