"""`fastattn check`: every backend against float64 on this machine, case by case."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.console import Console

    from fastattn.testing import Case

OK, WRONG, USAGE, NOTHING_RAN = 0, 1, 2, 3

MOST_NAMES = 6
"""Cases that a reason names before it says how many more."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the sub-command."""
    from fastattn.bench import options

    parser.add_argument("--backends", type=_names, metavar="LIST", help="only these backends")
    # The option's former name.
    parser.add_argument("--rooms", dest="backends", type=_names, default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    parser.add_argument("--only", type=options.regex, metavar="REGEX", help="only the cases whose name it finds")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every figure")
    parser.add_argument("--lines", action="store_true", help=argparse.SUPPRESS)  # JSON lines, for a parent
    parser.add_argument("--verbose", "-v", action="store_true", help="a line for each case, not only for each backend")


def _names(text: str) -> list[str]:
    return [word for word in text.split(",") if word]


@dataclass
class Checked:
    """One case on one backend: the worst of its tensors, in shares of what is allowed; or why there is none."""

    backend: str
    case: str
    ok: bool | None
    rms_ratio: float | None = None
    max_ratio: float | None = None
    lse_share: float | None = None
    share: float | None = None
    words: str | None = None

    def record(self) -> dict[str, Any]:
        """As plain JSON types."""
        from fastattn.bench.measure.rows import BACKEND_KEY

        return {BACKEND_KEY if name == "backend" else name: value for name, value in asdict(self).items()}

    @classmethod
    def of(cls, record: dict[str, Any]) -> Checked:
        """From what `record` gave."""
        from fastattn.bench.measure.rows import BACKEND_KEY

        return cls(**{"backend" if name == BACKEND_KEY else name: value for name, value in record.items()})


def run(namespace: argparse.Namespace, argv: list[str]) -> int:
    """Every case on every backend. 0 right, 1 wrong, 2 the command line was, 3 nothing ran."""
    import torch
    from rich.console import Console

    from fastattn.bench.measure.progress import progress_on
    from fastattn.dispatch import BACKENDS
    from fastattn.testing import CASES, LARGE_CASES

    unknown = [name for name in namespace.backends or [] if name not in BACKENDS]
    cuda = torch.cuda.is_available()
    if unknown or (namespace.device == "cuda" and not cuda):
        words = f"no backend {unknown[0]!r}; there are {', '.join(BACKENDS)}" if unknown else "torch sees no GPU here"
        print(f"fastattn check: {words}", file=sys.stderr)
        return USAGE
    device = "cuda" if cuda and namespace.device != "cpu" else "cpu"
    backends = namespace.backends or list(BACKENDS)
    cases = [
        case for name, case in (CASES | LARGE_CASES).items() if namespace.only is None or namespace.only.search(name)
    ]
    if namespace.lines:
        return _print_lines(backends, cases, device)
    console = Console(highlight=False)
    rows: list[Checked] = []
    with progress_on(console, len(backends) * len(cases)) as progress:
        for backend in backends:
            found = (
                _in_child(backend, cases, namespace.only)
                if _wants_child(backend, device)
                else _in_here(backend, cases, device)
            )
            for row in found:
                progress.step(f"{backend} · {row.case}")
                rows.append(row)
    _print_checked(console, rows, backends, device, verbose=namespace.verbose)
    if namespace.json is not None:
        namespace.json.parent.mkdir(parents=True, exist_ok=True)
        namespace.json.write_text(json.dumps([row.record() for row in rows], indent=1) + "\n")
        console.print(f"written: {namespace.json}", soft_wrap=True)
    if any(row.ok is False for row in rows):
        return WRONG
    return OK if any(row.ok for row in rows) else NOTHING_RAN


def _print_lines(backends: list[str], cases: list[Case], device: str) -> int:
    """For a parent: {"begin": case}, then {"done": case, "row": {...}}, each on a line. A case that hangs ends the
    process, and so does one that leaves a CUDA context that no later case can use.
    """
    from fastattn.bench.gpu import watchdog

    silence = watchdog.Watch()
    for backend in backends:
        for case in cases:
            print(json.dumps({"begin": case.id}), flush=True)
            silence.heard()
            [row] = _in_here(backend, [case], device)
            broken = watchdog.broken_device() if row.ok is False else None
            if broken is not None:
                row.words = f"{row.words}; it left a CUDA context that no later call can use: {broken}"
            print(json.dumps({"done": case.id, "row": row.record()}), flush=True)
            if broken is not None:
                return watchdog.BROKEN_DEVICE
    silence.stop()
    return OK


def _in_here(backend: str, cases: list[Case], device: str) -> Iterator[Checked]:
    import fastattn
    from fastattn import dispatch, testing

    module = dispatch.load(backend)
    grads = module.HAS_BACKWARD
    for case in cases:
        if case.id in testing.LARGE_CASES and module.ROUNDS_LSE is not None:
            yield Checked(backend, case.id, None, words=module.ROUNDS_LSE)
            continue
        problem = testing.make_inputs(case, device)
        try:
            agreements = testing.agreement(problem, testing.run(problem, backend, grads=grads))
        except fastattn.BackendUnavailable as refusal:
            yield Checked(backend, case.id, None, words=_reason(str(refusal)))
            continue
        except Exception as failure:
            yield Checked(backend, case.id, False, words=f"{type(failure).__name__}: {failure}")
            continue
        tensors = [row for row in agreements if row.name != "lse"]
        wrong = [str(row) for row in agreements if not row.ok]
        yield Checked(
            backend,
            case.id,
            not wrong,
            max(row.rms_ratio for row in tensors),
            max(row.max_ratio for row in tensors),
            max((row.share for row in agreements if row.name == "lse"), default=None),
            max(row.share for row in agreements),
            "; ".join(wrong) or None,
        )


def _wants_child(backend: str, device: str) -> bool:
    """Triton runs on a CPU in its interpreter alone, which must be chosen before Triton is imported."""
    return backend == "triton" and device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1"


def _in_child(backend: str, cases: list[Case], only: re.Pattern[str] | None) -> Iterator[Checked]:
    """The same rows, one by one, from a process of its own with Triton's interpreter."""
    if importlib.util.find_spec("triton") is None:
        for case in cases:
            yield Checked(backend, case.id, None, words="triton is not installed")
        return
    flags = ["--backends", backend, "--device", "cpu", "--lines", *(["--only", only.pattern] if only else [])]
    command = [sys.executable, "-m", "fastattn.cli", "check", *flags]
    done = 0
    with (
        tempfile.TemporaryFile("w+") as stderr,
        subprocess.Popen(
            command, env={**os.environ, "TRITON_INTERPRET": "1"}, stdout=subprocess.PIPE, stderr=stderr, text=True
        ) as process,
    ):
        for line in process.stdout or ():
            said = json.loads(line)
            if "row" in said:
                yield Checked.of(said["row"])
                done += 1
        process.wait()
        stderr.seek(0)
        last = (stderr.read().strip().splitlines() or ["no message"])[-1]
    for case in cases[done:]:
        yield Checked(backend, case.id, False, words=f"the child process ended with {process.returncode}: {last}")


def _reason(refusal: str) -> str:
    """The reason inside BackendUnavailable's sentence."""
    match = re.search(r"cannot run this call: (.*?)\. (?:What can:|backend=None)", refusal, re.DOTALL)
    return match[1] if match else refusal


def _print_checked(console: Console, rows: list[Checked], backends: list[str], device: str, *, verbose: bool) -> None:
    """A line a backend; failures always, every case and the reasons of the refused with --verbose."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2), header_style="dim")
    for title in ("backend", "case", ""):
        table.add_column(title, no_wrap=True)
    for title in ("RMS", "worst", "lse", "used"):
        table.add_column(title, justify="right", no_wrap=True)
    for row in rows if verbose else [row for row in rows if row.ok is False]:
        mark = {True: "[green]✓[/]", False: "[bold red]✗[/]", None: "[dim]-[/]"}[row.ok]
        figures = [_figure(row.rms_ratio, "x"), _figure(row.max_ratio, "x"), _figure(row.lse_share), _figure(row.share)]
        table.add_row(row.backend, row.case, mark, *figures)
    for backend in backends:
        of_backend = [row for row in rows if row.backend == backend]
        ran = [row for row in of_backend if row.ok is not None]
        good = sum(row.ok is True for row in ran)
        mark = "[dim]-[/]" if not ran else "[green]✓[/]" if good == len(ran) else "[bold red]✗[/]"
        figures = [
            _most(ran, "rms_ratio", "x"),
            _most(ran, "max_ratio", "x"),
            _most(ran, "lse_share"),
            _most(ran, "share"),
        ]
        summary = f"{good} of {len(ran)} right" + (
            f", {len(of_backend) - len(ran)} refused" if len(of_backend) > len(ran) else ""
        )
        table.add_row(f"[bold]{backend}[/]", f"[bold]{summary}[/]", mark, *figures)
    console.print(table)
    console.print(
        f"On {device}. RMS, worst: error against float64 over the plain computation's own, the largest of all results. "
        "Used: the share of the bound that is taken up, lse's by itself; at most 1 is right. "
        "The bound adds one ulp, so the ratios of tiny errors may be larger than its factor.",
        style="dim",
    )
    refused: dict[str, list[str]] = {}
    for row in rows:
        if row.ok is None:
            refused.setdefault(f"{row.backend}: {row.words}", []).append(row.case)
    for words, names in refused.items():
        shown = names if verbose else names[:MOST_NAMES]
        more = f" and {len(names) - len(shown)} more" if len(names) > len(shown) else ""
        console.print(f"refused by {words} ({', '.join(shown)}{more})", style="dim", markup=False)
    for row in rows:
        if row.ok is False:
            console.print(f"✗ {row.backend}, {row.case}: {row.words}", style="bold red", markup=False)


def _figure(number: float | None, unit: str = "") -> str:
    return "" if number is None else f"{number:.2f}{unit}"


def _most(rows: list[Checked], name: str, unit: str = "") -> str:
    return _figure(max((value for row in rows if (value := getattr(row, name)) is not None), default=None), unit)
