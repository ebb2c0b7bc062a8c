"""`fastattn bench` from options to exit code."""

from __future__ import annotations

import datetime
import importlib.util
import sys
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from fastattn.bench import env, files, model, report
from fastattn.bench.clock import clock_for
from fastattn.bench.options import Options
from fastattn.bench.presets import PRESETS
from fastattn.bench.progress import progress_on
from fastattn.bench.providers import known_providers
from fastattn.bench.rows import Row
from fastattn.bench.run import budget_for, pick_device, plan, run
from fastattn.bench_cases import OPS

OK, WRONG, USAGE, NOTHING_RAN = 0, 1, 2, 3

NO_RICH = "fastattn bench draws its table with rich, which is not installed; pip install 'fastattn[bench]' brings it."
NO_PLOT = "No plot: matplotlib is not installed; pip install 'fastattn[plot]' brings it."


def main(options: Options) -> int:
    """Run, print, write; the exit code says whether all was right."""
    if importlib.util.find_spec("rich") is None:
        print(NO_RICH, file=sys.stderr)
        return USAGE
    from rich.console import Console

    console = Console(highlight=False, markup=False)
    try:
        if options.source is not None:
            return _show(console, options, *files.read_json(options.source))
        device = pick_device(options.device)
        rows = plan(options, device) if options.wants_cases or options.list else []
    except ValueError as failure:
        print(f"fastattn bench: {failure}", file=sys.stderr)
        return USAGE
    if options.list:
        _print_list(console, rows)
        return OK
    return _measure(console, rows, options, device)


def _show(console: Any, options: Options, rows: list[Row], environment: dict[str, Any]) -> int:
    """An earlier run again, in the files that are asked for by name."""
    rows = [row for row in rows if options.only is None or options.only.search(row.name)]
    report.table_header(console, environment)
    last_op = None
    for case, group in groupby(rows, key=lambda row: row.case):
        report.print_case(console, list(group), first_of_op=case.op != last_op)
        last_op = case.op
    if rows:
        report.print_legend(console, rows)
    _print_written(console, _write_named(console, rows, options, environment, options.plot or []))
    return WRONG if any(row.failed for row in rows) else OK


def _measure(console: Any, rows: list[Row], options: Options, device: torch.device) -> int:
    environment = env.environment(device.type, list(options.argv))
    report.table_header(console, environment)
    result = None
    with progress_on(console, len(rows) + options.wants_model) as progress:
        last_op = None
        for of_case in run(rows, options, device, progress):
            report.print_case(console, of_case, first_of_op=of_case[0].case.op != last_op)
            last_op = of_case[0].case.op
        if any(row.timed for row in rows):
            report.print_legend(console, rows)
        if options.wants_model:
            progress.step("model")
            reason = model.missing()
            if reason is None:
                result = model.run_model(device, progress.say)
            else:
                console.print(f"\n{reason}", style="yellow", soft_wrap=True)
    environment["load_average_after"] = env.load_average()
    if result is not None:
        model.print_model(console, result)
    ran = any(row.timed or row.failed for row in rows) or result is not None
    if ran:
        out = options.out or _default_out(environment)
        path = options.json or out / "bench.json"
        found = None if result is None else result.record()
        files.write_json(path, rows, environment, _settings(rows, options, device), found)
        plots = options.plot or [out / "bench.svg", out / "bench.png"]
        _print_written(console, [path, *_write_named(console, rows, options, environment, plots)])
    return _verdict(console, rows, result, ran)


def _settings(rows: list[Row], options: Options, device: torch.device) -> dict[str, Any]:
    return {
        **asdict(budget_for(options, device)),
        "checked": options.check,
        "baseline": rows[0].baseline if rows else None,
        "clock": clock_for(device).name,
    }


def _write_named(
    console: Any, rows: list[Row], options: Options, environment: dict[str, Any], plots: list[Path]
) -> list[Path]:
    """CSV and markdown where asked for, and the plots; returns what was written."""
    written = []
    if options.csv is not None:
        files.write_csv(options.csv, rows)
        written.append(options.csv)
    if options.md is not None:
        files.write_markdown(options.md, rows, environment)
        written.append(options.md)
    if plots and any(row.timed for row in rows):
        if importlib.util.find_spec("matplotlib") is None:
            console.print(NO_PLOT, style="yellow", soft_wrap=True)
        else:
            from fastattn.bench.plot import draw

            draw(plots, rows, environment)
            written += plots
    return written


def _print_written(console: Any, paths: list[Path]) -> None:
    console.print()
    for path in paths:
        console.print(f"written: {path}", soft_wrap=True)


def _verdict(console: Any, rows: list[Row], result: model.ModelResult | None, ran: bool) -> int:
    if not ran:
        console.print("\nNothing ran:", style="bold red")
        reasons = dict.fromkeys(f"{row.provider}: {row.reason}" for row in rows if row.reason)
        for reason in reasons or ["no row fits these flags; fastattn bench --list shows what there is"]:
            console.print(f"  {reason}")
        return NOTHING_RAN
    wrong = [row for row in rows if row.failed]
    for row in wrong:
        console.print(f"\n✗ {row.name}: {row.reason}", style="bold red")
        console.print(f"  again: {row.command}", style="dim", soft_wrap=True)
    if result is not None and not result.ok:
        console.print(
            "\n✗ the model's embeddings are not PyTorch's, or its attention never reached fastattn", style="bold red"
        )
    return WRONG if wrong or (result is not None and not result.ok) else OK


def _print_list(console: Any, rows: list[Row]) -> None:
    console.print("operations", style="bold")
    for name, op in OPS.items():
        console.print(f"  {name:<10} {op.says}")
    console.print("presets, attention of known models", style="bold")
    for name, preset in PRESETS.items():
        console.print(f"  {name:<18} {preset.says}", soft_wrap=True)
        console.print(f"  {'':<18} from {preset.source}", style="dim", soft_wrap=True)
    console.print("providers", style="bold")
    console.print("  " + "  ".join(known_providers()))
    console.print(f"rows ({len(rows)}), by the name that --only sees", style="bold")
    for row in rows:
        console.print(f"  {row.name}", soft_wrap=True)


def _default_out(environment: dict[str, Any]) -> Path:
    """bench/out/ in a checkout, fastattn-bench/ elsewhere; a folder a run."""
    root = Path("bench/out") if Path("bench/options.py").is_file() else Path("fastattn-bench")
    stamp = datetime.datetime.now().strftime("%Y-%m-%d-%H%M%S")
    return root / f"{stamp}-{env.device_name(environment)}"
