"""The command line: `fastattn bench | build | check | info | inspect`.

Sub-commands import what they need, help little.
"""

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

NO_RICH = "fastattn's tables are drawn with rich, which is not installed; pip install 'fastattn[bench]' brings it."


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    # A pipe on a system with another encoding still gets its check marks.
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    parser = _parser()
    # Its words and flags come in any order, which argparse allows to no command of a command.
    namespace = parser.parse_args(argv[:1] if argv[:1] == ["bench"] else argv)
    if namespace.version:
        return _print_version()
    if namespace.command is None:
        parser.print_help()
        return USAGE
    if importlib.util.find_spec("rich") is None:
        print(NO_RICH, file=sys.stderr)
        return USAGE
    try:
        return namespace.run(namespace, argv)
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    from fastattn import building, inspection
    from fastattn.bench import options
    from fastattn.models import command as models

    parser = argparse.ArgumentParser("fastattn", description="Every kind of attention as one fused call.")
    parser.add_argument("--version", action="store_true", help="print the version and leave")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    bench = commands.add_parser("bench", help="time attention beside PyTorch's own, and a real model")
    bench.set_defaults(run=_bench)
    build = commands.add_parser("build", help="build a library now, instead of at the first call that needs it")
    building.add_arguments(build)
    build.set_defaults(run=building.run)
    check = commands.add_parser("check", help="hold every room against float64 on this machine")
    check.add_argument("--rooms", type=_names, metavar="LIST", help="only these rooms")
    check.add_argument("--only", type=options.regex, metavar="REGEX", help="only the cases whose name it finds")
    check.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    check.add_argument("--json", type=Path, metavar="FILE", help="also write every figure")
    check.add_argument("--lines", action="store_true", help=argparse.SUPPRESS)  # a JSON row a line, for a parent
    check.add_argument("--verbose", "-v", action="store_true", help="a line for each case, not only for each room")
    check.set_defaults(run=_check)
    inspected = commands.add_parser("inspect", help="compile the GPU kernels, without a GPU, and show what they became")
    inspection.add_arguments(inspected)
    inspected.set_defaults(run=inspection.run)
    compared = commands.add_parser("models", help="hold real architectures against their library's eager attention")
    models.add_arguments(compared)
    compared.set_defaults(run=models.run)
    info = commands.add_parser("info", help="what this machine has, which rooms run, and why not the others")
    info.set_defaults(run=_info)
    return parser


def _names(text: str) -> list[str]:
    return [word for word in text.split(",") if word]


def _print_version() -> int:
    from fastattn import __version__

    print(f"fastattn {__version__}")
    return OK


def _bench(namespace: argparse.Namespace, argv: list[str]) -> int:
    from fastattn.bench import command, compare, options, tables

    for word, verb in (("compare", compare.main), ("report", tables.main)):
        if argv[1:2] == [word]:
            return verb(argv[2:])
    return command.main(options.parse(argv[1:]))


# ---- info


def _info(namespace: argparse.Namespace, argv: list[str]) -> int:
    """Machine, software, rooms."""
    import torch
    from rich.console import Console

    from fastattn.bench import env

    block = env.environment("cuda" if torch.cuda.is_available() else "cpu")
    console = Console(highlight=False)
    _print_pairs(console, "machine", _machine(block))
    _print_pairs(console, "software", _software(block))
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    for device in devices:
        _print_rooms(console, device)
    return OK


def _machine(block: dict[str, Any]) -> dict[str, str]:
    pairs = {
        "CPU": f"{block['cpu']}, {block['cores']} cores, {block['cpu_capability']}",
        "threads": f"torch uses {block['threads']}",
    }
    if block["load_average"]:
        busy = " (busy)" if block["busy"] else ""
        pairs["load"] = f"{block['load_average'][0]} running tasks in the last minute{busy}"
    if block["gpu"]:
        memory = block["gpu_memory"] / 2**30
        pairs["GPU"] = f"{block['gpu']}, sm_{block['gpu_capability'].replace('.', '')}, {memory:.0f} GiB"
        pairs["driver"] = f"{block['driver'] or 'unknown'}, CUDA {block['cuda']}, cuDNN {block['cudnn']}"
    else:
        pairs["GPU"] = "none that torch can use"
    return pairs


def _software(block: dict[str, Any]) -> dict[str, str]:
    import fastattn
    from fastattn import native_cpu, native_cuda

    commit = f", commit {block['commit'][:9]}{' with changes' if block['dirty'] else ''}" if block["commit"] else ""
    names = {name for name in os.environ if name in ("TRITON_INTERPRET", "CXX") or name.startswith("FASTATTN_")}
    pairs = {
        "fastattn": f"{fastattn.__version__} in {Path(fastattn.__file__).parent}{commit}",
        "Python": f"{block['python']} on {block['platform']}",
        "torch": block["torch"],
        "triton": block["triton"] or "not installed (pip install 'fastattn[triton]', Linux only)",
        "C++ compiler": block["cxx"] or "none: torch.compile cannot build for the CPU",
        "CPU library": native_cpu.state(),
        "CUDA library": native_cuda.state(),
    }
    if names:
        pairs["environment"] = " ".join(f"{name}={os.environ[name]}" for name in sorted(names))
    return pairs


def _print_pairs(console: Console, title: str, pairs: dict[str, str]) -> None:
    from rich.table import Table

    console.print(title, style="bold cyan")
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 1))
    table.add_column(style="dim", min_width=14)
    table.add_column(overflow="fold")
    for name, value in pairs.items():
        table.add_row(f"  {name}", value)
    console.print(table)


def _print_rooms(console: Console, device: str) -> None:
    """Which rooms would run a plain causal call that wants gradients, in the dtype that suits the device."""
    import torch

    import fastattn

    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    query = torch.empty(1, 8, 1024, 64, dtype=dtype, device=device, requires_grad=True)
    try:
        verdict = fastattn.explain(query, query, query, mask=fastattn.masks.Causal())
    except (fastattn.BackendUnavailable, ValueError) as refusal:
        console.print(f"rooms on {device}", style="bold cyan")
        console.print(f"  {refusal}", markup=False)
        return
    pairs = {}
    for room, reason in verdict.reasons.items():
        words = verdict.of(room).replace("[", "\\[")
        pairs[room] = f"[green]{words}[/]" if reason is None else words
    name = str(dtype).removeprefix("torch.")
    _print_pairs(console, f"rooms, for a causal call in {name} on {device} and its gradients", pairs)
    for note in verdict.notes:
        console.print(f"  note: {note}", markup=False)


# ---- check


@dataclass
class Checked:
    """One case in one room: the worst of its tensors, in shares of what is allowed; or why there is none."""

    room: str
    case: str
    ok: bool | None
    rms_ratio: float | None = None
    max_ratio: float | None = None
    lse_share: float | None = None
    share: float | None = None
    words: str | None = None


def _check(namespace: argparse.Namespace, argv: list[str]) -> int:
    """The yardstick over every case and room."""
    import torch
    from rich.console import Console

    from fastattn.bench.progress import progress_on
    from fastattn.dispatch import BACKENDS
    from fastattn.testing import CASES

    unknown = [room for room in namespace.rooms or [] if room not in BACKENDS]
    cuda = torch.cuda.is_available()
    if unknown or (namespace.device == "cuda" and not cuda):
        words = f"no room {unknown[0]!r}; there are {', '.join(BACKENDS)}" if unknown else "torch sees no GPU here"
        print(f"fastattn check: {words}", file=sys.stderr)
        return USAGE
    device = "cuda" if cuda and namespace.device != "cpu" else "cpu"
    rooms = namespace.rooms or list(BACKENDS)
    cases = [case for name, case in CASES.items() if namespace.only is None or namespace.only.search(name)]
    if namespace.lines:
        for room in rooms:
            for row in _in_here(room, cases, device):
                print(json.dumps(asdict(row)), flush=True)
        return OK
    console = Console(highlight=False)
    rows: list[Checked] = []
    with progress_on(console, len(rooms) * len(cases)) as progress:
        for room in rooms:
            found = (
                _in_child(room, cases, namespace.only) if _wants_child(room, device) else _in_here(room, cases, device)
            )
            for row in found:
                progress.step(f"{room} · {row.case}")
                rows.append(row)
    _print_checked(console, rows, rooms, device, verbose=namespace.verbose)
    if namespace.json is not None:
        namespace.json.parent.mkdir(parents=True, exist_ok=True)
        namespace.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
        console.print(f"written: {namespace.json}", soft_wrap=True)
    if any(row.ok is False for row in rows):
        return WRONG
    return OK if any(row.ok for row in rows) else NOTHING_RAN


def _in_here(room: str, cases: list[Case], device: str) -> Iterator[Checked]:
    import fastattn
    from fastattn import dispatch
    from fastattn.testing import agreement, make_inputs, run

    grads = hasattr(dispatch.room(room), "backward")
    for case in cases:
        problem = make_inputs(case, device)
        try:
            agreements = agreement(problem, run(problem, room, grads=grads))
        except fastattn.BackendUnavailable as refusal:
            yield Checked(room, case.id, None, words=_reason(str(refusal)))
            continue
        except Exception as failure:
            yield Checked(room, case.id, False, words=f"{type(failure).__name__}: {failure}")
            continue
        tensors = [row for row in agreements if row.name != "lse"]
        wrong = [str(row) for row in agreements if not row.ok]
        yield Checked(
            room,
            case.id,
            not wrong,
            max(row.rms_ratio for row in tensors),
            max(row.max_ratio for row in tensors),
            max((row.share for row in agreements if row.name == "lse"), default=None),
            max(row.share for row in agreements),
            "; ".join(wrong) or None,
        )


def _wants_child(room: str, device: str) -> bool:
    """Triton runs on a CPU in its interpreter alone, which must be chosen before Triton is imported."""
    return room == "triton" and device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1"


def _in_child(room: str, cases: list[Case], only: re.Pattern[str] | None) -> Iterator[Checked]:
    """The same rows, one by one, from a process of its own with Triton's interpreter."""
    if importlib.util.find_spec("triton") is None:
        for case in cases:
            yield Checked(room, case.id, None, words="triton is not installed")
        return
    flags = ["--rooms", room, "--device", "cpu", "--lines", *(["--only", only.pattern] if only else [])]
    command = [sys.executable, "-m", "fastattn.cli", "check", *flags]
    done = 0
    with (
        tempfile.TemporaryFile("w+") as stderr,
        subprocess.Popen(
            command, env={**os.environ, "TRITON_INTERPRET": "1"}, stdout=subprocess.PIPE, stderr=stderr, text=True
        ) as process,
    ):
        for line in process.stdout or ():
            yield Checked(**json.loads(line))
            done += 1
        process.wait()
        stderr.seek(0)
        last = (stderr.read().strip().splitlines() or ["no message"])[-1]
    for case in cases[done:]:
        yield Checked(room, case.id, False, words=f"the child process ended with {process.returncode}: {last}")


def _reason(refusal: str) -> str:
    """The reason inside BackendUnavailable's sentence."""
    match = re.search(r"cannot run this call: (.*?)\. (?:What can:|backend=None)", refusal, re.DOTALL)
    return match[1] if match else refusal


def _print_checked(console: Console, rows: list[Checked], rooms: list[str], device: str, *, verbose: bool) -> None:
    """A line a room; failures always, every case and the reasons of the refused with --verbose."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2), header_style="dim")
    for title in ("room", "case", ""):
        table.add_column(title, no_wrap=True)
    for title in ("RMS", "worst", "lse", "used"):
        table.add_column(title, justify="right", no_wrap=True)
    for row in rows if verbose else [row for row in rows if row.ok is False]:
        mark = {True: "[green]✓[/]", False: "[bold red]✗[/]", None: "[dim]-[/]"}[row.ok]
        figures = [_figure(row.rms_ratio, "x"), _figure(row.max_ratio, "x"), _figure(row.lse_share), _figure(row.share)]
        table.add_row(row.room, row.case, mark, *figures)
    for room in rooms:
        of_room = [row for row in rows if row.room == room]
        ran = [row for row in of_room if row.ok is not None]
        good = sum(row.ok is True for row in ran)
        mark = "[dim]-[/]" if not ran else "[green]✓[/]" if good == len(ran) else "[bold red]✗[/]"
        figures = [
            _most(ran, "rms_ratio", "x"),
            _most(ran, "max_ratio", "x"),
            _most(ran, "lse_share"),
            _most(ran, "share"),
        ]
        summary = f"{good} of {len(ran)} right" + (
            f", {len(of_room) - len(ran)} refused" if len(of_room) > len(ran) else ""
        )
        table.add_row(f"[bold]{room}[/]", f"[bold]{summary}[/]", mark, *figures)
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
            refused.setdefault(f"{row.room}: {row.words}", []).append(row.case)
    for words, names in refused.items():
        shown = names if verbose else names[:MOST_NAMES]
        more = f" and {len(names) - len(shown)} more" if len(names) > len(shown) else ""
        console.print(f"refused by {words} ({', '.join(shown)}{more})", style="dim", markup=False)
    for row in rows:
        if row.ok is False:
            console.print(f"✗ {row.room}, {row.case}: {row.words}", style="bold red", markup=False)


def _figure(number: float | None, unit: str = "") -> str:
    return "" if number is None else f"{number:.2f}{unit}"


def _most(rows: list[Checked], name: str, unit: str = "") -> str:
    return _figure(max((value for row in rows if (value := getattr(row, name)) is not None), default=None), unit)


if __name__ == "__main__":
    sys.exit(main())
