"""Score rules of the Triton room: raw score -> value, and its derivative.

A score works on the raw product <q, k> in float32; its value is in units of log2, so that exp2 of it is the weight.
    score(raw, scale_log2)    t * log2(e)
    slope(raw, scale)         dt / d raw
Normalisers are in online.py.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl  # noqa: F401  (the interpreter wants it in every module with jit functions)


class Score(NamedTuple):
    """The jit functions of one score."""

    score: Any
    slope: Any


@triton.jit
def _dot_product_score(raw, scale_log2):
    return raw * scale_log2


@triton.jit
def _dot_product_slope(raw, scale):
    return scale


SCORES = {"DotProduct": Score(_dot_product_score, _dot_product_slope)}
"""By the score's class name."""
