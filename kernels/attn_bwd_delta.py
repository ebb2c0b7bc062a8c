"""Attention, backward: what each row needs once.

total_i = log2 of the row's whole denominator, sink included; inf where the row saw nothing
delta_i = sum_d do_id out_id - d_lse_i dlse/dt / p          0 where the row saw nothing
"""

import triton
import triton.language as tl

from fastattn.kernels.attn_fwd import FREE
from fastattn.kernels.gradients import lse_part
from fastattn.kernels.tiles import load_tile, row_places
from fastattn.kernels.walk import owned


@triton.jit(do_not_specialize=FREE)
def attn_delta_kernel(
    t,  # out, d_out, lse, d_lse or None, sinks, total, delta
    strides,  # of out, d_out
    sizes,
    KIND: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    tile, head, batch, _ = owned(tl.program_id(0), tl.cdiv(sizes.q_len, BLOCK_M), sizes.num_heads, sizes, KIND)
    q_lo = tile * BLOCK_M
    q_idx = q_lo + tl.arange(0, BLOCK_M)
    inside = q_idx < sizes.q_len
    o = load_tile(t.out, strides.out, batch, head, q_idx, q_lo, sizes.q_len, KIND.HEAD_DIM_V, KIND.BLOCK_DV, True)
    do = load_tile(t.d_out, strides.d_out, batch, head, q_idx, q_lo, sizes.q_len, KIND.HEAD_DIM_V, KIND.BLOCK_DV, True)
    rows = row_places(batch, sizes.num_heads, head, sizes.q_len, q_idx)
    lse = tl.load(t.lse + rows, mask=inside, other=float("-inf"))
    delta = tl.where(lse == float("-inf"), 0.0, tl.sum(o.to(tl.float32) * do.to(tl.float32), 1))
    sink = None
    if KIND.SINKS:
        sink = tl.load(t.sinks + head).to(tl.float32)
    total = KIND.total(lse, sink)
    delta -= lse_part(t, rows, inside, lse, total, KIND)
    tl.store(t.total + rows, total, mask=inside)
    tl.store(t.delta + rows, delta, mask=inside)
