"""Attention, forward.

    t_ij = score(q_i, k_j)                          float32, in units of log2
    out_i = sum_j exp2(t_ij - m_i) v_j / sum_j exp2(t_ij - m_i)
    lse_i = ln sum_j exp(...)                       natural; -inf and out 0 where nothing is visible

query [batch, num_heads, q_len, head_dim], key, value [batch, num_kv_heads, kv_len, head_dim(_v)], any strides.
A program owns BLOCK_M queries of one head and walks the keys that the mask's span names, BLOCK_N at a time. Saved for
the backward: out and lse. Weights are rounded to the input's dtype before they meet the values; all sums are float32.
"""

import triton
import triton.language as tl

from fastattn.kernels.masks import keep, kv_span, read_numbers
from fastattn.kernels.tiles import dot, load_tile, narrow, only_seen, split_program, store_tile, tile_base, walk


@triton.jit
def attn_fwd_kernel(
    tensors,  # query, key, value, out, lse
    strides,  # of query, key, value, out: a tuple of four each
    sizes,  # num_heads, group, q_len, kv_len
    scale_log2,
    mask_args,
    MASK: tl.constexpr,
    SCORE: tl.constexpr,
    NORMALIZER: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
    BF16_BY_HAND: tl.constexpr,
):
    num_heads, group, q_len, kv_len = sizes
    tile, head, batch = split_program(tl.cdiv(q_len, BLOCK_M), num_heads)
    numbers = read_numbers(MASK, mask_args, batch, q_len, kv_len)
    q_lo = tile * BLOCK_M
    offs_m = q_lo + tl.arange(0, BLOCK_M)
    q_base = tile_base(tensors[0], strides[0], batch, head)
    k_base = tile_base(tensors[1], strides[1], batch, head // group)
    v_base = tile_base(tensors[2], strides[2], batch, head // group)
    # [BLOCK_M, BLOCK_D]
    q = load_tile(q_base, strides[0], offs_m, q_len, HEAD_DIM, BLOCK_D, True)
    row_max, row_sum = NORMALIZER.start(BLOCK_M)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    bounds = walk(kv_span(MASK, q_lo, tl.minimum(q_lo + BLOCK_M, q_len), numbers), BLOCK_N)
    for part in tl.static_range(3):  # edge, full, edge: the full part needs no check
        for start_n in tl.range(bounds[part], bounds[part + 1], BLOCK_N):
            offs_n = start_n + tl.arange(0, BLOCK_N)
            k = load_tile(k_base, strides[1], offs_n, kv_len, HEAD_DIM, BLOCK_D, part != 1)
            v = load_tile(v_base, strides[2], offs_n, kv_len, HEAD_DIM_V, BLOCK_DV, part != 1)
            # [BLOCK_M, BLOCK_N]
            scores = SCORE.score(dot(q, tl.trans(k), PRECISION, BF16_BY_HAND), scale_log2)
            if part != 1:
                kept = keep(MASK, offs_m[:, None], offs_n[None, :], numbers)
                scores = tl.where(kept, scores, float("-inf"))
                v = only_seen(v, kept, 0)
            weights, rescale, row_max, row_sum = NORMALIZER.step(scores, row_max, row_sum)
            acc = acc * rescale[:, None] + dot(narrow(weights, v.dtype, BF16_BY_HAND), v, PRECISION, BF16_BY_HAND)
    divisor, lse = NORMALIZER.finish(row_max, row_sum)
    o_base = tile_base(tensors[3], strides[3], batch, head)
    store_tile(o_base, strides[3], offs_m, q_len, acc / divisor[:, None], HEAD_DIM_V, BLOCK_DV, BF16_BY_HAND)
    rows = (batch.to(tl.int64) * num_heads + head) * q_len + offs_m
    tl.store(tensors[4] + rows, lse, mask=offs_m < q_len)
