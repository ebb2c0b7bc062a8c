"""The online softmax of a tile of rows (Milakov and Gimelshein 2018): its state, one step, its end.

Scores times `factor`, which is positive, are in units of log2: the factor meets the running maximum before it is
subtracted, so that one multiply-add an element prepares its exponential. row_max (in the scores' units) and row_sum
are float32 [BLOCK_M]; a row that has seen nothing has row_max -inf. A sink is one more logit in the denominator
(scores.Softmax): natural, a scalar or one a row, None where there is none.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

LN2 = tl.constexpr(0.6931471805599453)
LOG2E = tl.constexpr(1.4426950408889634)
LARGEST = tl.constexpr(3.4028234e38)  # of float32


class Normalizer(NamedTuple):
    """The jit functions of one normaliser."""

    begin: Any
    step: Any
    finish: Any
    total: Any
    weights: Any
    left: Any


@triton.jit
def _softmax_begin(BLOCK_M: tl.constexpr):
    return tl.full([BLOCK_M], float("-inf"), tl.float32), tl.zeros([BLOCK_M], tl.float32)


@triton.jit
def _softmax_step(scores, factor, row_max, row_sum):
    """scores [BLOCK_M, BLOCK_N] -> unnormalised weights, the factor for what was accumulated before, the new state."""
    new_max = tl.maximum(row_max, tl.max(scores, 1))
    log2_max = new_max * factor
    # Where nothing has been seen yet, subtracting 0 instead of -inf leaves exp2(-inf) = 0.
    reference = tl.where(log2_max == float("-inf"), 0.0, log2_max)
    weights = tl.exp2(scores * factor - reference[:, None])
    rescale = tl.exp2(row_max * factor - reference)
    return weights, rescale, new_max, row_sum * rescale + tl.sum(weights, 1)


@triton.jit
def _softmax_finish(factor, row_max, row_sum, sink):
    """What to divide the accumulated sum by, and lse (natural, without the sink). Where nothing was seen: 1, -inf;
    where a score overflowed: NaN, inf.
    """
    log2_max = row_max * factor
    overflows = log2_max == float("inf")
    nothing = (row_sum == 0.0) & ~overflows
    lse = (log2_max + tl.log2(tl.where(nothing, 1.0, row_sum))) * LN2
    divisor = row_sum
    if sink is not None:
        divisor += tl.exp2(sink * LOG2E - log2_max)
    return _of_a_row(nothing, overflows, divisor, lse)


@triton.jit
def _of_a_row(nothing, overflows, divisor, lse):
    divisor = tl.where(overflows, float("nan"), tl.where(nothing, 1.0, divisor))
    return divisor, tl.where(overflows, float("inf"), tl.where(nothing, float("-inf"), lse))


@triton.jit
def _softmax_total(lse):
    """The log2 of a row's visible sum, which turns scores into weights; inf where it saw nothing: weights 0; NaN where
    a score overflowed.
    """
    return _known_total(lse) * LOG2E


@triton.jit
def _known_total(lse):
    return tl.where(lse == float("-inf"), float("inf"), tl.where(lse == float("inf"), float("nan"), lse))


@triton.jit
def _softmax_weights(scores, factor, total):
    """Weights without the sink again, for the backward; `total` broadcast to the scores."""
    return tl.exp2(scores * factor - total)


@triton.jit
def _softmax_left(total, sink):
    """What a sink leaves of a row's weights, and what it takes: they add up to 1, and neither is a difference. total is
    inf where a row saw nothing, a sink never.
    """
    sink = tl.minimum(sink * LOG2E, LARGEST)
    return 1.0 / (1.0 + tl.exp2(sink - total)), 1.0 / (1.0 + tl.exp2(total - sink))


# The same for scores in natural units, whose factor is LOG2E, and that may be of any size (a bias of -1e30 for
# padding): the maximum is subtracted before the factor is met, so that the largest score weighs exactly 1. A
# multiply-add of such sizes would leave the product's rounding error, and nothing here may overflow on the way.


@triton.jit
def _natural_step(scores, factor, row_max, row_sum):
    new_max = tl.maximum(row_max, tl.max(scores, 1))
    reference = tl.where(new_max == float("-inf"), 0.0, new_max)
    weights = tl.exp2((scores - reference[:, None]) * factor)
    rescale = tl.exp2((row_max - reference) * factor)
    return weights, rescale, new_max, row_sum * rescale + tl.sum(weights, 1)


@triton.jit
def _natural_finish(factor, row_max, row_sum, sink):
    nothing = row_sum == 0.0
    lse = row_max + tl.log2(tl.where(nothing, 1.0, row_sum)) * LN2
    divisor = row_sum
    if sink is not None:
        divisor += tl.exp2((sink - row_max) * factor)
    return _of_a_row(nothing, row_max == float("inf"), divisor, lse)


@triton.jit
def _natural_total(lse):
    return _known_total(lse)


@triton.jit
def _natural_weights(scores, factor, total):
    """At most 1, though a large total has lost the count of what it sums; NaN where the total is."""
    return tl.exp2(tl.minimum((scores - total) * factor, 0.0, propagate_nan=tl.PropagateNan.ALL))


@triton.jit
def _natural_left(total, sink):
    above = (total - tl.minimum(sink, LARGEST)) * LOG2E
    return 1.0 / (1.0 + tl.exp2(-above)), 1.0 / (1.0 + tl.exp2(above))


NORMALIZERS = {
    "Softmax": Normalizer(
        _softmax_begin, _softmax_step, _softmax_finish, _softmax_total, _softmax_weights, _softmax_left
    ),
    "SoftmaxNatural": Normalizer(
        _softmax_begin, _natural_step, _natural_finish, _natural_total, _natural_weights, _natural_left
    ),
}
"""By the normaliser's name; scores of any size have their own rule."""
"""By the normaliser's class name."""
