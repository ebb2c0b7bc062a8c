"""Two runs side by side: which rows became faster, which slower, and which cannot be told apart."""

from __future__ import annotations

import argparse
import statistics
import sys
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

from fastattn.bench.measure import env
from fastattn.bench.measure.ratios import Interval, unpaired
from fastattn.bench.measure.rows import Row, say_speedup, say_time
from fastattn.bench.options import Parser
from fastattn.bench.report import store, writers
from fastattn.bench.report.terminal import say_case

if TYPE_CHECKING:
    from rich.console import Console

OK, SLOWER, USAGE, NOTHING_COMMON = 0, 1, 2, 3
FASTER_WORD, SLOWER_WORD, SAME_WORD = "✓ faster", "✗ slower", "~ same"
STYLES = {FASTER_WORD: "green", SLOWER_WORD: "bold red", SAME_WORD: "dim"}
MACHINE = ("gpu", "cpu", "threads")


@dataclass(frozen=True)
class Change:
    """One row in both runs. `ratio`: how many times faster the second one is, with its 95% interval."""

    before: Row
    after: Row
    ratio: float
    interval: Interval | None
    threshold: float

    @property
    def word(self) -> str:
        """Faster or slower only beyond the threshold, and only where the interval agrees."""
        if self.interval is None or self.interval.tie:
            return SAME_WORD
        if self.ratio > 1 + self.threshold:
            return FASTER_WORD
        return SLOWER_WORD if self.ratio < 1 / (1 + self.threshold) else SAME_WORD


def changes(before: list[Row], after: list[Row], threshold: float) -> list[Change]:
    """Rows that were timed in both, in the order of the second run."""
    earlier = {(row.name, row.device): row for row in before if row.timed}
    pairs = [(earlier[row.name, row.device], row) for row in after if row.timed and (row.name, row.device) in earlier]
    return [
        Change(old, new, old.median_ms / new.median_ms, unpaired(old.samples, new.samples), threshold)
        for old, new in pairs
    ]


def main(argv: list[str]) -> int:
    """`fastattn bench compare A B`: 0 well, 1 with --fail where a row is slower, 2 usage, 3 no row in common."""
    parser = Parser("fastattn bench compare", description="Hold one run against an earlier one.")
    parser.add_argument("before", metavar="A", help="a name given to --save, or a JSON file")
    parser.add_argument("after", metavar="B", help="likewise; figures say how many times faster B is than A")
    parser.add_argument(
        "--threshold", type=_share, default=0.05, metavar="SHARE", help="smaller changes are none (default 5%%)"
    )
    parser.add_argument("--fail", action="store_true", help="exit code 1 where a row became slower")
    given = parser.parse_args(argv)
    try:
        (before, old), (after, new) = (writers.read_json(store.find(word)) for word in (given.before, given.after))
    except ValueError as failure:
        print(f"fastattn bench compare: {failure}", file=sys.stderr)
        return USAGE
    from rich.console import Console

    console = Console(highlight=False, markup=False)
    found = changes(before, after, given.threshold)
    _print_heads(console, old, new)
    if not found:
        console.print("No row was timed in both runs; rows are held together by operation, sizes, mode and provider.")
        return NOTHING_COMMON
    _print_table(console, found)
    _print_rest(console, before, after)
    slower = [each for each in found if each.word == SLOWER_WORD]
    for each in slower:
        console.print(f"✗ {each.after.name}\n  again: {each.after.command}", style="red", soft_wrap=True)
    return SLOWER if slower and given.fail else OK


def _print_heads(console: Console, old: dict[str, Any], new: dict[str, Any]) -> None:
    for letter, block in (("A", old), ("B", new)):
        console.print(f"{letter}  {block['date'][:16].replace('T', ' ')} · {env.headline(block)}", soft_wrap=True)
    other = [name for name in MACHINE if old.get(name) != new.get(name)]
    if other:
        words = "; ".join(f"{name}: {old.get(name)} and {new.get(name)}" for name in other)
        console.print(f"These are two machines ({words}): the changes below are not the code's alone.", style="yellow")
    if old.get("busy") or new.get("busy"):
        console.print("A machine was busy in one of the runs; take both again before a verdict.", style="yellow")


COLUMNS = (("mode", -7), ("provider", -18), ("A", 8), ("B", 8), ("B is", 7), ("95% interval", 13))
"""Names and widths, negative ones left-aligned; with the word behind them they fit 80 columns."""


def _print_table(console: Console, found: list[Change]) -> None:
    """A block a case, a line a row."""
    from rich.text import Text

    for case, group in groupby(found, key=lambda each: each.after.case):
        console.print(Text(f"\n{case.op}  {say_case(case)}", style="bold cyan"), soft_wrap=True)
        console.print(Text("  " + _columns([name for name, _ in COLUMNS]), style="dim"))
        before = None
        for each in group:
            row, interval = each.after, each.interval
            cells = [
                "" if row.mode == before else row.mode,
                row.provider,
                say_time(each.before.median_ms),
                say_time(row.median_ms),
                say_speedup(each.ratio),
                "" if interval is None else f"{interval.low:.2f} to {interval.high:.2f}",
            ]
            console.print(Text.assemble(f"  {_columns(cells)}  ", (each.word, STYLES[each.word])))
            before = row.mode
    console.print()
    words = [each.word for each in found]
    counts = ", ".join(f"{words.count(word)} {word[2:]}" for word in STYLES)
    middle = say_speedup(statistics.geometric_mean(each.ratio for each in found))
    console.print(
        f"{counts}, of {len(found)} rows; on average (geometric) B is {middle} A's speed. A change counts beyond "
        f"{100 * found[0].threshold:g}%, where its interval leaves out 1.",
        style="bold",
    )


def _columns(cells: list[str]) -> str:
    sized = zip(cells, (width for _, width in COLUMNS), strict=True)
    return " ".join(f"{cell:<{-width}.{-width}}" if width < 0 else f"{cell:>{width}}" for cell, width in sized)


def _print_rest(console: Console, before: list[Row], after: list[Row]) -> None:
    """What only one of them timed."""
    names = [{row.name for row in rows if row.timed} for rows in (before, after)]
    for letter, only in (("A", names[0] - names[1]), ("B", names[1] - names[0])):
        if only:
            console.print(f"only in {letter}: {len(only)} rows, such as {min(only)}", style="yellow", soft_wrap=True)


def _share(text: str) -> float:
    """`5%` or `0.05`."""
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"a share such as 5% or 0.05 is needed, got {text!r}")
    return value
