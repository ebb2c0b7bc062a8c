"""Attention, forward.

    t_ij = score(q_i, k_j) + bias_ij
    out_i = sum_j exp(t_ij - m_i) v_j / (sum_j exp(t_ij - m_i) + exp(sink - m_i))
    lse_i = ln sum_j exp(t_ij)                      natural; -inf and out 0 where nothing is visible

query [batch, num_heads, q_len, head_dim], key, value [batch, num_kv_heads, kv_len, head_dim(_v)], any strides.
A program owns BLOCK_M queries of one head, or all queries of a group of heads (PACKED), and walks the keys BLOCK_N at a
time. With SPLIT several programs share a walk: out and lse are then partial ones, float32 [splits * batch, ...], which
attn_merge_kernel puts together. Saved for the backward: out and lse. Weights are rounded to the input's dtype before
they meet the values; all sums are float32.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from fastattn.kernels.rules.dropout import kept_weights
from fastattn.kernels.rules.scores import score_tile
from fastattn.kernels.rules.softmax import LOG2E
from fastattn.kernels.tiling.tiles import add_dot, dot, load_tile, only_seen, row_places, store_tile
from fastattn.kernels.tiling.walk import CHECKED, FULL, owned, part, query_tile, read_sizes, tile_start


class Tensors(NamedTuple):
    """What the forward reads and writes."""

    query: Any
    key: Any
    value: Any
    out: Any
    lse: Any
    bias: Any
    sinks: Any
    seed: Any


@triton.jit
def attn_fwd_kernel(
    query,  # pointers or tensor descriptors (tensor_arguments.py)
    key,
    value,
    out,
    rest,  # lse, bias, sinks, seed
    strides,  # of query, key, value, out, bias; () of a descriptor
    sizes,  # walk.Sizes
    scales,  # scores.Scales
    mask_args,
    lists,  # mask_lowering.Lists or None
    VARIANT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    t = Tensors(query, key, value, out, rest.lse, rest.bias, rest.sinks, rest.seed)
    sizes = read_sizes(sizes)
    if VARIANT.PERSISTENT:
        for program in tl.range(tl.program_id(0), sizes.programs, tl.num_programs(0)):
            _fwd_tile(program, t, strides, sizes, scales, mask_args, lists, VARIANT, BLOCK_M, BLOCK_N)
    else:
        _fwd_tile(tl.program_id(0), t, strides, sizes, scales, mask_args, lists, VARIANT, BLOCK_M, BLOCK_N)


@triton.jit
def _fwd_tile(program, t, strides, sizes, scales, mask_args, lists, VARIANT: tl.constexpr, BLOCK_M: tl.constexpr,
              BLOCK_N: tl.constexpr):  # fmt: skip
    batch, head, kv_head, q_lo, q_idx, numbers, walk, split = query_tile(
        program, sizes, mask_args, lists, VARIANT, BLOCK_M, BLOCK_N
    )
    at = batch, head, kv_head, q_idx
    # [BLOCK_M, BLOCK_D]
    q = load_tile(
        t.query, strides.query, batch, head, q_idx, q_lo, sizes.q_len, VARIANT.HEAD_DIM, VARIANT.BLOCK_D, True
    )
    row_max, row_sum = VARIANT.begin(BLOCK_M)
    state = tl.zeros([BLOCK_M, VARIANT.BLOCK_DV], tl.float32), row_max, row_sum
    begin, end = part(walk, CHECKED, split, sizes.splits, VARIANT)
    for n in tl.range(begin, end):
        kv_lo = tile_start(VARIANT, walk, CHECKED, n, BLOCK_N)
        state = _fwd_step(kv_lo, q, state, at, t, strides, sizes, scales, numbers, VARIANT, True, BLOCK_M, BLOCK_N)
    begin, end = part(walk, FULL, split, sizes.splits, VARIANT)
    for n in tl.range(begin, end):
        kv_lo = tile_start(VARIANT, walk, FULL, n, BLOCK_N)
        state = _fwd_step(kv_lo, q, state, at, t, strides, sizes, scales, numbers, VARIANT, False, BLOCK_M, BLOCK_N)
    acc, row_max, row_sum = state
    sink = None
    if VARIANT.SINKS and not VARIANT.SPLIT:  # else they enter once, when the parts are merged
        sink = tl.load(t.sinks + head).to(tl.float32)
    divisor, lse = VARIANT.finish(scales.factor, row_max, row_sum, sink)
    if VARIANT.DROPOUT:
        acc *= scales.gain
    place = split * sizes.batch + batch
    tl.store(t.lse + row_places(place, sizes.num_heads, head, sizes.q_len, q_idx), lse, mask=q_idx < sizes.q_len)
    store_tile(t.out, strides.out, place, head, q_idx, q_lo, sizes.q_len, acc / divisor[:, None], VARIANT.HEAD_DIM_V,
               VARIANT.BLOCK_DV, VARIANT.BF16_BY_HAND)  # fmt: skip


@triton.jit
def _fwd_step(kv_lo, q, state, at, t, strides, sizes, scales, numbers, VARIANT: tl.constexpr, CHECK: tl.constexpr,
              BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """One tile of keys and values into the running sums: acc [BLOCK_M, BLOCK_DV], row_max, row_sum."""
    batch, head, kv_head, q_idx = at
    acc, row_max, row_sum = state
    kv_idx = kv_lo + tl.arange(0, BLOCK_N)
    k = load_tile(
        t.key, strides.key, batch, kv_head, kv_idx, kv_lo, sizes.kv_len, VARIANT.HEAD_DIM, VARIANT.BLOCK_D, CHECK
    )
    v = load_tile(
        t.value, strides.value, batch, kv_head, kv_idx, kv_lo, sizes.kv_len, VARIANT.HEAD_DIM_V, VARIANT.BLOCK_DV, CHECK
    )
    # [BLOCK_M, BLOCK_N]
    raw = dot(q, tl.trans(k), VARIANT)
    rows_head = head[:, None] if VARIANT.PACKED else head
    scores, kept = score_tile(raw, scales, t.bias, strides.bias, batch, rows_head, q_idx[:, None], kv_idx[None, :],
                              numbers, VARIANT, CHECK)  # fmt: skip
    if VARIANT.HIDES and (CHECK or VARIANT.BIAS != ""):
        v = only_seen(v, kept, 0)
    weights, rescale, row_max, row_sum = VARIANT.step(scores, scales.factor, row_max, row_sum)
    if VARIANT.DROPOUT:
        bits = kept_weights(t.seed, scales.threshold, batch, head, q_idx, kv_lo, BLOCK_M, BLOCK_N)
        weights = tl.where(bits, weights, 0.0)
    return add_dot(acc * rescale[:, None], weights, v, VARIANT), row_max, row_sum


@triton.jit
def attn_merge_kernel(
    t,  # out and lse of the splits; out, lse; sinks
    strides,  # of the parts' out, of out
    sizes,
    VARIANT: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Partial results over disjoint keys, each with its lse, into one: weighted by exp(lse - total)."""
    sizes = read_sizes(sizes)
    tile, head, batch, _ = owned(tl.program_id(0), tl.cdiv(sizes.q_len, BLOCK_M), sizes.num_heads, sizes, VARIANT)
    q_lo = tile * BLOCK_M
    q_idx = q_lo + tl.arange(0, BLOCK_M)
    inside = q_idx < sizes.q_len
    row_max, row_sum = VARIANT.begin(BLOCK_M)
    acc = tl.zeros([BLOCK_M, VARIANT.BLOCK_DV], tl.float32)
    for split in tl.range(0, sizes.splits):
        place = split * sizes.batch + batch
        rows = row_places(place, sizes.num_heads, head, sizes.q_len, q_idx)
        lse = tl.load(t.part_lse + rows, mask=inside, other=float("-inf"))
        part_out = load_tile(t.part_out, strides.part_out, place, head, q_idx, q_lo, sizes.q_len, VARIANT.HEAD_DIM_V,
                             VARIANT.BLOCK_DV, True)  # fmt: skip
        weights, rescale, row_max, row_sum = VARIANT.step(lse[:, None], LOG2E, row_max, row_sum)
        acc = acc * rescale[:, None] + weights * part_out
    sink = None
    if VARIANT.SINKS:
        sink = tl.load(t.sinks + head).to(tl.float32)
    divisor, lse = VARIANT.finish(LOG2E, row_max, row_sum, sink)
    tl.store(t.lse + row_places(batch, sizes.num_heads, head, sizes.q_len, q_idx), lse, mask=inside)
    store_tile(t.out, strides.out, batch, head, q_idx, q_lo, sizes.q_len, acc / divisor[:, None], VARIANT.HEAD_DIM_V,
               VARIANT.BLOCK_DV, VARIANT.BF16_BY_HAND)  # fmt: skip
