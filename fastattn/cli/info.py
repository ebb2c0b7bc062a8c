"""`fastattn info`: what this machine has, which backends run here, and why not the others."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import argparse

    from rich.console import Console

OK = 0


def run(namespace: argparse.Namespace, argv: list[str]) -> int:
    """Machine, software, backends. Always 0."""
    import torch
    from rich.console import Console

    from fastattn.bench.measure import env

    block = env.environment("cuda" if torch.cuda.is_available() else "cpu")
    console = Console(highlight=False)
    _print_pairs(console, "machine", _machine(block))
    _print_pairs(console, "software", _software(block))
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    for device in devices:
        _print_backends(console, device)
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


def _print_backends(console: Console, device: str) -> None:
    """Which backends would run a plain causal call that wants gradients, in the dtype that suits the device."""
    import torch

    import fastattn

    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    query = torch.empty(1, 8, 1024, 64, dtype=dtype, device=device, requires_grad=True)
    try:
        verdict = fastattn.explain(query, query, query, mask=fastattn.masks.Causal())
    except (fastattn.BackendUnavailable, ValueError) as refusal:
        console.print(f"backends on {device}", style="bold cyan")
        console.print(f"  {refusal}", markup=False)
        return
    pairs = {}
    for backend, reason in verdict.reasons.items():
        words = verdict.of(backend).replace("[", "\\[")
        pairs[backend] = f"[green]{words}[/]" if reason is None else words
    name = str(dtype).removeprefix("torch.")
    _print_pairs(console, f"backends, for a causal call in {name} on {device} and its gradients", pairs)
    for note in verdict.notes:
        console.print(f"  note: {note}", markup=False)
