"""How sure a ratio of two medians is: bootstrap intervals, and what counts as a tie."""

from __future__ import annotations

import statistics
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


class Samples(NamedTuple):
    """Milliseconds in the order they were taken; those of one round, so many at a time, shared what slowed it."""

    ms: list[float]
    per_round: int = 1

    @property
    def rounds(self) -> int:
        return len(self.ms) // self.per_round


class Speedup(NamedTuple):
    """How many times faster the second of two is, by medians, and that ratio's interval where there is one."""

    ratio: float
    low: float | None
    high: float | None


def speedup(base: Samples, mine: Samples) -> Speedup:
    """Of `mine` over `base`, timed in the same rounds."""
    low, high = paired(base, mine) or (None, None)
    return Speedup(statistics.median(base.ms) / statistics.median(mine.ms), low, high)


def paired(base: Samples, mine: Samples) -> Interval | None:
    """Interval of median(base) / median(mine), drawn by rounds: what slowed a round, slowed both.

    Rounds that only one of the two took part in are left out. None below `LEAST_SAMPLES` rounds.
    """
    return _between([(base, mine)])


def quotient(pair: tuple[Samples, Samples], other: tuple[Samples, Samples]) -> Interval | None:
    """The same for the ratio of two such ratios, which shared no round."""
    return _between([pair, other])


def unpaired(base: Samples, mine: Samples) -> Interval | None:
    """The same for two runs that shared no round."""
    if min(base.rounds, mine.rounds) < LEAST_SAMPLES:
        return None
    medians = [_medians(each, _draw(each.rounds, seed)) for seed, each in enumerate((base, mine))]
    return _interval(medians[0] / medians[1])


def _between(pairs: list[tuple[Samples, Samples]]) -> Interval | None:
    ratios = []
    for seed, (base, mine) in enumerate(pairs):
        count = min(base.rounds, mine.rounds)
        if count < LEAST_SAMPLES:
            return None
        drawn = _draw(count, seed)
        ratios.append(_medians(base, drawn) / _medians(mine, drawn))
    return _interval(ratios[0] if len(ratios) == 1 else ratios[0] / ratios[1])


def _draw(count: int, seed: int) -> Tensor:
    """`RESAMPLES` times as many rounds, with replacement; the same ones each time, so that a file is read one way."""
    return torch.randint(count, (RESAMPLES, count), generator=torch.Generator().manual_seed(seed))


def _medians(samples: Samples, drawn: Tensor) -> Tensor:
    """The median over all samples of the rounds in each draw."""
    whole = torch.tensor(samples.ms[: samples.rounds * samples.per_round], dtype=torch.float64)
    return whole.view(samples.rounds, samples.per_round)[drawn].flatten(1).quantile(0.5, dim=1)


def _interval(ratios: Tensor) -> Interval:
    tail = (1 - LEVEL) / 2
    low, high = ratios.quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return Interval(low, high)
