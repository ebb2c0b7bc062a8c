"""The CUDA compiler of this machine, and what it is told: the CUDA backend's translation units, for Hopper."""

from __future__ import annotations

import functools
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from fastattn.building import compiler
from fastattn.building.commands import BuildError, PassingError
from fastattn.building.compiler import Compiler, Step

ARCHITECTURE = ("-gencode=arch=compute_90a,code=sm_90a",)
DTYPES = ("bf16", "f16")
WIDTHS = ((64, 64), (96, 96), (128, 128), (192, 128), (192, 192), (256, 256))
"""Heads' widths, keys' and values', that there are kernels for: kWidths of csrc/cuda/tiles.h."""

FLAGS = ("-std=c++17", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden")
NO_NVCC = "no nvcc is found (looked at CUDA_HOME, CUDA_PATH, PATH and /usr/local/cuda); it comes with the CUDA toolkit"
TOO_OLD = "nvcc {0}.{1} is too old for Hopper's instructions; 12.3 or newer is needed"
OLDEST = (12, 3)
RELEASE = re.compile(r"release (\d+)\.(\d+)(?:, V([\d.]+))?")


def named_nvcc() -> str:
    """The toolkit that CUDA_HOME or CUDA_PATH names; empty where neither does."""
    return os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or ""


def find_nvcc() -> Compiler:
    """nvcc of CUDA_HOME or CUDA_PATH, on PATH, or where the toolkit puts it. BuildError where none works."""
    return _find_nvcc(*_environment())


def locate_nvcc() -> Compiler | None:
    """The first nvcc that lies where it is looked for. Nothing is run, so that it may be none."""
    return next((Compiler((found,)) for found in _programs(*_environment())), None)


def _environment() -> list[str | None]:
    return [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH", "PATH")]


def _programs(home: str | None, other_home: str | None, path: str | None) -> Iterator[str]:
    folders = [str(Path(each) / "bin") for each in (home, other_home) if each]
    for where in (*folders, path, "/usr/local/cuda/bin"):
        found = shutil.which("nvcc", path=where)
        if found is not None:
            yield found


@functools.cache
def _find_nvcc(home: str | None, other_home: str | None, path: str | None) -> Compiler:
    hung = []
    for found in _programs(home, other_home, path):
        try:
            release = RELEASE.search(compiler.version_of((found,)))
        except PassingError:
            raise
        except BuildError as refusal:
            hung.append(str(refusal))
            continue
        if release:
            number = int(release[1]), int(release[2])
            if number < OLDEST:
                raise BuildError(TOO_OLD.format(*number))
            return Compiler((found,), f"nvcc {release[3] or release[0].split()[-1]}")
    raise BuildError("; ".join([NO_NVCC, *hung]))


def kernel_flags(dtype: str, width: int, width_v: int) -> tuple[str, ...]:
    """Which forward kernels csrc/cuda/forward.cu is compiled to."""
    return f"-DFASTATTN_T={dtype}", f"-DFASTATTN_WIDTH={width}", f"-DFASTATTN_WIDTH_V={width_v}"


def parts() -> dict[str, tuple[Path, tuple[str, ...]]]:
    """By the object's name, every translation unit: its file and its own flags. The simulator compiles the same."""
    root = compiler.sources()
    kernels = {
        f"forward_{dtype}_{width}_{width_v}": (root / "cuda" / "forward.cu", kernel_flags(dtype, width, width_v))
        for dtype in DTYPES
        for width, width_v in WIDTHS
    }
    torch = ("-isystem", str(compiler.torch_folder() / "include"), f"-DTORCH_TARGET_VERSION={compiler.TORCH_ABI}")
    ops = root / "ops.cpp", ("-DFASTATTN_CUDA_BACKEND", *torch)
    return {**kernels, "dispatch": (root / "cuda" / "dispatch.cu", ()), "ops": ops}


def plan(found: Compiler, library: str) -> list[Step]:
    """The steps that make `library`; the last one links what the others made."""
    steps = [
        Step(f"{name}.o", (*found.command, *FLAGS, *ARCHITECTURE, *flags, "-c", str(source), "-o", f"{name}.o"))
        for name, (source, flags) in parts().items()
    ]
    torch = ("-L" + str(compiler.torch_folder() / "lib"), "-ltorch_cpu")
    command = (*found.command, "-shared", *ARCHITECTURE, *(step.output for step in steps), *torch, "-o", library)
    return [*steps, Step(library, command)]
