"""How time grows with length: the exponent of a power law through the medians of otherwise equal cases."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass

from fastattn.bench.rows import Row

AXES = ("kv_len", "q_len", "window")
"""What may change along a line: all else of a case is equal. A default window, a share of the length, moves with it."""


@dataclass(frozen=True)
class Growth:
    """time ~ length ** exponent, over `lengths` (tokens)."""

    case: str
    mode: str
    provider: str
    lengths: list[int]
    exponent: float

    def record(self) -> dict:
        """Plain JSON types."""
        return dataclasses.asdict(self)


def growth(rows: Iterable[Row]) -> list[Growth]:
    """A line for each provider, mode and family of cases that ran at two lengths or more."""
    families: dict[tuple, dict[int, Row]] = {}
    for row in rows:
        if row.timed:
            sizes = tuple((name, value) for name, value in dataclasses.asdict(row.case).items() if name not in AXES)
            families.setdefault((sizes, row.mode, row.provider), {})[row.case.kv_len] = row
    found = []
    for (sizes, mode, provider), by_length in families.items():
        if len(by_length) > 1:
            lengths = sorted(by_length)
            case = by_length[lengths[0]].case
            name = f"{case.op}/{case.dtype}/B{case.batch}-H{case.num_heads}-D{dict(sizes)['head_dim']}"
            times = [by_length[length].median_ms for length in lengths]
            found.append(Growth(name, mode, provider, lengths, _slope(lengths, times)))
    return found


def _slope(lengths: list[int], times: list[float]) -> float:
    """Least squares through the logarithms."""
    across, up = [math.log(each) for each in lengths], [math.log(each) for each in times]
    middle, level = sum(across) / len(across), sum(up) / len(up)
    above = sum((x - middle) * (y - level) for x, y in zip(across, up, strict=True))
    return above / sum((x - middle) ** 2 for x in across)
