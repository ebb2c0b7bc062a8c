"""What machines and documents read: JSON with every sample, CSV, markdown."""

from __future__ import annotations

import csv
import json
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
    _open(path).write_text(json.dumps(_plain(whole), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


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
    """One table an operation."""
    baseline = rows[0].baseline if rows else None
    lines = [headline(environment), "", f"{environment['date']} · `{environment['command']}`", ""]
    for op, of_op in by_op(rows).items():
        lines += [f"### {op}: {OPS[op].says}", ""]
        lines += [f"| case | mode | provider | time | IQR | vs {baseline} | TFLOP/s | memory | error |"]
        lines += ["|---|---|---|--:|--:|--:|--:|--:|---|"]
        lines += [_markdown_row(row) for row in of_op] + [""]
    return "\n".join(lines)


def _markdown_row(row: Row) -> str:
    who = f"{row.provider} ({row.label})" if row.label and row.provider == "fastattn" else row.provider
    start = f"| {say_case(row.case)} | {row.mode} | {who} |"
    if not row.timed:
        return f"{start} {row.reason} | | | | | {say_error(row)} |"
    speedup = "" if row.speedup is None else say_speedup(row.speedup)
    return (
        f"{start} {say_time(row.median_ms)} | {100 * row.spread:.0f}% | {speedup} | {say_rate(row.tflops())} | "
        f"{say_bytes(row.peak_bytes)} | {say_error(row)} |"
    )


def _open(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _plain(value: Any) -> Any:
    """NaN and infinities are not JSON: they become null and a word."""
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None if value != value else str(value)
    return value
