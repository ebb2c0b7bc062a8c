"""The command line: `fastattn bench | build | check | info | inspect`.

Sub-commands import what they need, help little.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

OK, USAGE = 0, 2

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
    from fastattn.cli import build as building
    from fastattn.cli import check as checking
    from fastattn.cli import inspect_triton, models

    parser = argparse.ArgumentParser("fastattn", description="Every kind of attention as one fused call.")
    parser.add_argument("--version", action="store_true", help="print the version and leave")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    bench = commands.add_parser("bench", help="time attention beside PyTorch's own, and a real model")
    bench.set_defaults(run=_bench)
    build = commands.add_parser("build", help="build a library now, instead of at the first call that needs it")
    building.add_arguments(build)
    build.set_defaults(run=building.run)
    check = commands.add_parser("check", help="hold every room against float64 on this machine")
    checking.add_arguments(check)
    check.set_defaults(run=checking.run)
    inspected = commands.add_parser("inspect", help="compile the GPU kernels, without a GPU, and show what they became")
    inspect_triton.add_arguments(inspected)
    inspected.set_defaults(run=inspect_triton.run)
    compared = commands.add_parser("models", help="hold real architectures against their library's eager attention")
    models.add_arguments(compared)
    compared.set_defaults(run=models.run)
    info = commands.add_parser("info", help="what this machine has, which rooms run, and why not the others")
    info.set_defaults(run=_info)
    return parser


def _print_version() -> int:
    from fastattn import __version__

    print(f"fastattn {__version__}")
    return OK


def _bench(namespace: argparse.Namespace, argv: list[str]) -> int:
    from fastattn.bench import command, options
    from fastattn.bench.report import compare, doc_tables

    for word, verb in (("compare", compare.main), ("report", doc_tables.main)):
        if argv[1:2] == [word]:
            return verb(argv[2:])
    return command.main(options.parse(argv[1:]))


# ---- info


def _info(namespace: argparse.Namespace, argv: list[str]) -> int:
    """Machine, software, rooms."""
    import torch
    from rich.console import Console

    from fastattn.bench.measure import env

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
    from fastattn.building import cpu_library, cuda_library

    commit = f", commit {block['commit'][:9]}{' with changes' if block['dirty'] else ''}" if block["commit"] else ""
    names = {name for name in os.environ if name in ("TRITON_INTERPRET", "CXX") or name.startswith("FASTATTN_")}
    pairs = {
        "fastattn": f"{fastattn.__version__} in {Path(fastattn.__file__).parent}{commit}",
        "Python": f"{block['python']} on {block['platform']}",
        "torch": block["torch"],
        "triton": block["triton"] or "not installed (pip install 'fastattn[triton]', Linux only)",
        "C++ compiler": block["cxx"] or "none: torch.compile cannot build for the CPU",
        "CPU library": cpu_library.state(),
        "CUDA library": cuda_library.state(),
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


if __name__ == "__main__":
    sys.exit(main())
