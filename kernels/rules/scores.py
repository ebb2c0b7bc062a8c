"""Score rules of the Triton backend: raw score -> value, and its derivative.

A score works on the raw product <q, k> in float32. `factor` turns its values into units of log2:

    score(raw, scales)    t / log2(e) / factor              in units of its own
    slope(raw, scales)    dt / d raw / scale                where it is not 1

Then the bias is added and what nobody sees is hidden. Normalisers are in softmax.py.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from fastattn.kernels.opaque_int import stride
from fastattn.kernels.rules.masks import keep
from fastattn.kernels.rules.softmax import LOG2E

LARGEST_SCALE = 64.0
"""Above it scores are so large that their rounding, met before the maximum is subtracted, would show in the weights."""


class Scales(NamedTuple):
    """The numbers of a launch: the score's unit in log2, the scale, the soft cap, and dropout's threshold and gain."""

    factor: Any
    scale: Any
    softcap: Any
    threshold: Any  # see dropout.threshold_of
    gain: Any  # 1 / (1 - p)


class Score(NamedTuple):
    """The jit functions of one score; `slope` is None where it is 1."""

    score: Any
    slope: Any


@triton.jit
def _raw_score(raw, scales):
    return raw


@triton.jit
def _scaled_score(raw, scales):
    return raw * scales.scale


@triton.jit
def _capped_score(raw, scales):
    return scales.softcap * _tanh(raw * (scales.scale / scales.softcap))


@triton.jit
def _capped_slope(raw, scales):
    tanh = _tanh(raw * (scales.scale / scales.softcap))
    return 1.0 - tanh * tanh


@triton.jit
def _tanh(x):
    """By its series near 0, where a quotient of exponentials cancels; the two meet at 1/4, 2e-8 apart."""
    square = x * x
    near = x * (1.0 - square * (1.0 / 3 - square * (2.0 / 15 - square * (17.0 / 315 - square * (62.0 / 2835)))))
    small = tl.exp2(tl.abs(x) * (-2 * LOG2E))
    far = (1.0 - small) / (1.0 + small)
    return tl.where(square < 0.0625, near, tl.where(x < 0, -far, far))


SCORES = {
    "raw": Score(_raw_score, None),
    "scaled": Score(_scaled_score, None),
    "capped": Score(_capped_score, _capped_slope),
}
"""By what is done to a raw product: nothing (its scale is in the factor), scaled, scaled and soft-capped."""


def score_of(spec: Any) -> tuple[str, float]:
    """The rule for a spec, and its factor: a running maximum needs a positive one, a bias and scores of any size the
    natural unit.
    """
    if spec.softcap is not None:
        return "capped", LOG2E.value
    if spec.bias_shape is not None or not 0 < spec.scale <= LARGEST_SCALE:
        return "scaled", LOG2E.value
    return "raw", spec.scale * LOG2E.value


@triton.jit
def score_tile(
    raw, scales, bias, bias_strides, batch, head, q_idx, kv_idx, numbers, VARIANT: tl.constexpr, CHECK: tl.constexpr
):
    """raw products of queries and keys, in either order -> scores, -inf where hidden, and what is kept.

    q_idx, kv_idx and head broadcast to the tile. VARIANT.BIAS says over which axes a bias varies: "" (none), "k", "q",
    "qk" or "1".
    """
    scores = VARIANT.score(raw, scales)
    kept = kv_idx >= 0
    if CHECK:
        kept = keep(VARIANT, q_idx, kv_idx, numbers)
    if VARIANT.BIAS != "":
        at = bias + batch.to(tl.int64) * stride(bias_strides, 0) + head.to(tl.int64) * stride(bias_strides, 1)
        inside = (q_idx < numbers[0][0]) & (kv_idx < numbers[0][1])
        if VARIANT.BIAS == "k":
            inside = kv_idx < numbers[0][1]
            at += kv_idx.to(tl.int64) * stride(bias_strides, 3)
        elif VARIANT.BIAS == "q":
            inside = q_idx < numbers[0][0]
            at += q_idx.to(tl.int64) * stride(bias_strides, 2)
        else:
            at += q_idx.to(tl.int64) * stride(bias_strides, 2) + kv_idx.to(tl.int64) * stride(bias_strides, 3)
        added = tl.load(at, mask=inside, other=float("-inf")).to(tl.float32)  # who is not there sees nobody
        kept = kept & (added != float("-inf"))
        scores += added
    if CHECK or VARIANT.BIAS != "":
        scores = tl.where(kept, scores, float("-inf"))
    return scores, kept
