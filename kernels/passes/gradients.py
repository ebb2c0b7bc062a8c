"""What one tile of scores contributes to the gradients, the same in every backward pass.

    p_ij = exp(t_ij - lse_i)                        the weights again, as they were without a sink
    left_i = exp(lse_i) / (exp(lse_i) + exp(sink))  what the sink left of them; 1 where there is none
    ds_ij = p_ij (left_i <do_i, v_j> - delta_i)     the gradient of t: the bias's
    draw_ij = ds_ij dt/d raw / scale                the gradient of <q_i, k_j>, before the scale
    delta_i = left_i sum_j left_i p_ij <do_i, v_j> - d_lse_i

With dropout <do_i, v_j> and the weights that met the values are 0 where dropped and times 1 / (1 - p) elsewhere.
"""

import triton
import triton.language as tl

from fastattn.kernels.rules.dropout import kept_weights
from fastattn.kernels.rules.scores import score_tile


@triton.jit
def gradient_tile(
    raw, d_weights, total, delta, scales, t, bias_strides, batch, head, q_rows, kv_lo, numbers, VARIANT: tl.constexpr,
    CHECK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, MIRROR: tl.constexpr,
):  # fmt: skip
    """raw <q, k> and d_weights <do, v>, [BLOCK_M, BLOCK_N] or with MIRROR [BLOCK_N, BLOCK_M]; total (attn_bwd_delta.py)
    and delta [BLOCK_M]; q_rows [BLOCK_M], keys from kv_lo on -> the weights that met the values, ds, draw, left p <do,
    v>, and what is kept.
    """
    kv_rows = kv_lo + tl.arange(0, BLOCK_N)
    if VARIANT.SINKS:
        left, _ = VARIANT.left(total, tl.load(t.sinks + head).to(tl.float32))
        left = left[None, :] if MIRROR else left[:, None]
    if MIRROR:
        q_idx, kv_idx, total, delta = q_rows[None, :], kv_rows[:, None], total[None, :], delta[None, :]
    else:
        q_idx, kv_idx, total, delta = q_rows[:, None], kv_rows[None, :], total[:, None], delta[:, None]
    scores, kept = score_tile(raw, scales, t.bias, bias_strides, batch, head, q_idx, kv_idx, numbers, VARIANT, CHECK)
    weights = VARIANT.weights(scores, scales.factor, total)
    dropped = weights
    if VARIANT.SINKS:
        d_weights *= left
        dropped *= left
    if VARIANT.DROPOUT:
        bits = kept_weights(t.seed, scales.threshold, batch, head, q_rows, kv_lo, BLOCK_M, BLOCK_N)
        if MIRROR:
            bits = tl.trans(bits)
        dropped = tl.where(bits, dropped * scales.gain, 0.0)
        d_weights = tl.where(bits, d_weights * scales.gain, 0.0)
    d_scores, p_dp = weights * (d_weights - delta), weights * d_weights
    if CHECK or VARIANT.BIAS != "":
        dropped, d_scores, p_dp = tl.where(kept, dropped, 0.0), tl.where(kept, d_scores, 0.0), tl.where(kept, p_dp, 0.0)
    d_raw = d_scores
    if VARIANT.slope is not None:
        d_raw = tl.where(d_scores == 0.0, 0.0, d_scores * VARIANT.slope(raw, scales))
    return dropped, d_scores, d_raw, p_dp, kept


@triton.jit
def new_delta(t, rows, inside, p_dp_rowsum, total, left, VARIANT: tl.constexpr):
    """delta from the rowsum of P * dP, sum_j left p <do, v>; 0 for rows that saw nothing. And the gradient of lse."""
    d_lse = tl.zeros_like(total)
    if t.d_lse is not None:
        d_lse = tl.where(total == float("inf"), 0.0, tl.load(t.d_lse + rows, mask=inside, other=0.0))
    return left * tl.where(total == float("inf"), 0.0, p_dp_rowsum) - d_lse, d_lse
