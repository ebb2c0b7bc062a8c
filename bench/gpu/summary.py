"""What `make gpu` says at its end, on one screen: failures first, ratios last."""

from __future__ import annotations

import statistics
from itertools import groupby
from typing import TYPE_CHECKING, Any

from fastattn.bench.measure.env import headline, say_busy
from fastattn.bench.measure.ratios import Samples, Speedup, speedup
from fastattn.bench.measure.rows import BACKEND_KEY, Row, rate_unit, say_rate, say_speedup, say_time
from fastattn.bench.report.terminal import say_case

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

MOST_FAILURES = 8
"""Of each kind; the file has all of them."""

MOST_CELLS = 16
"""Lines of ratios, the headline first; the average is over all."""

WORTH_PASTING = 1.02
"""Times the speed of the row in the table; less is noise."""

MARKS = {True: ("✓", "green"), False: ("✗", "bold red"), None: ("-", "yellow")}


def print_summary(console: Console, record: dict[str, Any]) -> None:
    """Failures, then the steps, then a line a cell."""
    console.print()
    console.print(headline(record["environment"]), style="bold")
    busy = say_busy(record["environment"])
    if busy:
        console.print(busy, style="yellow")
    _print_lines(console, failures(record), "✗", "red")
    again = [f"{each['name']} failed before: {_first(each['words'])}" for each in record.get("failed_before", [])]
    _print_lines(console, {"notes on others": notes(record), "failures before": again}, "·", "yellow")
    for name, step in record["steps"].items():
        mark, style = MARKS[step["ok"]]
        console.print(f"{mark} {name:<12} {step['seconds']:>5.0f} s  {step['words']}", style=style)
    rows = [Row.of(row) for row in record.get("rows", [])]
    if rows:
        _print_ratios(console, rows)
    if record.get("tune"):
        _print_tuned(console, record["tune"])
    left = sum(map(len, record.get("left", {}).values()))
    if left:
        console.print(f"not reached within the budget: {left} cells", style="yellow")


def failures(record: dict[str, Any]) -> dict[str, list[str]]:
    """What went wrong, by kind, a line each: first of all the backends whose smallest call failed."""
    smoke = {backend: each for backend, each in record.get("smoke", {}).items() if each["ok"] is False}
    tests = [item for step in record.get("tests", {}).values() for item in step["tests"].items()]
    files = [item for step in record.get("tests", {}).values() for item in step["collection"].items()]
    checks = [row for row in record.get("checks", []) if row["ok"] is False]
    rows = [row for row in map(Row.of, [*record.get("rows", []), *record.get("flex", [])]) if row.failed]
    crashed = [item for step in record.get("crashed", {}).values() for item in step.items()]
    return {
        "backends": [f"{backend}'s smallest call: {_first(each['words'])}" for backend, each in smoke.items()],
        "files": [f"{name}: {_last(each['words'])}" for name, each in files if each["outcome"] == "failed"],
        "checks": [f"{row[BACKEND_KEY]}, {row['case']}: {_first(row['words'])}" for row in checks],
        "results": list(dict.fromkeys(f"{row.name}: {row.reason}" for row in rows)),
        "crashes": [f"{name}: {_first(each['words'])}" for name, each in crashed],
        "tests": [
            ": ".join(filter(None, [name, _first(each["words"]), *each.get("stack", [])[:1]]))
            for name, each in tests
            if each["outcome"] not in ("passed", "skipped")
        ],
    }


def _first(words: str | None) -> str:
    return next((line.strip() for line in (words or "").splitlines() if line.strip()), "")


def _last(words: str) -> str:
    return _first("\n".join(reversed(words.splitlines())))


def notes(record: dict[str, Any]) -> list[str]:
    """What other libraries did wrong, a line each."""
    rows = [row for row in map(Row.of, record.get("rows", [])) if row.wrong and not row.ours]
    return [f"{row.name}: {row.reason}" for row in rows]


def _print_lines(console: Console, found: dict[str, list[str]], mark: str, style: str) -> None:
    for kind, lines in found.items():
        for line in lines[:MOST_FAILURES]:
            console.print(f"{mark} {line[:200]}", style=style)
        if len(lines) > MOST_FAILURES:
            console.print(f"  and {len(lines) - MOST_FAILURES} more {kind}", style=style)


def _print_ratios(console: Console, rows: list[Row]) -> None:
    """A line a cell: fastattn, the best of the others, and how many times faster fastattn is."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1), header_style="dim")
    table.add_column("cell", no_wrap=True)
    lasting = any(row.sustained_ms for row in rows)
    titles = ("backend", "time", rate_unit(rows[0].device)[0], "best other", "its time", "ratio")
    for title in (*titles, "sustained") if lasting else titles:
        table.add_column(title, justify="right" if title != "best other" else "left", no_wrap=True)
    ratios, more = [], 0
    for (case, mode), group in groupby(rows, key=lambda row: (row.case, row.mode)):
        ours, best = best_two(list(group))
        cells: list[str | Text] = [f"{case.op} {say_case(case)} {mode}"]
        if ours is None:
            cells += ["", "-"]
        else:
            cells += [ours.label, say_time(ours.median_ms), say_rate(ours)]
        if ours is not None and best is not None:
            found = speedup(best.samples, ours.samples)
            ratios.append(found.ratio)
            cells += [best.provider, say_time(best.median_ms), _shown(found)]
            if best.sustained_ms and ours.sustained_ms:
                cells.append(_shown(speedup(Samples(best.sustained_ms), Samples(ours.sustained_ms))))
        if table.row_count < MOST_CELLS:
            table.add_row(*cells)
        else:
            more += 1
    console.print(table)
    if more:
        console.print(f"and {more} more cells in the file", style="dim")
    if ratios:
        middle = statistics.geometric_mean(ratios)
        least, most = say_speedup(min(ratios)), say_speedup(max(ratios))
        console.print(
            f"against the best other: {say_speedup(middle)} on average (geometric), {least} to {most}, "
            f"{len(ratios)} cells; ≈ a tie",
            style="bold",
        )


def _shown(found: Speedup) -> Text:
    """A ratio, dim where its interval makes it a tie."""
    from rich.text import Text

    if found.low is not None and found.high is not None and found.low <= 1.0 <= found.high:
        return Text(f"≈{say_speedup(found.ratio)}", style="dim")
    return Text(say_speedup(found.ratio), style="green" if found.ratio >= 1 else "red")


def _print_tuned(console: Console, lines: list[dict[str, Any]]) -> None:
    """For each problem the fastest row, to be pasted into the tile table where it beats the one that is there."""
    by_problem = groupby(lines, key=lambda line: (line["kernel"], line["head_dim"], line["mask"]))
    for (kernel, head_dim, mask), group in by_problem:
        timed = [line for line in group if line["ms"] is not None]
        if not timed:
            continue
        best = min(timed, key=lambda line: line["ms"])
        gain = best["table_ms"] / best["ms"]
        kept = best["row"] == best["table"] or gain < WORTH_PASTING
        figures = f"{best['tflops']:.0f} TFLOP/s, {gain:.2f}x the table's row"
        console.print(f"{kernel} d{head_dim} {mask}: {figures}", style="bold")
        console.print("    the row stays" if kept else f"    {best['row']},")


def best_two(rows: list[Row]) -> tuple[Row | None, Row | None]:
    """fastattn's own choice, its fastest backend where it had none, and the fastest of the others; None where there is
    none that was timed.
    """
    timed = [row for row in rows if row.timed]
    by_name = min((row for row in timed if row.ours), key=lambda row: row.median_ms, default=None)
    ours = next((row for row in timed if row.provider == "fastattn"), by_name)
    others = [row for row in timed if not row.ours]
    return ours, min(others, key=lambda row: row.median_ms, default=None)
