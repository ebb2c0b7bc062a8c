"""Attention, backward: the gradients of the keys and values, and of a bias that varies over the keys alone.

    dv_j = sum_i p_ij do_i        dk_j = scale sum_i draw_ij q_i        over the query heads of the key head's group
    dbias_j = sum_i ds_ij         for each query head                   (gradients.py)

A program owns BLOCK_N keys of one key head and walks, for each query head of the group, the queries that the mirrored
spans or lists name, BLOCK_M at a time: one owner and one order of sums, so every run gives the same bits. Transposed
products are computed as such ([BLOCK_N, BLOCK_M]), never by transposing a result.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from fastattn.kernels.passes.gradients import gradient_tile
from fastattn.kernels.tiling.tiles import add_dot, dot, load_line, load_tile, only_seen, row_places, store_tile
from fastattn.kernels.tiling.walk import CHECKED, FULL, owned, query_walk, read_sizes, tile_start


class Tensors(NamedTuple):
    """What this pass reads and writes; dbias [batch, num_heads, kv_len] or None."""

    query: Any
    key: Any
    value: Any
    d_out: Any
    total: Any
    delta: Any
    dk: Any
    dv: Any
    bias: Any
    sinks: Any
    seed: Any
    dbias: Any


@triton.jit
def attn_dkv_kernel(
    query, key, value, d_out, total, delta, dk, dv,  # pointers or tensor descriptors (tensor_arguments.py)
    rest,  # bias, sinks, seed, dbias
    strides,  # of query, key, value, d_out, total, delta, dk, dv, bias; () of a descriptor
    sizes, scales, mask_args, lists, VARIANT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    t = Tensors(query, key, value, d_out, total, delta, dk, dv, rest.bias, rest.sinks, rest.seed, rest.dbias)
    sizes = read_sizes(sizes)
    kv_len, kv_heads = sizes.kv_len, sizes.kv_heads
    tile, kv_head, batch, _ = owned(tl.program_id(0), tl.cdiv(kv_len, BLOCK_N), kv_heads, sizes, VARIANT)
    kv_lo = tile * BLOCK_N
    kv_idx = kv_lo + tl.arange(0, BLOCK_N)
    k = load_tile(t.key, strides.key, batch, kv_head, kv_idx, kv_lo, kv_len, VARIANT.HEAD_DIM, VARIANT.BLOCK_D, True)
    v = load_tile(
        t.value, strides.value, batch, kv_head, kv_idx, kv_lo, kv_len, VARIANT.HEAD_DIM_V, VARIANT.BLOCK_DV, True
    )
    sum_k = tl.zeros([BLOCK_N, VARIANT.BLOCK_D], tl.float32)
    sum_v = tl.zeros([BLOCK_N, VARIANT.BLOCK_DV], tl.float32)
    for member in tl.range(0, sizes.group):
        head = kv_head * sizes.group + member
        numbers, walk = query_walk(batch, head, tile, sizes, mask_args, lists, VARIANT, BLOCK_M, BLOCK_N)
        own = batch, head, kv_lo, k, v
        sums = sum_k, sum_v, tl.zeros([BLOCK_N], tl.float32)
        for n in tl.range(0, walk[0]):
            q_lo = tile_start(VARIANT, walk, CHECKED, n, BLOCK_M)
            sums = _dkv_step(q_lo, own, sums, t, strides, sizes, scales, numbers, VARIANT, True, BLOCK_M, BLOCK_N)
        for n in tl.range(0, walk[1]):
            q_lo = tile_start(VARIANT, walk, FULL, n, BLOCK_M)
            sums = _dkv_step(q_lo, own, sums, t, strides, sizes, scales, numbers, VARIANT, False, BLOCK_M, BLOCK_N)
        sum_k, sum_v, dbias = sums
        if t.dbias is not None:
            tl.store(t.dbias + row_places(batch, sizes.num_heads, head, kv_len, kv_idx), dbias, mask=kv_idx < kv_len)
    store_tile(t.dk, strides.dk, batch, kv_head, kv_idx, kv_lo, kv_len, sum_k * scales.scale, VARIANT.HEAD_DIM,
               VARIANT.BLOCK_D, VARIANT.BF16_BY_HAND)  # fmt: skip
    store_tile(t.dv, strides.dv, batch, kv_head, kv_idx, kv_lo, kv_len, sum_v, VARIANT.HEAD_DIM_V, VARIANT.BLOCK_DV,
               VARIANT.BF16_BY_HAND)  # fmt: skip


@triton.jit
def _dkv_step(q_lo, own, sums, t, strides, sizes, scales, numbers, VARIANT: tl.constexpr, CHECK: tl.constexpr,
              BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """One tile of queries and output gradients into dk, dv [BLOCK_N, BLOCK_D(V)] and dbias [BLOCK_N]."""
    batch, head, kv_lo, k, v = own
    q_idx, q_len = q_lo + tl.arange(0, BLOCK_M), sizes.q_len
    q = load_tile(t.query, strides.query, batch, head, q_idx, q_lo, q_len, VARIANT.HEAD_DIM, VARIANT.BLOCK_D, CHECK)
    do = load_tile(t.d_out, strides.d_out, batch, head, q_idx, q_lo, q_len, VARIANT.HEAD_DIM_V, VARIANT.BLOCK_DV, CHECK)
    total = load_line(t.total, strides.total, batch, head, q_idx, q_lo, float("inf"))
    delta = load_line(t.delta, strides.delta, batch, head, q_idx, q_lo, 0.0)
    # [BLOCK_N, BLOCK_M]
    raw, d_weights = dot(k, tl.trans(q), VARIANT), dot(v, tl.trans(do), VARIANT)
    weights, d_scores, d_raw, _, kept = gradient_tile(
        raw, d_weights, total, delta, scales, t, strides.bias, batch, head, q_idx, kv_lo, numbers, VARIANT, CHECK,
        BLOCK_M, BLOCK_N, True,
    )  # fmt: skip
    if VARIANT.HIDES and (CHECK or VARIANT.BIAS != ""):
        q, do = only_seen(q, kept, 0), only_seen(do, kept, 0)
    dk, dv, dbias = sums
    if t.dbias is not None:
        dbias += tl.sum(d_scores, 1)
    return add_dot(dk, d_raw, q, VARIANT), add_dot(dv, weights, do, VARIANT), dbias
