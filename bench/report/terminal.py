"""What people read: the table on the terminal."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from itertools import groupby
from typing import TYPE_CHECKING, Any

from fastattn.bench.cases.operations import OPS, BenchCase
from fastattn.bench.measure import env
from fastattn.bench.measure.rows import (
    Row,
    rate_unit,
    say_bytes,
    say_error,
    say_rate,
    say_speedup,
    say_time,
    say_warnings,
)
from fastattn.bench.report.growth import growth

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

NARROW = 100
"""Below this many columns the spread of the times is left out, so that 80 are enough."""

RATIO = 8
"""Columns of the ratio to the baseline; a longer name stands in the legend alone."""

NOISY = 0.1
"""An interquartile range above this share of the median is shown in yellow."""


def table_header(console: Console, environment: dict[str, Any]) -> None:
    console.print(env.headline(environment), style="bold")
    busy = env.say_busy(environment)
    if busy:
        console.print(busy, style="yellow")


def print_case(console: Console, rows: list[Row], *, first_of_op: bool) -> None:
    """The block of one case: a title, then a line for each provider, by mode."""
    from rich.text import Text

    case, baseline = rows[0].case, rows[0].baseline
    sustained = any(row.sustained_ms for row in rows)
    columns = _columns(console.width, baseline, rate_unit(rows[0].device)[0], sustained)
    if first_of_op:
        console.print()
        console.rule(Text.assemble((f" {case.op} ", "bold cyan"), (f"{OPS[case.op].says} ", "dim")), align="left")
    title = Text(f"{say_case(case):<{columns[0][1] + columns[1][1] + 1}}", style="bold")
    for name, width, _ in columns[2:]:
        title.append(f" {name:>{width}}" if width else f"  {name}", style="dim")
    console.print(title, no_wrap=True, crop=True)
    for mode, of_mode in groupby(rows, key=lambda row: row.mode):
        for index, row in enumerate(of_mode):
            console.print(_line(row, mode if index == 0 else "", columns), no_wrap=not row.reason)


def print_legend(console: Console, rows: list[Row]) -> None:
    """How to read the table, in as few lines as it takes."""
    baseline = rows[0].baseline
    against = f"vs {baseline}: how many times faster than {baseline}; ≈ a tie, its 95% interval spans 1. "
    against = against if baseline else ""
    unit, _ = rate_unit(rows[0].device)
    console.print()
    _print_growth(console, rows)
    _print_tiny(console, rows)
    _print_overhead(console, rows)
    _print_warnings(console, rows)
    sustained = (
        "Sustained: the same ratio with the calls of all queued one behind the other, without pauses and cold caches. "
        if any(row.sustained_ms for row in rows)
        else ""
    )
    console.print(
        f"Time: median. {against}{sustained}{unit}: on visible pairs alone. Memory: a call's peak beyond its inputs, "
        "mask tables included. Error: the worst against float64; ✓ within fastattn's tolerance"
        + (", ~ beyond them, but near." if any(row.coarse for row in rows) else "."),
        style="dim",
    )
    slow = [row for row in rows if row.provider == "fastattn" and row.label == "reference" and row.timed]
    if slow:
        console.print(
            "fastattn ran its `reference` backend, the plain definition in PyTorch: right everywhere, fast nowhere. "
            "`fastattn info` says which backends this machine can run.",
            style="yellow",
        )
    partly = [row for row in rows if row.heads_checked and row.heads_checked < row.case.batch * row.case.num_heads]
    if partly:
        fewest = min(row.heads_checked or 0 for row in partly)
        console.print(f"Large cases were checked on some of their heads, {fewest} at least.", style="dim")


def _print_growth(console: Console, rows: list[Row]) -> None:
    for (case, mode), group in groupby(growth(rows), key=lambda each: (each.case, each.mode)):
        lines = list(group)
        shown = ", ".join(f"{each.provider} {each.exponent:.2f}" for each in lines)
        lengths = f"{lines[0].lengths[0]} to {lines[0].lengths[-1]} keys"
        console.print(f"{case} {mode}, {lengths}: time grows with length to the power of {shown}", soft_wrap=True)


def _print_tiny(console: Console, rows: list[Row]) -> None:
    for row in rows:
        if row.host_ms is not None:
            graph = "no graph" if row.graph_ms is None else f"in a CUDA graph {say_time(row.graph_ms)}"
            console.print(f"{row.name}: waited for {say_time(row.host_ms)}, {graph}", soft_wrap=True)


def _print_overhead(console: Console, rows: list[Row]) -> None:
    found: dict[str, list[float]] = {}
    for row in rows:
        if row.overhead_us is not None and row.mode == "fwd":
            found.setdefault(row.provider, []).append(row.overhead_us)
    if found:
        shown = ", ".join(f"{name} {say_time(1e-3 * statistics.median(each))}" for name, each in found.items())
        console.print(f"Call overhead, forward on one query and one key: {shown}", soft_wrap=True)


def _print_warnings(console: Console, rows: list[Row]) -> None:
    for each in say_warnings(rows):
        console.print(each, style="yellow", soft_wrap=True)


def say_case(case: BenchCase) -> str:
    return f"{case.dtype}  {case.sizes.replace('-', ' ')}"


def _columns(width: int, baseline: str | None, unit: str, sustained: bool) -> list[tuple[str, int, str]]:
    """Name, width and meaning of each column; the last takes what is left.

    The ratio under sustained load stands beside the usual one where there are figures; on a narrow terminal in the
    place of the memory.
    """
    against = f"vs {baseline}"
    columns = [
        ("mode", 10, "mode"),
        ("provider", 24 if width >= NARROW else 20, "who"),
        ("time", 8, "time"),
        ("IQR", 5, "spread"),
        (against if baseline and len(against) <= RATIO else "speed-up", RATIO, "speedup"),
        ("sustained", 9, "sustained"),
        (unit, 8, "rate"),
        ("memory", 9, "memory"),
        ("error", 0, "error"),
    ]
    left_out = set() if sustained else {"sustained"}
    if width < NARROW:
        left_out |= {"spread", "memory"} if sustained else {"spread"}
    return [column for column in columns if column[2] not in left_out]


def _line(row: Row, mode: str, columns: list[tuple[str, int, str]]) -> Text:
    from rich.text import Text

    line = Text(f"  {mode:<{columns[0][1] - 2}}", style="bold")
    label = row.who
    if row.compile_s is not None:
        label += f" +{row.compile_s:.{0 if row.compile_s >= 1 else 1}f} s compile"
    line.append(f" {label:<{columns[1][1]}.{columns[1][1]}}", style="" if row.ours else "dim")
    if not row.timed:
        mark = " ✗ " if row.wrong else " "
        style = "bold red" if row.failed else "red" if row.wrong else "italic dim"
        line.append(f"{mark}{row.reason or 'not timed'}", style=style)
        return line
    for _, width, what in columns[2:]:
        text, style = _cell(row, what)
        line.append(f" {text:>{width}}" if width else f"  {text}", style=style)
    return line


def _cell(row: Row, what: str) -> tuple[str, str]:
    """A figure and its colour."""
    if what == "time":
        return say_time(row.median_ms), "bold"
    if what == "spread":
        return f"{100 * row.spread:.0f}%", "yellow" if row.spread > NOISY else "dim"
    if what == "speedup":
        return _ratio_cell(row, row.speedup, row.tie)
    if what == "sustained":
        return _ratio_cell(row, row.sustained_speedup, row.sustained_tie)
    if what == "rate":
        return say_rate(row), ""
    if what == "memory":
        return say_bytes(row.peak_bytes), ""
    style = "green" if row.correct else "dim" if row.correct is None else "yellow" if row.coarse else "bold red"
    return say_error(row), style


def _ratio_cell(row: Row, ratio: float | None, tie: bool) -> tuple[str, str]:
    if ratio is None:
        return "-", "dim"
    style = "dim" if row.provider == row.baseline else "" if tie else "green" if ratio > 1 else "red"
    return "≈" * tie + say_speedup(ratio), style


def by_op(rows: Iterable[Row]) -> dict[str, list[Row]]:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.case.op, []).append(row)
    return groups
