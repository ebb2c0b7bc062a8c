"""What machines and documents read: JSON with every sample, CSV, markdown."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Any

from fastattn.bench.cases.operations import OPS
from fastattn.bench.measure.env import headline
from fastattn.bench.measure.ratios import Interval
from fastattn.bench.measure.rows import (
    Row,
    rate_unit,
    say_against,
    say_bytes,
    say_error,
    say_rate,
    say_speedup,
    say_sustained,
    say_time,
    say_warnings,
    three,
)
from fastattn.bench.report.growth import growth
from fastattn.bench.report.terminal import by_op, say_case

SCHEMA = "fastattn-bench/2"
GPU_SCHEMA = "fastattn-gpu/2"
READS = (SCHEMA, GPU_SCHEMA, "fastattn-gpu/1")
"""What is written here, and what `make gpu` writes and wrote: its rows are the same."""

MORE = "memory | mask made in | first call | overhead"
LONG = ("samples_ms", "errors", "gpu_state", "sustained_ms", "sustained_state", "warnings")
"""Fields of a row that are lists or tables; a CSV leaves them out."""


def write_json(
    path: Path, rows: list[Row], environment: dict[str, Any], settings: dict[str, Any], model: dict[str, Any] | None
) -> None:
    """Everything: environment, settings, each row with each sample and the command that runs it again, the model."""
    whole = {
        "schema": SCHEMA,
        "environment": environment,
        "settings": settings,
        "rows": [row.record() for row in rows],
        "growth": [each.record() for each in growth(rows)],
        "model": model,
    }
    # The whole file at once: a run that is killed leaves the last one, not half of this.
    part = _open(path).with_name(path.name + ".part")
    part.write_text(json.dumps(plain(whole), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    part.replace(path)


def write_csv(path: Path, rows: list[Row]) -> None:
    records = [row.record() for row in rows]
    names = [name for name in (records[0] if records else {}) if name not in LONG]
    with _open(path).open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(records)


def write_markdown(path: Path, rows: list[Row], environment: dict[str, Any]) -> None:
    _open(path).write_text(markdown(rows, environment), encoding="utf-8")


def markdown(rows: list[Row], environment: dict[str, Any]) -> str:
    """A summary with a column for each provider, then a table of every figure for each operation."""
    lines = [headline(environment), "", f"{environment['date']} · `{environment['command']}`", ""]
    lines += [*summary(rows), ""]
    warned = say_warnings(rows)
    if warned:
        lines += [*(f"- {each}" for each in warned), ""]
    sustained = any(row.sustained_ms for row in rows)
    for op, of_op in by_op(rows).items():
        against = f"vs {of_op[0].baseline}" if of_op[0].baseline else "speed-up"
        lines += [f"### {op}: {OPS[op].says}", ""]
        rates = "useful {0} | dense-equivalent {0}".format(rate_unit(of_op[0].device)[0])
        lasting = " sustained |" if sustained else ""
        lines += [f"| case | mode | provider | time | IQR | {against} |{lasting} {rates} | {MORE} | error |"]
        lines += ["|---|---|---|" + "--:|" * (9 + sustained) + "---|"]
        lines += [_markdown_row(row, sustained) for row in of_op] + [""]
    return "\n".join(lines)


def rates(rows: list[Row]) -> list[str]:
    """A line for each case and mode: the rate of the median time by provider, on visible pairs alone."""
    unit, _ = rate_unit(rows[0].device)
    return [f"Useful {unit}, of the median time:", "", *summary(rows, _rate_cell)]


def summary(rows: list[Row], cell: Callable[[Row], str] | None = None) -> list[str]:
    """A line for each case and mode, a column for each provider: its `cell`, else its median time and its speed-up
    against the baseline.
    """
    providers = list(dict.fromkeys(row.provider for row in rows))
    titles = [next((row.who for row in rows if row.provider == name and row.timed), name) for name in providers]
    lines = ["| operation | case | mode | " + " | ".join(titles) + " |", "|---|---|---|" + "--:|" * len(providers)]
    for group in _side_by_side(rows):
        cells = {name: (cell or _summary_cell)(row) for name, row in group.items()}
        shown = " | ".join(cells.get(name, "") for name in providers)
        first = next(iter(group.values()))
        lines.append(f"| {first.case.op} | {say_case(first.case)} | {first.mode} | {shown} |")
    return lines


def _side_by_side(rows: list[Row]) -> list[dict[str, Row]]:
    """Rows of a case and mode by provider; one that a provider ran again is another line."""
    groups: list[dict[str, Row]] = []
    for _, of_cell in groupby(rows, key=lambda row: (row.case, row.mode)):
        groups.append({})
        for row in of_cell:
            if row.provider in groups[-1]:
                groups.append({})
            groups[-1][row.provider] = row
    return groups


def _summary_cell(row: Row) -> str:
    if not row.timed:
        return ("✗ " if row.wrong else "") + (row.reason or "not timed")
    lasting = say_sustained(row)
    against = ", ".join(filter(None, [say_against(row), f"sustained {lasting}" if lasting else ""]))
    return say_time(row.median_ms) + (f" ({against})" if against else "")


def _rate_cell(row: Row) -> str:
    return say_rate(row) if row.timed else _summary_cell(row)


def _markdown_row(row: Row, sustained: bool) -> str:
    start = f"| {say_case(row.case)} | {row.mode} | {row.who} |"
    if not row.timed:
        return f"{start} {row.reason} |{' |' * (8 + sustained)} {say_error(row)} |"
    lasting = _say_interval(row, row.sustained_speedup, row.sustained_low, row.sustained_high)
    cells = [
        say_time(row.median_ms),
        f"{100 * row.spread:.0f}%",
        _say_interval(row, row.speedup, row.speedup_low, row.speedup_high),
        *([lasting] if sustained else []),
        say_rate(row),
        say_rate(row, dense=True),
        say_bytes(row.peak_bytes),
        "" if row.mask_s is None else say_time(1e3 * row.mask_s),
        "" if row.first_call_s is None else say_time(1e3 * row.first_call_s),
        "" if row.overhead_us is None else say_time(1e-3 * row.overhead_us),
        say_error(row),
    ]
    return f"{start} " + " | ".join(cells) + " |"


def _say_interval(row: Row, ratio: float | None, low: float | None, high: float | None) -> str:
    if ratio is None:
        return ""
    if low is None or high is None or row.provider == row.baseline:
        return say_speedup(ratio)
    tie = ", tie" if Interval(low, high).tie else ""
    return f"{say_speedup(ratio)} [{three(low)}, {three(high)}]{tie}"


def read_json(path: Path) -> tuple[list[Row], dict[str, Any]]:
    """Rows and environment of an earlier run. ValueError where the file is none."""
    try:
        whole = json.loads(path.read_text(encoding="utf-8"))
        schema = whole["schema"]
        if schema in READS:
            return [Row.of(record) for record in whole["rows"]], whole["environment"]
    except FileNotFoundError:
        raise ValueError(f"{path}: there is no such file") from None
    except (OSError, KeyError, TypeError, ValueError) as failure:
        raise ValueError(f"{path} is not a run of fastattn bench ({failure!r})") from failure
    raise ValueError(
        f"{path} is not a run that this version reads: its schema is {schema!r}, and {SCHEMA!r} is needed; "
        f"measure again, or read it with the fastattn that wrote it"
    )


def _open(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def plain(value: Any) -> Any:
    """NaN and infinities are not JSON: they become null and a word."""
    if isinstance(value, dict):
        return {key: plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(each) for each in value]
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None if value != value else str(value)
    return value
