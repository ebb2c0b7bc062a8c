"""How sure a ratio of two medians is: bootstrap intervals, and what counts as a tie."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

LEVEL = 0.95
RESAMPLES = 2000
LEAST_SAMPLES = 3
"""Fewer say nothing about their spread."""


class Interval(NamedTuple):
    """Bounds that hold a ratio in `LEVEL` of all repetitions."""

    low: float
    high: float

    @property
    def tie(self) -> bool:
        """Neither is shown to be the faster one."""
        return self.low <= 1.0 <= self.high


def paired(base_ms: list[float], mine_ms: list[float]) -> Interval | None:
    """Interval of median(base) / median(mine), samples paired by round: what slowed a round, slowed both.

    Rounds that only one of the two took part in are left out. None below `LEAST_SAMPLES` rounds.
    """
    count = min(len(base_ms), len(mine_ms))
    if count < LEAST_SAMPLES:
        return None
    drawn = _draw(count, 0)
    return _interval(_medians(base_ms[:count], drawn) / _medians(mine_ms[:count], drawn))


def unpaired(base_ms: list[float], mine_ms: list[float]) -> Interval | None:
    """The same for two runs that shared no round."""
    if min(len(base_ms), len(mine_ms)) < LEAST_SAMPLES:
        return None
    base = _medians(base_ms, _draw(len(base_ms), 0))
    return _interval(base / _medians(mine_ms, _draw(len(mine_ms), 1)))


def quotient(
    base_ms: list[float], mine_ms: list[float], other_base_ms: list[float], other_mine_ms: list[float]
) -> Interval | None:
    """The same for the ratio of two such ratios, each paired by its own rounds."""
    sides = [(base_ms, mine_ms), (other_base_ms, other_mine_ms)]
    counts = [min(map(len, side)) for side in sides]
    if min(counts) < LEAST_SAMPLES:
        return None
    ratios = [
        _medians(base[:count], drawn) / _medians(mine[:count], drawn)
        for (base, mine), count, drawn in zip(sides, counts, map(_draw, counts, (0, 1)), strict=True)
    ]
    return _interval(ratios[0] / ratios[1])


def _draw(count: int, seed: int) -> Tensor:
    """Indices of `RESAMPLES` samples with replacement; the same ones each time, so that a file is read one way."""
    return torch.randint(count, (RESAMPLES, count), generator=torch.Generator().manual_seed(seed))


def _medians(samples_ms: list[float], drawn: Tensor) -> Tensor:
    return torch.tensor(samples_ms, dtype=torch.float64)[drawn].quantile(0.5, dim=1)


def _interval(ratios: Tensor) -> Interval:
    tail = (1 - LEVEL) / 2
    low, high = ratios.quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return Interval(low, high)
