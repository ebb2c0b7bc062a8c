"""What each element of a result may be off by, whoever computed it: the tolerance for single elements.

An element is a sum over pairs of a query and a key. Of each absolute term it is allowed TERM float32 eps for sums and
products, two roundings to a half dtype (of the weight or the gradient of the score before its second product, and of
out in the row sums of d_out * out), and what its weight may be off by: SCORE float32 eps times the largest score of the
row, itself a sum of absolute terms. That last part makes large scores coarse, and a row whose only key has the weight 1
whatever its score gets nothing of it. What is too small for a normal float, or nearly, may be 0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

FLOAT = torch.finfo(torch.float32)
EPS = FLOAT.eps
TERM, SCORE = 16, 4
LARGE = 64
"""Scores below it are no reason why a tensor errs more than its baseline."""
LOST = 0.5
"""Weights less sure than this may be any."""


class Pairs(NamedTuple):
    """A problem by query heads: what all its results are sums of. Hidden rows and columns are 0."""

    query: Tensor  # [batch, num_heads, q_len, head_dim], and so on
    key: Tensor
    value: Tensor
    d_out: Tensor
    d_lse: Tensor  # [batch, num_heads, q_len, 1]
    keep: Tensor  # [batch, num_heads, q_len, kv_len], bool
    size: Tensor  # of the scores: sums of absolute terms, bias included
    weights: Tensor  # before dropout
    alone: Tensor  # without the sink
    kept: Tensor  # what dropout multiplies by
    slope: Tensor  # d t / d (scale * product)
    sink_share: Tensor | None  # of the weights [batch, num_heads, q_len, 1]
    sink_size: Tensor | None  # [num_heads, 1, 1]


class Bounds(NamedTuple):
    """`each`: the largest error of an element, but for the rounding of the result itself. `coarse`: the part of it that
    comes of scores above LARGE, which are rounded by chance.
    """

    each: dict[str, Tensor]
    coarse: dict[str, Tensor]


def bounds(
    pairs: Pairs, scale: float, dtype: torch.dtype, by_kv_head: Callable[[Tensor], Tensor], bias: Tensor | None
) -> Bounds:
    """Of every result; by_kv_head sums over the query heads of a key head."""
    info = torch.finfo(dtype)
    half = info.eps if info.bits == 16 else 0.0
    tiny = max(TERM * FLOAT.smallest_normal, info.smallest_normal * half)
    largest = pairs.size.amax(-1, keepdim=True) if pairs.size.shape[-1] else pairs.size.sum(-1, keepdim=True)
    if pairs.sink_size is not None:
        largest = largest + pairs.sink_size.abs()
    unsure = EPS * largest
    if pairs.sink_size is None:
        unsure = torch.where(pairs.keep.sum(-1, keepdim=True) > 1, unsure, 0.0)
    lost = SCORE * unsure > LOST
    sums = _Sums(pairs, lost, abs(scale), by_kv_head, bias)
    each = sums.of(torch.where(lost, 2.0, TERM * EPS + 2 * half + SCORE * unsure), TERM * EPS, tiny)
    coarse = sums.of(torch.where(lost, 2.0, unsure * (largest > LARGE)), 0.0, 0.0)
    each["lse"] = TERM * EPS * (1 + largest).squeeze(-1)
    coarse["lse"] = 0.0 * each["lse"]
    return Bounds(each, coarse)


class _Sums(NamedTuple):
    """The absolute terms of every result but lse."""

    pairs: Pairs
    lost: Tensor
    scale: float
    by_kv_head: Callable[[Tensor], Tensor]
    bias: Tensor | None

    def of(self, off: Tensor, slope: float, tiny: float) -> dict[str, Tensor]:
        """Each term times `off` [batch, num_heads, q_len, 1], the soft cap's slope `slope` off, and `tiny` more."""
        pairs, lost = self.pairs, self.lost
        weights, alone = (torch.where(lost & pairs.keep, 1.0, each) for each in (pairs.weights, pairs.alone))
        of_weight = weights * pairs.kept * off + tiny * pairs.keep
        dp = pairs.d_out.abs() @ pairs.value.mT.abs() * pairs.kept
        p_dp_rowsum = (weights * dp).sum(-1, keepdim=True)
        of_t = weights * (dp + p_dp_rowsum) + alone * pairs.d_lse.abs()
        tiny_t = tiny * pairs.keep * (1 + dp + p_dp_rowsum)
        of_score = self.scale * (of_t * (pairs.slope.abs() * off + slope) + tiny_t)
        found = {
            "out": of_weight @ pairs.value.abs(),
            "dq": of_score @ pairs.key.abs(),
            "dk": self.by_kv_head(of_score.mT @ pairs.query.abs()),
            "dv": self.by_kv_head(of_weight.mT @ pairs.d_out.abs()),
        }
        if self.bias is not None:
            found["dbias"] = (of_t * off + tiny_t).sum_to_size(self.bias.shape)
        if pairs.sink_share is not None:
            share = torch.where(lost, 1.0, pairs.sink_share)
            found["dsinks"] = ((share * off + tiny) * p_dp_rowsum).sum((0, 2, 3))
        return found
