"""How time grows with length: the exponent of a power law through the medians of otherwise equal cases."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass

from fastattn.bench.cases.operations import BenchCase
from fastattn.bench.measure.rows import Row

AXES = ("kv_len", "q_len", "window")
"""What may change along a line; all else of a case is equal."""

SPLITS: tuple[tuple[str, ...], ...] = ((), ("window",), ("q_len",), ("window", "q_len"))
"""What is held equal too, the first that gives each line one case a length: a default window, a share of the length,
moves with it, while of several windows each has a line of its own."""


def families(cases: Iterable[BenchCase]) -> dict[BenchCase, BenchCase]:
    """For each case the line that it belongs to, named by its shortest case."""
    alike: dict[tuple, list[BenchCase]] = {}
    for case in dict.fromkeys(cases):
        rest = tuple(value for name, value in dataclasses.asdict(case).items() if name not in AXES)
        alike.setdefault(rest, []).append(case)
    found = {}
    for of_line in alike.values():
        for held in SPLITS:
            lines: dict[tuple, list[BenchCase]] = {}
            for case in of_line:
                lines.setdefault(tuple(getattr(case, name) for name in held), []).append(case)
            if all(len({case.kv_len for case in line}) == len(line) for line in lines.values()):
                break
        for line in lines.values():
            found |= dict.fromkeys(line, min(line, key=lambda case: case.kv_len))
    return found


def say_family(cases: Iterable[BenchCase]) -> str:
    """Sizes that a line's cases share, such as `fp32  B1 H8 D64 W128`."""
    words = [case.sizes.split("-") for case in cases]
    shared = [word for word in words[0] if all(word in others for others in words)]
    return f"{next(iter(cases)).dtype}  {' '.join(shared)}"


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
    timed = [row for row in rows if row.timed]
    line_of = families(row.case for row in timed)
    lines: dict[tuple, dict[int, Row]] = {}
    for row in timed:
        lines.setdefault((line_of[row.case], row.mode, row.provider), {})[row.case.kv_len] = row
    found = []
    for (first, mode, provider), by_length in lines.items():
        if len(by_length) > 1:
            lengths = sorted(by_length)
            name = f"{first.op}/{say_family([row.case for row in by_length.values()]).replace('  ', '/')}"
            times = [by_length[length].median_ms for length in lengths]
            found.append(Growth(name.replace(" ", "-"), mode, provider, lengths, _slope(lengths, times)))
    return found


def _slope(lengths: list[int], times: list[float]) -> float:
    """Least squares through the logarithms."""
    across, up = [math.log(each) for each in lengths], [math.log(each) for each in times]
    middle, level = sum(across) / len(across), sum(up) / len(up)
    above = sum((x - middle) * (y - level) for x, y in zip(across, up, strict=True))
    return above / sum((x - middle) ** 2 for x in across)
