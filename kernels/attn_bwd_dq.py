"""Attention, backward: delta, and the gradient of the queries.

    delta_i = sum_d do_id out_id - d_lse_i          0 where the row saw nothing
    p_ij = exp2(t_ij - lse_i)
    ds_ij = p_ij (<do_i, v_j> - delta_i) dt/d raw
    dq_i = sum_j ds_ij k_j

A program owns BLOCK_M queries of one head and walks the same keys as the forward. ds is rounded to the input's dtype
before it meets the keys.
"""

import triton
import triton.language as tl

from fastattn.kernels.masks import keep, kv_span, read_numbers
from fastattn.kernels.tiles import dot, load_tile, narrow, only_seen, split_program, store_tile, tile_base, walk


@triton.jit
def attn_delta_kernel(
    tensors,  # out, d_out, lse, d_lse or None, delta
    strides,  # of out, d_out
    sizes,  # num_heads, q_len
    HEAD_DIM_V: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    num_heads, q_len = sizes
    tile, head, batch = split_program(tl.cdiv(q_len, BLOCK_M), num_heads)
    offs_m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    o_base = tile_base(tensors[0], strides[0], batch, head)
    do_base = tile_base(tensors[1], strides[1], batch, head)
    o = load_tile(o_base, strides[0], offs_m, q_len, HEAD_DIM_V, BLOCK_DV, True).to(tl.float32)
    do = load_tile(do_base, strides[1], offs_m, q_len, HEAD_DIM_V, BLOCK_DV, True).to(tl.float32)
    rows = (batch.to(tl.int64) * num_heads + head) * q_len + offs_m
    inside = offs_m < q_len
    delta = tl.sum(o * do, 1)
    if tensors[3] is not None:
        delta -= tl.load(tensors[3] + rows, mask=inside, other=0.0)
    lse = tl.load(tensors[2] + rows, mask=inside, other=0.0)
    tl.store(tensors[4] + rows, tl.where(lse == float("-inf"), 0.0, delta), mask=inside)


@triton.jit
def attn_dq_kernel(
    tensors,  # query, key, value, d_out, dq, lse, delta
    strides,  # of query, key, value, d_out, dq
    sizes,  # num_heads, group, q_len, kv_len
    scales,  # scale_log2, scale
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
    k_base = tile_base(tensors[1], strides[1], batch, head // group)
    v_base = tile_base(tensors[2], strides[2], batch, head // group)
    q_base = tile_base(tensors[0], strides[0], batch, head)
    do_base = tile_base(tensors[3], strides[3], batch, head)
    q = load_tile(q_base, strides[0], offs_m, q_len, HEAD_DIM, BLOCK_D, True)
    do = load_tile(do_base, strides[3], offs_m, q_len, HEAD_DIM_V, BLOCK_DV, True)
    rows = (batch.to(tl.int64) * num_heads + head) * q_len + offs_m
    lse = tl.load(tensors[5] + rows, mask=offs_m < q_len, other=float("-inf"))
    delta = tl.load(tensors[6] + rows, mask=offs_m < q_len, other=0.0)
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    bounds = walk(kv_span(MASK, q_lo, tl.minimum(q_lo + BLOCK_M, q_len), numbers), BLOCK_N)
    for part in tl.static_range(3):  # edge, full, edge: the full part needs no check
        for start_n in tl.range(bounds[part], bounds[part + 1], BLOCK_N):
            offs_n = start_n + tl.arange(0, BLOCK_N)
            k = load_tile(k_base, strides[1], offs_n, kv_len, HEAD_DIM, BLOCK_D, part != 1)
            v = load_tile(v_base, strides[2], offs_n, kv_len, HEAD_DIM_V, BLOCK_DV, part != 1)
            # [BLOCK_M, BLOCK_N]
            raw = dot(q, tl.trans(k), PRECISION, BF16_BY_HAND)
            weights = NORMALIZER.weights(SCORE.score(raw, scales[0]), lse[:, None])
            d_weights = dot(do, tl.trans(v), PRECISION, BF16_BY_HAND)
            d_raw = weights * (d_weights - delta[:, None]) * SCORE.slope(raw, scales[1])
            if part != 1:
                kept = keep(MASK, offs_m[:, None], offs_n[None, :], numbers)
                d_raw = tl.where(kept, d_raw, 0.0)
                k = only_seen(k, kept, 0)
            dq += dot(narrow(d_raw, k.dtype, BF16_BY_HAND), k, PRECISION, BF16_BY_HAND)
    store_tile(
        tile_base(tensors[4], strides[4], batch, head), strides[4], offs_m, q_len, dq, HEAD_DIM, BLOCK_D, BF16_BY_HAND
    )
