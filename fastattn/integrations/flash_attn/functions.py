"""flash-attn's functions and conventions, turned into fastattn's here and nowhere else."""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn.dropout import dropout_mask, new_dropout_seed
from fastattn.functional import attention, attention_weights
from fastattn.integrations.flash_attn import cache as flash_cache
from fastattn.integrations.flash_attn.alibi import Alibi, Call, check_slopes
from fastattn.masks import Causal, Full, Mask, Packed, Window
from fastattn.masks.base import is_int
from fastattn.spec import AttnInputs, AttnSpec

__all__ = ["flash_attn_func", "flash_attn_varlen_func", "flash_attn_with_kvcache"]

Sides = tuple[int, int]


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sides = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor | tuple[Tensor, Tensor, Tensor | None]:
    """flash_attn.flash_attn_func.

    Args:
        q: [batch, q_len, num_heads, head_dim].
        k, v: [batch, kv_len, num_heads or a divisor of it, head_dim].
        dropout_p: applied whenever it is above 0.
        softmax_scale: 1 / sqrt(head_dim) when None.
        causal: query i sees keys up to i + kv_len - q_len.
        window_size: (left, right) around i + kv_len - q_len, both ends included; -1 has no end.
        softcap: 0 is none.
        alibi_slopes: float32 [num_heads] or [batch, num_heads]; -slope * |i + kv_len - q_len - j| is added (a table of
            [num_heads, q_len, kv_len] where neither causal nor the window hides what comes later). Slopes that require
            a gradient get one, by a second pass over the weights in the backward, of O(q_len + kv_len) memory; under
            torch.compile and functorch they take the table.
        deterministic: whether the backward must be.
        return_attn_probs: for tests: also return lse and, with dropout, the signed weights.

    Returns:
        out [batch, q_len, num_heads, head_dim], or (out, lse [batch, num_heads, q_len], weights
        [batch, num_heads, q_len, kv_len], negative where dropped, or None without dropout).

    Raises:
        TypeError, ValueError: an argument that does not fit.
    """
    query, key, value = (_heads_first(name, tensor, 4) for name, tensor in (("q", q), ("k", k), ("v", v)))
    left, right = _sides(causal, window_size)
    mask = _visible(left, right)
    alibi = None
    if alibi_slopes is not None:
        check_slopes(alibi_slopes, query)
        alibi = Alibi.of_lengths(alibi_slopes, query.shape[2], key.shape[2], right == 0)
    out, lse, weights = _attend(
        query, key, value, mask, alibi, dropout_p, softmax_scale, softcap, deterministic, return_attn_probs
    )
    out = out.transpose(1, 2)
    return (out, lse, weights) if return_attn_probs else out


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sides = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor, Tensor | None]:
    """flash_attn.flash_attn_varlen_func: sequences laid end to end.

    Args:
        q: [all q tokens, num_heads, head_dim].
        k, v: [all kv tokens, num_kv_heads, head_dim]; with block_table [blocks, block_size, num_kv_heads, head_dim].
        cu_seqlens_q, cu_seqlens_k: int32 [sequences + 1], where each begins, from 0.
        max_seqlen_q, max_seqlen_k: not needed, and not read.
        alibi_slopes: [num_heads] or [sequences, num_heads].
        block_table: int32 [sequences, blocks of a sequence]: where in k and v each block of keys lies. The keys are
            brought together first, which takes a copy of them.
        The rest as `flash_attn_func` takes it, within each sequence.

    Returns:
        out [all q tokens, num_heads, head_dim], or (out, lse [num_heads, all q tokens], signed weights
        [1, num_heads, all q tokens, all kv tokens] or None).

    Raises:
        TypeError, ValueError: an argument that does not fit.
    """
    left, right = _sides(causal, window_size)
    mask = Packed(cu_seqlens_q, cu_seqlens_k, _visible(left, right))
    if block_table is not None:
        k, v = flash_cache.tokens(k, v, block_table, cu_seqlens_k)
    query, key, value = (_heads_first(name, tensor, 3) for name, tensor in (("q", q), ("k", k), ("v", v)))
    alibi = None
    if alibi_slopes is not None:
        check_slopes(alibi_slopes, query, cu_seqlens_q.shape[0] - 1)
        alibi = Alibi.of_packed(alibi_slopes, cu_seqlens_q, cu_seqlens_k, query.shape[2], key.shape[2], right == 0)
    out, lse, weights = _attend(
        query, key, value, mask, alibi, dropout_p, softmax_scale, softcap, deterministic, return_attn_probs
    )
    out = out[0].transpose(0, 1)
    return (out, lse[0], weights) if return_attn_probs else out


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sides = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """flash_attn.flash_attn_with_kvcache: one step of decoding on a cache, which k and v are first written into.

    Args:
        q: [batch, q_len, num_heads, head_dim].
        k_cache, v_cache: [cache rows, capacity, num_kv_heads, head_dim]; with block_table
            [blocks, block_size, num_kv_heads, head_dim].
        k, v: [batch, new, num_kv_heads, head_dim], written in place after the cache_seqlens tokens that are there.
        rotary_cos, rotary_sin: [positions, rotary_dim / 2]; turn k and q by their positions, q by cache_seqlens alone
            where neither causal nor a window orders the tokens.
        cache_seqlens: how many tokens the cache holds, a number or int32 [batch]; all of it when None.
        cache_batch_idx: int32 [batch], the cache's row of each item.
        cache_leftpad: int32 [batch], how many of the first tokens are padding.
        block_table: int32 [batch, blocks of an item]: where each block of an item's tokens lies.
        causal, window_size: query i sits at cache_seqlens + new + i - q_len.
        rotary_interleaved: pairs are neighbours (GPT-J), else the two halves (GPT-NeoX).
        alibi_slopes: as in `flash_attn_func`.
        num_splits: not needed, and not read.
        return_softmax_lse: also return the log-sum-exp.

    Returns:
        out [batch, q_len, num_heads, head_dim], and with return_softmax_lse lse [batch, num_heads, q_len].

    Raises:
        TypeError, ValueError: an argument that does not fit, nothing is written then; a gradient wanted for
            alibi_slopes, or for what takes part in writing (k, v, the caches then, rotary_cos, rotary_sin); on a CPU
            also a cache too small for k, and numbers that lie outside of it.
    """
    query = _heads_first("q", q, 4)
    cache = flash_cache.Cache(query, k_cache, v_cache, cache_seqlens, cache_batch_idx, cache_leftpad, block_table)
    cache.expect(k, v)
    left, right = _sides(causal, window_size)
    if rotary_cos is not None or rotary_sin is not None:
        ordered = not (left is None and right is None)
        query = cache.rotate(query, rotary_cos, rotary_sin, rotary_interleaved, ordered)
    mask = cache.real
    if not (left is None and right is None):
        offset = cache.lengths - query.shape[2]
        mask = mask & (Causal(offset=offset) if (left, right) == (None, 0) else Window(left, right, offset=offset))
    alibi = None
    if alibi_slopes is not None:
        check_slopes(alibi_slopes, query)
        flash_cache.refuse_gradients(alibi_slopes=alibi_slopes)
        alibi = Alibi.of_cache(alibi_slopes, cache.lengths, query.shape[2], cache.capacity, right == 0)
    key, value, mask = cache.read(mask)
    if k is not None:  # what attention would refuse is refused before anything is written
        bias = None if alibi is None else alibi.bias(query.dtype)
        AttnSpec.of(AttnInputs(query, key, value, bias), mask=mask, scale=softmax_scale, softcap=softcap or None)
        cache.write()
    out, lse, _ = _attend(query, key, value, mask, alibi, 0.0, softmax_scale, softcap, False, False)
    out = out.transpose(1, 2)
    return (out, lse) if return_softmax_lse else out


def _heads_first(name: str, tensor: Tensor, rank: int) -> Tensor:
    """[batch, length, heads, dim], or [tokens, heads, dim] as a batch of one, as [batch, heads, length, dim]."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: a tensor is needed, got {type(tensor).__name__}")
    if tensor.dim() != rank:
        layout = "[batch, length, heads, head_dim]" if rank == 4 else "[tokens, heads, head_dim]"
        raise ValueError(f"{name}: {layout} is needed, got shape {list(tensor.shape)}")
    return tensor.transpose(1, 2) if rank == 4 else tensor.transpose(0, 1)[None]


def _sides(causal: bool, window_size: Sides) -> tuple[int | None, int | None]:
    """flash-attn's window as fastattn's: a negative side has no end, and causal ends the right one at 0."""
    sides = window_size if isinstance(window_size, (tuple, list)) else ()
    if len(sides) != 2 or not all(side is None or is_int(side) for side in sides):
        raise ValueError(f"window_size: ints (left, right) are needed, -1 for a side without end, got {window_size!r}")
    left, right = (None if side is None or side < 0 else side for side in sides)
    return left, 0 if causal else right


def _visible(left: int | None, right: int | None) -> Mask:
    if left is None and right is None:
        return Full()
    return Causal() if left is None and right == 0 else Window(left, right)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Mask,
    alibi: Alibi | None,
    dropout_p: float,
    scale: float | None,
    softcap: float,
    deterministic: bool,
    with_weights: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """out, lse and the signed weights, all [batch, heads, ...]."""
    bias = None if alibi is None else alibi.bias(query.dtype)
    seed = new_dropout_seed(query.device) if dropout_p > 0 else None
    out, lse = attention(
        query,
        key,
        value,
        mask=mask,
        bias=bias,
        scale=scale,
        softcap=softcap or None,
        dropout_p=dropout_p,
        dropout_seed=seed,
        deterministic=deterministic or torch.are_deterministic_algorithms_enabled(),
        return_lse=True,
    )
    if alibi is not None and bias is not None:
        lse = alibi.whole(lse, bias)
        out, lse = alibi.learned(out, lse, Call(mask, scale, softcap or None, dropout_p, seed), query, key, value)
    weights = None
    if with_weights and seed is not None:
        added = None if alibi is None else alibi.table(query.dtype)
        weights = attention_weights(query, key, lse=lse, mask=mask, bias=added, scale=scale, softcap=softcap or None)
        kept = dropout_mask(*weights.shape, p=dropout_p, seed=seed)
        weights = torch.where(kept, weights, -weights)
    return out, lse, weights
