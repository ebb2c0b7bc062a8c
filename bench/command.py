"""`fastattn bench` from options to exit code."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from fastattn.bench.cases.operations import OPS
from fastattn.bench.cases.presets import PRESETS
from fastattn.bench.cases.suites import SUITES
from fastattn.bench.measure import env, estimate
from fastattn.bench.measure.clock import clock_for
from fastattn.bench.measure.progress import progress_on
from fastattn.bench.measure.providers import peers
from fastattn.bench.measure.providers.table import known_providers
from fastattn.bench.measure.roofline import ceilings
from fastattn.bench.measure.rows import Row, say_bytes
from fastattn.bench.measure.run import budget_for, pick_device, plan, run, too_large
from fastattn.bench.models import minilm
from fastattn.bench.options import Options
from fastattn.bench.report import store, terminal, writers

OK, WRONG, USAGE, NOTHING_RAN, STOPPED = 0, 1, 2, 3, 130

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
            return _show(console, options, *writers.read_json(options.source))
        if options.peers is not None:
            peers.look_in(options.peers)
        device = pick_device(options.device)
        rows = plan(options, device) if options.wants_cases or options.list or options.dry_run else []
        if options.list or options.dry_run:
            (_print_list if options.list else _print_dry_run)(console, rows, device)
            if options.repro:
                _print_commands(console, rows)
            return OK
        environment = env.environment(device.type, list(options.argv))
        path = store.json_path(options, environment)
        if options.resume:
            if not (options.save or options.json or options.out):
                raise ValueError("resume: which run goes on? Name it by --save NAME, --json FILE or --out DIR")
            rows, environment = store.resume(path, rows, environment)
    except ValueError as failure:
        print(f"fastattn bench: {failure}", file=sys.stderr)
        return USAGE
    return _measure(console, rows, options, device, environment, path)


def _show(console: Any, options: Options, rows: list[Row], environment: dict[str, Any]) -> int:
    """An earlier run again, in the files that are asked for by name."""
    rows = [row for row in rows if options.only is None or options.only.search(row.name)]
    terminal.table_header(console, environment)
    last_op = None
    for case, group in groupby(rows, key=lambda row: row.case):
        terminal.print_case(console, list(group), first_of_op=case.op != last_op)
        last_op = case.op
    if rows:
        terminal.print_legend(console, rows)
    if options.repro:
        _print_commands(console, rows)
    _print_written(console, _write_named(console, rows, options, environment, options.plot or []))
    return WRONG if any(row.failed for row in rows) else OK


def _measure(
    console: Any, rows: list[Row], options: Options, device: torch.device, environment: dict[str, Any], path: Path
) -> int:
    """Each case is written as soon as it is measured, so that a run that ends early keeps what it has."""
    terminal.table_header(console, environment)
    settings = _settings(rows, options, device)
    if rows and "ceilings" not in environment:
        environment["ceilings"] = ceilings(list(dict.fromkeys(row.case.dtype for row in rows)), device)
    result, stopped = None, False
    with progress_on(console, len(rows) + options.wants_model) as progress:
        try:
            last_op = None
            for of_case in run(rows, options, device, progress):
                terminal.print_case(console, of_case, first_of_op=of_case[0].case.op != last_op)
                last_op = of_case[0].case.op
                writers.write_json(path, [row for row in rows if row.done], environment, settings, None)
            if any(row.timed for row in rows):
                terminal.print_legend(console, rows)
            if options.wants_model:
                progress.step("model")
                reason = minilm.missing()
                if reason is None:
                    result = minilm.run_model(device, progress.say)
                else:
                    console.print(f"\n{reason}", style="yellow", soft_wrap=True)
        except KeyboardInterrupt:
            stopped = True
    environment["load_average_after"] = env.load_average()
    if result is not None:
        minilm.print_model(console, result)
    done = [row for row in rows if row.done]
    ran = any(row.timed or row.failed for row in done) or result is not None
    if ran:
        found = None if result is None else result.record()
        writers.write_json(path, done, environment, settings, found)
        folder = store.out_folder(options, environment)
        # A suite is too many panels to look at, unless it is asked for.
        unasked = [] if set(options.presets) & set(SUITES) else [folder / "bench.svg", folder / "bench.png"]
        plots = options.plot or unasked
        _print_written(console, [path, *_write_named(console, done, options, environment, plots)])
    if options.repro:
        _print_commands(console, done)
    if stopped:
        _print_left(console, "stopped", rows, options, path)
        return STOPPED
    if ran and len(done) < len(rows):
        _print_left(console, f"the budget of {options.budget:g} s is spent", rows, options, path)
    return _verdict(console, rows, result, ran)


def _print_left(console: Any, why: str, rows: list[Row], options: Options, path: Path) -> None:
    flags = f"--save {options.save}" if options.save else f"--json {path}"
    done = sum(row.done for row in rows)
    console.print(f"\n{why}: {done} of {len(rows)} rows were measured; --resume {flags} goes on", style="bold")


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
        writers.write_csv(options.csv, rows)
        written.append(options.csv)
    if options.md is not None:
        writers.write_markdown(options.md, rows, environment)
        written.append(options.md)
    if plots and any(row.timed for row in rows):
        if importlib.util.find_spec("matplotlib") is None:
            console.print(NO_PLOT, style="yellow", soft_wrap=True)
        else:
            from fastattn.bench.report.plot import draw

            draw(plots, rows, environment)
            written += plots
    return written


def _print_written(console: Any, paths: list[Path]) -> None:
    console.print()
    for path in paths:
        console.print(f"written: {path}", soft_wrap=True)


def _print_commands(console: Any, rows: list[Row]) -> None:
    console.print("\neach row again:", style="bold")
    for row in rows:
        console.print(f"  {row.name}\n    {row.command}", soft_wrap=True)


def _verdict(console: Any, rows: list[Row], result: minilm.ModelResult | None, ran: bool) -> int:
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


def _print_list(console: Any, rows: list[Row], device: torch.device) -> None:
    console.print("operations", style="bold")
    for name, op in OPS.items():
        console.print(f"  {name:<12} {op.says}", soft_wrap=True)
    console.print("presets, attention of known models", style="bold")
    for name, preset in PRESETS.items():
        console.print(f"  {name:<18} {preset.says}", soft_wrap=True)
        console.print(f"  {'':<18} from {preset.source}", style="dim", soft_wrap=True)
    console.print("suites, lists of cells", style="bold")
    for name, suite in SUITES.items():
        console.print(f"  {name:<18} {suite.says}", soft_wrap=True)
    console.print("providers", style="bold")
    console.print("  " + "  ".join(known_providers()))
    console.print(f"rows ({len(rows)} on {device.type}), by the name that --only sees", style="bold")
    for row in rows:
        console.print(f"  {row.name}", soft_wrap=True)


def _print_dry_run(console: Any, rows: list[Row], device: torch.device) -> None:
    """The rows with what each will take; what does not fit is marked, nothing is allocated."""
    free = estimate.free_bytes(device)
    there = "" if free is None else f"; {say_bytes(free)} are free"
    console.print(f"{len(rows)} rows would run on {device.type}{there}", style="bold")
    for row in rows:
        reason = too_large(row, device)
        mark = "✗" if reason else " "
        console.print(
            f"{mark} {say_bytes(row.estimated_bytes):>9}  {row.name}", style="red" if reason else "", soft_wrap=True
        )
    large = [row for row in rows if free is not None and estimate.check_bytes(row.case, row.mode, device) > free]
    if large:
        console.print(f"{len(large)} rows would not be checked: their float64 tables do not fit.", style="yellow")
    console.print("Estimates count inputs, outputs, gradients, masks and tables of what is not fused.", style="dim")
