"""fastattn against each of the others in a run: a line a pair with the ratio of medians and its 95% interval, then what
two cells say together. The tables of docs that are marked `as=ratios`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from itertools import groupby
from typing import Any

from fastattn.bench.cases.operations import WINDOWED
from fastattn.bench.measure.ratios import Interval, Samples, Speedup, paired, quotient, speedup, unpaired
from fastattn.bench.measure.rows import Row, rate_unit, say_speedup, say_time, three
from fastattn.bench.report.terminal import say_case

OURS = "fastattn"
HEAD = ("operation", "case", "mode", "fastattn", "against", "its time", "ratio", "95% interval")
ALIGN = "|---|---|---|--:|---|--:|--:|--:|"
SUSTAINED = "under sustained load"
READS = "read"
"""A provider that only reads: its lines tell bytes a second."""


def markdown(rows: list[Row]) -> list[str]:
    """The table, and below it a line for each pair of cells that belong together."""
    sustained = any(row.sustained_ms for row in rows)
    head = (*HEAD, SUSTAINED) if sustained else HEAD
    lines = ["| " + " | ".join(head) + " |", ALIGN + "--:|" * sustained]
    lines += [_line(pair, sustained) for pair in pairs(rows)]
    more = [*_growth(rows), *_half(rows)]
    return [*lines, "", *[f"- {each}" for each in more]] if more else lines


def ceilings(environment: dict[str, Any]) -> list[str]:
    """What the machine can do, where that was measured: its products, its copies."""
    measured = environment.get("ceilings")
    if not measured:
        return []
    unit, scale = rate_unit(environment["device"])
    rates = [f"{dtype} {three(scale * rate)}" for dtype, rate in measured["tflops"].items()]
    parts = [
        f"torch's matrix product, all threads: {', '.join(rates)} {unit}" if rates else "",
        f"copies: {three(measured['gb_per_s'])} GB/s",
    ]
    return ["", "Ceilings of the machine in the same run: " + "; ".join(filter(None, parts)) + "."]


@dataclasses.dataclass(frozen=True)
class Pair:
    """fastattn's row and another one's of the same cell, timed in the same rounds; `other` None: it was alone."""

    ours: Row
    other: Row | None

    @property
    def ratio(self) -> float | None:
        """How many times faster fastattn is; None where one of the two has no time."""
        if self.other is None or not self.ours.timed or not self.other.timed:
            return None
        return self.other.median_ms / self.ours.median_ms

    @property
    def interval(self) -> Interval | None:
        return None if self.ratio is None else paired(*self.samples)

    @property
    def samples(self) -> tuple[Samples, Samples]:
        """The other's first, as of a base."""
        return (self.other or self.ours).samples, self.ours.samples

    @property
    def sustained(self) -> Speedup | None:
        """The same under sustained load, where both were measured so."""
        if self.other is None or not self.other.sustained_ms or not self.ours.sustained_ms:
            return None
        return speedup(Samples(self.other.sustained_ms), Samples(self.ours.sustained_ms))


def pairs(rows: list[Row]) -> Iterator[Pair]:
    """In the order of the rows, each cell's others one after the other."""
    for _, group in groupby(rows, key=lambda row: (row.case, row.mode)):
        of_cell = list(group)
        for ours in of_cell:
            if ours.provider == OURS:
                others: list[Row | None] = [row for row in of_cell if not row.ours]
                yield from (Pair(ours, other) for other in others or [None])


def _line(pair: Pair, sustained: bool) -> str:
    case, other = pair.ours.case, pair.other
    rate = other is not None and other.provider == READS
    cells = [case.op, say_case(case), pair.ours.mode, _say_row(pair.ours, rate), "", "", "", ""]
    if other is not None:
        cells[4:6] = [other.provider, _say_row(other, rate)]
    if pair.ratio is not None:
        cells[6:] = [say_speedup(pair.ratio), _say_interval(pair.interval)]
    if sustained:
        cells.append(_say_sustained(pair.sustained))
    return "| " + " | ".join(cells) + " |"


def _say_row(row: Row, rate: bool) -> str:
    if not row.timed:
        return ("✗ " if row.wrong else "") + (row.reason or "not timed")
    bandwidth = f" ({three((row.least_bytes or 0) / (row.median_ms * 1e6))} GB/s)" if rate else ""
    return say_time(row.median_ms) + bandwidth + (" (coarse)" if row.coarse else "")


def _say_sustained(found: Speedup | None) -> str:
    if found is None:
        return ""
    interval = None if found.low is None or found.high is None else Interval(found.low, found.high)
    return say_speedup(found.ratio) + (f" ({_say_interval(interval)})" if interval is not None else "")


def _say_interval(interval: Interval | None) -> str:
    return "" if interval is None else f"{three(interval.low)} to {three(interval.high)}" + ", tie" * interval.tie


def _growth(rows: list[Row]) -> Iterator[str]:
    """A window's time over its length, shortest to longest."""
    families: dict[tuple, list[Row]] = {}
    for row in rows:
        if row.provider == OURS and row.timed and row.case.op in WINDOWED:
            family = dataclasses.replace(row.case, q_len=0, kv_len=0)
            families.setdefault((family, row.mode), []).append(row)
    for (_, mode), found in families.items():
        short, long = min(found, key=_length), max(found, key=_length)
        if _length(short) < _length(long):
            ratio, more = long.median_ms / short.median_ms, _length(long) / _length(short)
            interval = _say_interval(unpaired(long.samples, short.samples))
            of_short = f"the time of {_length(short)} tokens ({interval}), for {more:g}x as many"
            yield f"{long.case.op} {say_case(long.case)} {mode}: {say_speedup(ratio)} {of_short}"


def _half(rows: list[Row]) -> Iterator[str]:
    """What padding gains beyond the same sizes without it: the ratio of two ratios."""
    found = {(pair.ours.case, pair.ours.mode, pair.other.provider): pair for pair in pairs(rows) if pair.other}
    for (case, mode, name), pair in found.items():
        bare = found.get((dataclasses.replace(case, op="self"), mode, name))
        if case.op == "masked" and pair.ratio is not None and bare is not None and bare.ratio is not None:
            interval = _say_interval(quotient(pair.samples, bare.samples))
            times = say_speedup(pair.ratio / bare.ratio)
            yield f"masked {say_case(case)} {mode}: {times} the ratio to {name} without padding ({interval})"


def _length(row: Row) -> int:
    return row.case.kv_len
