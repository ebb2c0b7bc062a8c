"""Attention, backward: the gradients of the queries, of a bias that does not vary over the keys, and of the sinks.

    dq_i = scale sum_j draw_ij k_j        dbias_i = sum_j ds_ij        (gradients.py)
    dsink = -sum_i (1 - left_i) sum_j left_i p_ij <do_i, v_j>          one partial sum a program

A program owns BLOCK_M queries of one head and walks the same keys as the forward. draw is rounded to the input's dtype
before it meets the keys. A bias and the sinks want delta more exact than a rounded output tells it: its sum is
taken here again, in float32, and delta written anew for the kernels that follow.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from fastattn.kernels.passes.gradients import gradient_tile, new_delta
from fastattn.kernels.tiling.tiles import (
    add_dot,
    dot,
    line_places,
    load_line,
    load_tile,
    only_seen,
    row_places,
    store_tile,
)
from fastattn.kernels.tiling.walk import CHECKED, FULL, query_tile, read_sizes, tile_start


class Tensors(NamedTuple):
    """What this pass reads and writes."""

    query: Any
    key: Any
    value: Any
    d_out: Any
    dq: Any
    total: Any
    delta: Any
    bias: Any
    sinks: Any
    seed: Any
    d_lse: Any
    dsinks: Any
    dbias: Any


@triton.jit
def attn_dq_kernel(
    query, key, value, d_out, dq,  # pointers or tensor descriptors (tensor_arguments.py)
    rest,  # total, delta, bias, sinks, seed, d_lse, dsinks, dbias
    strides,  # of query, key, value, d_out, dq, total, delta, bias; () of a descriptor
    sizes, scales, mask_args, lists, VARIANT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    t = Tensors(query, key, value, d_out, dq, rest.total, rest.delta, rest.bias, rest.sinks, rest.seed, rest.d_lse,
                rest.dsinks, rest.dbias)  # fmt: skip
    sizes = read_sizes(sizes)
    batch, head, kv_head, q_lo, q_idx, numbers, walk, _ = query_tile(
        tl.program_id(0), sizes, mask_args, lists, VARIANT, BLOCK_M, BLOCK_N
    )
    q = load_tile(
        t.query, strides.query, batch, head, q_idx, q_lo, sizes.q_len, VARIANT.HEAD_DIM, VARIANT.BLOCK_D, True
    )
    do = load_tile(
        t.d_out, strides.d_out, batch, head, q_idx, q_lo, sizes.q_len, VARIANT.HEAD_DIM_V, VARIANT.BLOCK_DV, True
    )
    total = load_line(t.total, strides.total, batch, head, q_idx, q_lo, float("inf"))
    delta = load_line(t.delta, strides.delta, batch, head, q_idx, q_lo, 0.0)
    own = batch, head, kv_head, q_idx, q, do, total, delta
    sums = tl.zeros([BLOCK_M, VARIANT.BLOCK_D], tl.float32), tl.zeros([BLOCK_M], tl.float32)
    for n in tl.range(0, walk[0]):
        kv_lo = tile_start(VARIANT, walk, CHECKED, n, BLOCK_N)
        sums = _dq_step(kv_lo, own, sums, t, strides, sizes, scales, numbers, VARIANT, True, BLOCK_M, BLOCK_N)
    for n in tl.range(0, walk[1]):
        kv_lo = tile_start(VARIANT, walk, FULL, n, BLOCK_N)
        sums = _dq_step(kv_lo, own, sums, t, strides, sizes, scales, numbers, VARIANT, False, BLOCK_M, BLOCK_N)
    acc, p_dp_rowsum = sums
    store_tile(t.dq, strides.dq, batch, head, q_idx, q_lo, sizes.q_len, acc * scales.scale, VARIANT.HEAD_DIM,
               VARIANT.BLOCK_D, VARIANT.BF16_BY_HAND)  # fmt: skip
    if VARIANT.BIAS != "" or VARIANT.SINKS:
        left, taken = 1.0, 0.0
        if VARIANT.SINKS:
            left, taken = VARIANT.left(total, tl.load(t.sinks + head).to(tl.float32))
            place = (batch.to(tl.int64) * sizes.num_heads + head) * tl.cdiv(sizes.q_len, BLOCK_M) + q_lo // BLOCK_M
            tl.store(t.dsinks + place, -tl.sum(taken * p_dp_rowsum, 0))
        rows, inside = row_places(batch, sizes.num_heads, head, sizes.q_len, q_idx), q_idx < sizes.q_len
        delta, d_lse = new_delta(t, rows, inside, p_dp_rowsum, total, left, VARIANT)
        if VARIANT.BIAS != "":
            places, padded = line_places(strides.delta, batch, head, q_idx)
            tl.store(t.delta + places, delta, mask=padded)
        if t.dbias is not None:  # sum_j p_ij = 1
            tl.store(t.dbias + rows, taken * p_dp_rowsum + d_lse, mask=inside)


@triton.jit
def _dq_step(kv_lo, own, sums, t, strides, sizes, scales, numbers, VARIANT: tl.constexpr, CHECK: tl.constexpr,
             BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """One tile of keys and values into dq [BLOCK_M, BLOCK_D] and the sum of left p <do, v>, [BLOCK_M]."""
    batch, head, kv_head, q_idx, q, do, total, delta = own
    kv_idx = kv_lo + tl.arange(0, BLOCK_N)
    k = load_tile(
        t.key, strides.key, batch, kv_head, kv_idx, kv_lo, sizes.kv_len, VARIANT.HEAD_DIM, VARIANT.BLOCK_D, CHECK
    )
    v = load_tile(
        t.value, strides.value, batch, kv_head, kv_idx, kv_lo, sizes.kv_len, VARIANT.HEAD_DIM_V, VARIANT.BLOCK_DV, CHECK
    )
    # [BLOCK_M, BLOCK_N]
    raw, d_weights = dot(q, tl.trans(k), VARIANT), dot(do, tl.trans(v), VARIANT)
    _, _, d_raw, p_dp, kept = gradient_tile(
        raw, d_weights, total, delta, scales, t, strides.bias, batch, head, q_idx, kv_lo, numbers, VARIANT, CHECK,
        BLOCK_M, BLOCK_N, False,
    )  # fmt: skip
    if VARIANT.HIDES and (CHECK or VARIANT.BIAS != ""):
        k = only_seen(k, kept, 0)
    dq, p_dp_rowsum = sums
    if VARIANT.BIAS != "" or VARIANT.SINKS:
        p_dp_rowsum += tl.sum(p_dp, 1)
    return add_dot(dq, d_raw, k, VARIANT), p_dp_rowsum
