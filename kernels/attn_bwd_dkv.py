"""Attention, backward: the gradients of the keys and values.

    p_ij = exp2(t_ij - lse_i)
    ds_ij = p_ij (<do_i, v_j> - delta_i) dt/d raw
    dv_j = sum_i p_ij do_i        dk_j = sum_i ds_ij q_i        over the query heads of the key head's group

A program owns BLOCK_N keys of one key head and walks, for each query head of the group, the queries that the mirrored
span names, BLOCK_M at a time: one owner and one order of sums, so every run gives the same bits. Transposed products
are computed as such ([BLOCK_N, BLOCK_M]), never by transposing a result.
"""

import triton
import triton.language as tl

from fastattn.kernels.masks import keep, q_span, read_numbers
from fastattn.kernels.tiles import dot, load_tile, narrow, only_seen, split_program, store_tile, tile_base, walk


@triton.jit
def attn_dkv_kernel(
    tensors,  # query, key, value, d_out, dk, dv, lse, delta
    strides,  # of query, key, value, d_out, dk, dv
    sizes,  # num_kv_heads, group (query heads of a key head; may be 0), q_len, kv_len
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
    num_kv_heads, group, q_len, kv_len = sizes
    tile, kv_head, batch = split_program(tl.cdiv(kv_len, BLOCK_N), num_kv_heads)
    numbers = read_numbers(MASK, mask_args, batch, q_len, kv_len)
    kv_lo = tile * BLOCK_N
    offs_n = kv_lo + tl.arange(0, BLOCK_N)
    k_base = tile_base(tensors[1], strides[1], batch, kv_head)
    v_base = tile_base(tensors[2], strides[2], batch, kv_head)
    k = load_tile(k_base, strides[1], offs_n, kv_len, HEAD_DIM, BLOCK_D, True)
    v = load_tile(v_base, strides[2], offs_n, kv_len, HEAD_DIM_V, BLOCK_DV, True)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    bounds = walk(q_span(MASK, kv_lo, tl.minimum(kv_lo + BLOCK_N, kv_len), numbers), BLOCK_M)
    for member in tl.range(0, group):
        head = kv_head * group + member
        q_base = tile_base(tensors[0], strides[0], batch, head)
        do_base = tile_base(tensors[3], strides[3], batch, head)
        first_row = (batch.to(tl.int64) * (num_kv_heads * group) + head) * q_len
        for part in tl.static_range(3):  # edge, full, edge: the full part needs no check
            for start_m in tl.range(bounds[part], bounds[part + 1], BLOCK_M):
                offs_m = start_m + tl.arange(0, BLOCK_M)
                q = load_tile(q_base, strides[0], offs_m, q_len, HEAD_DIM, BLOCK_D, part != 1)
                do = load_tile(do_base, strides[3], offs_m, q_len, HEAD_DIM_V, BLOCK_DV, part != 1)
                lse = tl.load(tensors[6] + first_row + offs_m, mask=offs_m < q_len, other=float("-inf"))
                delta = tl.load(tensors[7] + first_row + offs_m, mask=offs_m < q_len, other=0.0)
                # [BLOCK_N, BLOCK_M]
                raw = dot(k, tl.trans(q), PRECISION, BF16_BY_HAND)
                weights = NORMALIZER.weights(SCORE.score(raw, scales[0]), lse[None, :])
                d_weights = dot(v, tl.trans(do), PRECISION, BF16_BY_HAND)
                d_raw = weights * (d_weights - delta[None, :]) * SCORE.slope(raw, scales[1])
                if part != 1:
                    kept = keep(MASK, offs_m[None, :], offs_n[:, None], numbers)
                    weights = tl.where(kept, weights, 0.0)
                    d_raw = tl.where(kept, d_raw, 0.0)
                    q, do = only_seen(q, kept, 0), only_seen(do, kept, 0)
                dv += dot(narrow(weights, do.dtype, BF16_BY_HAND), do, PRECISION, BF16_BY_HAND)
                dk += dot(narrow(d_raw, q.dtype, BF16_BY_HAND), q, PRECISION, BF16_BY_HAND)
    store_tile(
        tile_base(tensors[4], strides[4], batch, kv_head),
        strides[4],
        offs_n,
        kv_len,
        dk,
        HEAD_DIM,
        BLOCK_D,
        BF16_BY_HAND,
    )
    store_tile(
        tile_base(tensors[5], strides[5], batch, kv_head),
        strides[5],
        offs_n,
        kv_len,
        dv,
        HEAD_DIM_V,
        BLOCK_DV,
        BF16_BY_HAND,
    )
