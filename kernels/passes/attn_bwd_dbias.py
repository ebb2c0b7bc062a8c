"""Attention, backward: the gradient of a bias that varies over queries and keys.

    dbias_ij = sum ds_ij        over the batch items and heads that share the bias (gradients.py)

A program owns one tile of the table and runs over those that share it, in a fixed order: the memory is the table's own,
and every run gives the same bits.
"""

import triton
import triton.language as tl

from fastattn.kernels.opaque_int import from_opaque, stride
from fastattn.kernels.passes.gradients import gradient_tile
from fastattn.kernels.rules.masks import read_numbers
from fastattn.kernels.tiling.tiles import dot, load_line, load_tile, round_to
from fastattn.kernels.tiling.walk import read_sizes


@triton.jit
def attn_dbias_kernel(
    t,  # query, key, value, d_out, total, delta, bias, sinks, seed, dbias
    strides,  # of query, key, value, d_out, total, delta, bias, dbias
    sizes, scales, mask_args,
    shared,  # own_heads: tables of a batch item; heads, batches: how many share a table
    VARIANT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    sizes = read_sizes(sizes)
    q_len, kv_len = sizes.q_len, sizes.kv_len
    kv_tiles = tl.cdiv(kv_len, BLOCK_N)
    program = tl.program_id(0)
    kv_lo, rest = program % kv_tiles * BLOCK_N, program // kv_tiles
    q_tiles = tl.cdiv(q_len, BLOCK_M)
    q_lo, table = rest % q_tiles * BLOCK_M, rest // q_tiles
    q_idx, kv_idx = q_lo + tl.arange(0, BLOCK_M), kv_lo + tl.arange(0, BLOCK_N)
    inside = q_idx < q_len
    own_heads, heads, batches = from_opaque(shared.own_heads), from_opaque(shared.heads), from_opaque(shared.batches)
    own_head, own_batch = table % own_heads, table // own_heads
    dbias = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for sharer in tl.range(0, heads * batches):
        head, batch = own_head + sharer % heads, own_batch + sharer // heads
        kv_head = head // sizes.group
        numbers = read_numbers(VARIANT, mask_args, batch, head, q_len, kv_len)
        q = load_tile(t.query, strides.query, batch, head, q_idx, q_lo, q_len, VARIANT.HEAD_DIM, VARIANT.BLOCK_D, True)
        k = load_tile(
            t.key, strides.key, batch, kv_head, kv_idx, kv_lo, kv_len, VARIANT.HEAD_DIM, VARIANT.BLOCK_D, True
        )
        do = load_tile(
            t.d_out, strides.d_out, batch, head, q_idx, q_lo, q_len, VARIANT.HEAD_DIM_V, VARIANT.BLOCK_DV, True
        )
        v = load_tile(
            t.value, strides.value, batch, kv_head, kv_idx, kv_lo, kv_len, VARIANT.HEAD_DIM_V, VARIANT.BLOCK_DV, True
        )
        total = load_line(t.total, strides.total, batch, head, q_idx, q_lo, float("inf"))
        delta = load_line(t.delta, strides.delta, batch, head, q_idx, q_lo, 0.0)
        # [BLOCK_M, BLOCK_N]
        raw, d_weights = dot(q, tl.trans(k), VARIANT), dot(do, tl.trans(v), VARIANT)
        _, d_scores, _, _, _ = gradient_tile(
            raw, d_weights, total, delta, scales, t, strides.bias, batch, head, q_idx, kv_lo, numbers, VARIANT, True,
            BLOCK_M, BLOCK_N, False,
        )  # fmt: skip
        dbias += d_scores
    at = t.dbias + own_batch.to(tl.int64) * stride(strides.dbias, 0) + own_head.to(tl.int64) * stride(strides.dbias, 1)
    at += q_idx.to(tl.int64)[:, None] * stride(strides.dbias, 2)
    at += kv_idx.to(tl.int64)[None, :] * stride(strides.dbias, 3)
    dbias = round_to(dbias, t.dbias.dtype.element_ty, VARIANT.BF16_BY_HAND)
    tl.store(at, dbias, mask=inside[:, None] & (kv_idx < kv_len)[None, :])
