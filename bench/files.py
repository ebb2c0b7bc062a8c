"""What machines and documents read: JSON with every sample, CSV, markdown."""

from __future__ import annotations

import csv
import json
from itertools import groupby
from pathlib import Path
from typing import Any

from fastattn.bench.env import headline
from fastattn.bench.report import by_op, say_case
from fastattn.bench.rows import Row, say_bytes, say_error, say_rate, say_speedup, say_time
from fastattn.bench_cases import OPS

SCHEMA = "fastattn-bench/1"
LONG = ("samples_ms", "errors")
"""Fields of a row that are lists; a CSV leaves them out."""


def write_json(
    path: Path, rows: list[Row], environment: dict[str, Any], settings: dict[str, Any], model: dict[str, Any] | None
) -> None:
    """Everything: environment, settings, each row with each sample and the command that runs it again, the model."""
    whole = {
        "schema": SCHEMA,
        "environment": environment,
        "settings": settings,
        "rows": [row.record() for row in rows],
        "model": model,
    }
    _open(path).write_text(json.dumps(plain(whole), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


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
    lines += [*_summary(rows), ""]
    for op, of_op in by_op(rows).items():
        against = f"vs {of_op[0].baseline}" if of_op[0].baseline else "speed-up"
        lines += [f"### {op}: {OPS[op].says}", ""]
        lines += [f"| case | mode | provider | time | IQR | {against} | TFLOP/s | memory | error |"]
        lines += ["|---|---|---|--:|--:|--:|--:|--:|---|"]
        lines += [_markdown_row(row) for row in of_op] + [""]
    return "\n".join(lines)


def _summary(rows: list[Row]) -> list[str]:
    """A line for each case and mode: median time by provider, and its speed-up against the baseline."""
    providers = list(dict.fromkeys(row.provider for row in rows))
    titles = [next((row.who for row in rows if row.provider == name and row.timed), name) for name in providers]
    lines = ["| operation | case | mode | " + " | ".join(titles) + " |", "|---|---|---|" + "--:|" * len(providers)]
    for (case, mode), group in groupby(rows, key=lambda row: (row.case, row.mode)):
        cells = {row.provider: _summary_cell(row) for row in group}
        shown = " | ".join(cells.get(name, "") for name in providers)
        lines.append(f"| {case.op} | {say_case(case)} | {mode} | {shown} |")
    return lines


def _summary_cell(row: Row) -> str:
    if not row.timed:
        return ("✗ " if row.failed else "") + (row.reason or "not timed")
    against = "" if row.speedup is None or row.provider == row.baseline else f" ({say_speedup(row.speedup)})"
    return say_time(row.median_ms) + against


def _markdown_row(row: Row) -> str:
    start = f"| {say_case(row.case)} | {row.mode} | {row.who} |"
    if not row.timed:
        return f"{start} {row.reason} | | | | | {say_error(row)} |"
    speedup = "" if row.speedup is None else say_speedup(row.speedup)
    return (
        f"{start} {say_time(row.median_ms)} | {100 * row.spread:.0f}% | {speedup} | {say_rate(row.tflops())} | "
        f"{say_bytes(row.peak_bytes)} | {say_error(row)} |"
    )


def read_json(path: Path) -> tuple[list[Row], dict[str, Any]]:
    """Rows and environment of an earlier run. ValueError where the file is none."""
    try:
        whole = json.loads(path.read_text(encoding="utf-8"))
        if whole["schema"] != SCHEMA:
            raise ValueError(f"its schema is {whole['schema']!r}, not {SCHEMA!r}")
        return [Row.of(record) for record in whole["rows"]], whole["environment"]
    except (OSError, KeyError, TypeError, ValueError) as failure:
        raise ValueError(f"from: {path} is not a run of fastattn bench ({failure})") from failure


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
