"""Attention over sequences of different lengths laid end to end: no padding, and no look at the lengths."""

from __future__ import annotations

from torch import Tensor

from fastattn.functional import attention
from fastattn.masks import Full, Mask, Packed

__all__ = ["varlen_attention"]


def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = None,
    *,
    mask: Mask | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
    deterministic: bool = True,
    backend: str | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`attention` within each of many sequences that lie one after the other, as flash-attn packs them.

    Args:
        query: [all q tokens, num_heads, head_dim], any strides.
        key: [all kv tokens, num_kv_heads, head_dim].
        value: [all kv tokens, num_kv_heads, head_dim_v].
        cu_seqlens_q: int32 or int64 [sequences + 1], where each sequence of queries begins, from 0 to the last one's
            end. Tokens after that see nothing.
        cu_seqlens_k: likewise for keys; the same as the queries' when None.
        mask: inside a sequence, with that sequence's own lengths: Full (the default), Causal, Window, Chunked and `&`
            of them.
        bias: broadcastable to [1, num_heads, all q tokens, all kv tokens].
        scale, softcap, sinks, dropout_p, dropout_seed, deterministic, backend: as `attention` takes them.
        return_lse: also return the log-sum-exp.

    Returns:
        out [all q tokens, num_heads, head_dim_v] and with `return_lse` also lse [num_heads, all q tokens]. Nothing is
        padded, and on a GPU nothing is read back from it. On a CPU the lengths are checked.

    Raises:
        TypeError, ValueError: an argument that does not fit; nothing is computed.
        BackendUnavailable: the backend asked for cannot run this call.
    """
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: a tensor is needed, got {type(tensor).__name__}")
        if tensor.dim() != 3:
            raise ValueError(
                f"{name}: packed tokens [tokens, heads, head_dim] are needed, got shape {list(tensor.shape)}; "
                "fastattn.attention takes [batch, heads, length, head_dim]"
            )
    packed = Packed(
        cu_seqlens_q, cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k, Full() if mask is None else mask
    )
    query, key, value = (tensor.transpose(0, 1)[None] for tensor in (query, key, value))
    out, lse = attention(
        query,
        key,
        value,
        mask=packed,
        bias=bias,
        scale=scale,
        softcap=softcap,
        sinks=sinks,
        dropout_p=dropout_p,
        dropout_seed=dropout_seed,
        deterministic=deterministic,
        backend=backend,
        return_lse=True,
    )
    out = out[0].transpose(0, 1)
    return (out, lse[0]) if return_lse else out
