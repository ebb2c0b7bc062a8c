"""The running softmax of a tile of rows (Milakov and Gimelshein 2018): its state, one step, its end.

Scores come in units of log2. row_max and row_sum are float32 [BLOCK_M]; a row that has seen nothing has row_max -inf.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

LN2 = tl.constexpr(0.6931471805599453)
LOG2E = tl.constexpr(1.4426950408889634)


class Normalizer(NamedTuple):
    """The jit functions of one normaliser."""

    start: Any
    step: Any
    finish: Any
    weights: Any


@triton.jit
def _softmax_start(BLOCK_M: tl.constexpr):
    return tl.full([BLOCK_M], float("-inf"), tl.float32), tl.zeros([BLOCK_M], tl.float32)


@triton.jit
def _softmax_step(scores, row_max, row_sum):
    """scores [BLOCK_M, BLOCK_N] -> unnormalised weights, the factor for what was accumulated before, the new state."""
    new_max = tl.maximum(row_max, tl.max(scores, 1))
    # Where nothing has been seen yet, subtracting 0 instead of -inf leaves exp2(-inf) = 0.
    reference = tl.where(new_max == float("-inf"), 0.0, new_max)
    weights = tl.exp2(scores - reference[:, None])
    rescale = tl.exp2(row_max - reference)
    return weights, rescale, new_max, row_sum * rescale + tl.sum(weights, 1)


@triton.jit
def _softmax_finish(row_max, row_sum):
    """What to divide the accumulated sum by, and lse (natural). A row that saw nothing: 1 and -inf."""
    nothing = row_sum == 0.0
    divisor = tl.where(nothing, 1.0, row_sum)
    return divisor, tl.where(nothing, float("-inf"), (row_max + tl.log2(divisor)) * LN2)


@triton.jit
def _softmax_weights(scores, lse):
    """Normalised weights again, for the backward; lse broadcast to the scores. A row that saw nothing has weights 0."""
    return tl.exp2(scores - tl.where(lse == float("-inf"), float("inf"), lse * LOG2E))


NORMALIZERS = {"Softmax": Normalizer(_softmax_start, _softmax_step, _softmax_finish, _softmax_weights)}
"""By the normaliser's class name."""
