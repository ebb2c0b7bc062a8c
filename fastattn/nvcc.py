"""The CUDA compiler of this machine, and what it is told: the CUDA room's translation units, for Hopper."""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
from pathlib import Path

from fastattn import compiler
from fastattn.compiler import BuildError, Step

ARCHITECTURE = ("-gencode=arch=compute_90a,code=sm_90a",)
DTYPES = ("bf16", "f16")
WIDTHS = ((64, 64), (96, 96), (128, 128), (192, 128), (192, 192), (256, 256))
"""Heads' widths, keys' and values', that there are kernels for: kWidths of csrc/cuda/tiles.h."""

FLAGS = ("-std=c++17", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden")
NO_NVCC = "no nvcc is found (looked at CUDA_HOME, CUDA_PATH, PATH and /usr/local/cuda); it comes with the CUDA toolkit"
TOO_OLD = "nvcc {0}.{1} is too old for Hopper's instructions; 12.3 or newer is needed"
OLDEST = (12, 3)
RELEASE = re.compile(r"release (\d+)\.(\d+)(?:, V([\d.]+))?")


def find_nvcc() -> compiler.Compiler:
    """nvcc of CUDA_HOME or CUDA_PATH, on PATH, or where the toolkit puts it. BuildError where none works."""
    return _find_nvcc(*(os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH", "PATH")))


@functools.cache
def _find_nvcc(home: str | None, other_home: str | None, path: str | None) -> compiler.Compiler:
    folders = [Path(each) / "bin" for each in (home, other_home) if each]
    for found in [*(shutil.which("nvcc", path=str(each)) for each in folders), shutil.which("nvcc", path=path),
                  shutil.which("nvcc", path="/usr/local/cuda/bin")]:  # fmt: skip
        if found is None:
            continue
        said = subprocess.run([found, "--version"], capture_output=True, text=True, check=False)
        release = RELEASE.search(said.stdout)
        if said.returncode == 0 and release:
            number = int(release[1]), int(release[2])
            if number < OLDEST:
                raise BuildError(TOO_OLD.format(*number))
            return compiler.Compiler((found,), f"nvcc {release[3] or release[0].split()[-1]}")
    raise BuildError(NO_NVCC)


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
    ops = root / "ops.cpp", ("-DFASTATTN_CUDA_ROOM", *torch)
    return {**kernels, "room": (root / "cuda" / "room.cu", ()), "ops": ops}


def plan(found: compiler.Compiler, library: str) -> list[Step]:
    """The steps that make `library`; the last one links what the others made."""
    steps = [
        Step(f"{name}.o", (*found.command, *FLAGS, *ARCHITECTURE, *flags, "-c", str(source), "-o", f"{name}.o"))
        for name, (source, flags) in parts().items()
    ]
    torch = ("-L" + str(compiler.torch_folder() / "lib"), "-ltorch_cpu")
    command = (*found.command, "-shared", *ARCHITECTURE, *(step.output for step in steps), *torch, "-o", library)
    return [*steps, Step(library, command)]
