"""Attention, backward: what each row needs once.

total_i = lse_i in the unit of the weights (softmax.py); inf where the row saw nothing, and past the last one
delta_i = left_i sum_d do_id out_id - d_lse_i        0 where the row saw nothing (gradients.py)
"""

import triton
import triton.language as tl

from fastattn.kernels.passes.gradients import new_delta
from fastattn.kernels.tiling.tiles import line_places, load_tile, row_places
from fastattn.kernels.tiling.walk import owned, read_sizes


@triton.jit
def attn_delta_kernel(
    t,  # out, d_out, lse, d_lse or None, sinks, total, delta
    strides,  # of out, d_out, total, delta
    sizes,
    VARIANT: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    sizes = read_sizes(sizes)
    tile, head, batch, _ = owned(tl.program_id(0), tl.cdiv(sizes.q_len, BLOCK_M), sizes.num_heads, sizes, VARIANT)
    q_lo = tile * BLOCK_M
    q_idx = q_lo + tl.arange(0, BLOCK_M)
    inside = q_idx < sizes.q_len
    o = load_tile(t.out, strides.out, batch, head, q_idx, q_lo, sizes.q_len, VARIANT.HEAD_DIM_V, VARIANT.BLOCK_DV, True)
    do = load_tile(
        t.d_out, strides.d_out, batch, head, q_idx, q_lo, sizes.q_len, VARIANT.HEAD_DIM_V, VARIANT.BLOCK_DV, True
    )
    rows = row_places(batch, sizes.num_heads, head, sizes.q_len, q_idx)
    total = VARIANT.total(tl.load(t.lse + rows, mask=inside, other=float("-inf")))
    left = 1.0
    if VARIANT.SINKS:
        left, _ = VARIANT.left(total, tl.load(t.sinks + head).to(tl.float32))
    p_dp_rowsum = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    delta, _ = new_delta(t, rows, inside, p_dp_rowsum, total, left, VARIANT)
    places, padded = line_places(strides.delta, batch, head, q_idx)
    tl.store(t.total + places, total, mask=padded)
    tl.store(t.delta + places, delta, mask=padded)
