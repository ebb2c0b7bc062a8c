"""The machine and the versions behind a measurement: the environment block of every report."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

CLOCKS = "clocks.sm,clocks.max.sm,clocks.mem,power.draw,power.limit,temperature.gpu"

COMMIT = "FASTATTN_COMMIT"
SAY_COMMIT = f"where there is no .git, {COMMIT}=$(git rev-parse HEAD), expanded where the copy was made, says which"

BUSY = 0.5
"""A load average above this many running tasks a core, before the benchmark starts, is worth a warning."""


def environment(device_type: str, argv: list[str] | None = None) -> dict[str, Any]:
    """Everything a reader needs to judge a figure, as plain JSON types."""
    import torch

    import fastattn

    block: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(["fastattn", *argv]) if argv is not None else None,
        "fastattn": fastattn.__version__,
        **_commit(),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "torch": torch.__version__,
        "triton": version("triton"),
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "load_average": load_average(),
        "cxx": cxx(),
        "device": device_type,
        "gpu": None,
    }
    if device_type == "cuda":
        block |= _gpu()
    block["busy"] = bool(block["load_average"] and block["load_average"][0] > BUSY * (block["cores"] or 1))
    return block


def headline(block: dict[str, Any]) -> str:
    """The block in one line for people."""
    where = block["gpu"] or f"{block['cpu']}, {say_threads(block)}"
    commit = f" ({block['commit'][:9]}{' + changes' if block['dirty'] else ''})" if block["commit"] else ""
    cuda = f", CUDA {block['cuda']}" if block.get("cuda") else ""
    return f"{where} · torch {block['torch']}{cuda} · Python {block['python']} · fastattn {block['fastattn']}{commit}"


def say_busy(block: dict[str, Any]) -> str:
    """A sentence where the machine had other work; empty where it had none."""
    if not block.get("busy"):
        return ""
    load, cores = block["load_average"][0], block["cores"]
    return f"The machine was busy (load {load} on {cores} cores): times are too long, ratios less so."


def say_threads(block: dict[str, Any]) -> str:
    return "1 thread" if block["threads"] == 1 else f"{block['threads']} threads"


def device_name(block: dict[str, Any]) -> str:
    """The device as part of a file name."""
    name = block["gpu"] or "cpu"
    return "".join(letter if letter.isalnum() else "-" for letter in name.lower()).strip("-")


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def cpu_model() -> str:
    """The processor's marketing name where the system tells."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.lower().startswith(("model name", "hardware", "cpu model")):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    if sys.platform == "darwin":
        return _output(["sysctl", "-n", "machdep.cpu.brand_string"]) or platform.processor()
    return platform.processor() or platform.machine()


def load_average() -> list[float] | None:
    """Running tasks over 1, 5 and 15 minutes; None where the system keeps no such figure."""
    try:
        return [round(load, 2) for load in os.getloadavg()]
    except (AttributeError, OSError):
        return None


def cxx() -> str | None:
    """The C++ compiler that torch.compile would use on a CPU, by full path."""
    default = "clang++" if sys.platform == "darwin" else "cl" if sys.platform == "win32" else "g++"
    return shutil.which(os.environ.get("CXX", default))


def _gpu() -> dict[str, Any]:
    import torch

    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "gpu": properties.name,
        "gpu_count": torch.cuda.device_count(),
        "gpu_memory": properties.total_memory,
        "gpu_capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "driver": _output(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "-i", "0"]),
        "gpu_clocks": gpu_state(),
    }


def gpu_state() -> dict[str, str] | None:
    """Clocks, power and temperature with their units, by nvidia-smi; None where it does not answer."""
    line = _output(["nvidia-smi", f"--query-gpu={CLOCKS}", "--format=csv,noheader", "-i", "0"])
    values = [] if line is None else [each.strip() for each in line.splitlines()[0].split(",")]
    names = CLOCKS.split(",")
    return dict(zip(names, values, strict=True)) if len(values) == len(names) else None


def _commit() -> dict[str, Any]:
    """The commit of the checkout this file lies in, and whether tracked files differ from it. Outside of one, of a copy
    that somebody sent without its .git, what they said: FASTATTN_COMMIT, or a file COMMIT at the root of the
    tree; whether the copy has changes nobody knows.
    """
    here = ["git", "-C", str(Path(__file__).resolve().parent)]
    tracked = _output([*here, "ls-files", "--error-unmatch", Path(__file__).name])
    if not tracked:
        return {"commit": _said_commit(), "dirty": None}
    return {
        "commit": _output([*here, "rev-parse", "HEAD"]),
        "dirty": bool(_output([*here, "status", "--porcelain", "--untracked-files=no"])),
    }


def _said_commit() -> str | None:
    """ValueError where what was said is no commit: a variable that no shell has expanded, say."""
    path = Path(__file__).resolve().parents[2] / "COMMIT"
    said = os.environ.get(COMMIT) or (path.read_text() if path.is_file() else "")
    if said.strip() and not re.fullmatch(r"[0-9a-f]{40}", said.strip()):
        raise ValueError(f"{COMMIT}: the 40 digits of a commit are needed, got {said.strip()!r}; {SAY_COMMIT}")
    return said.strip() or None


def _output(command: list[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
