"""CUDA sources for the simulator of csrc/sim: a .cu file compiled by the C++ compiler into a library that runs its
kernels on the CPU. For tests and for who writes kernels; nothing of a call of `attention` comes here.

`python -m fastattn.testing.simulator kernel.cu [plain | checked | addresses]` builds one and prints where it lies.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from fastattn.building import build_cache, commands, compiler
from fastattn.building.commands import BuildError
from fastattn.building.compiler import Compiler, Step
from fastattn.building.library_files import LOCK
from fastattn.building.manifest import SUFFIX as RECORD
from fastattn.building.manifest import Manifest

FLAGS = ("-std=c++17", "-O2", "-g1", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra")
AS_KERNEL = ("-DFASTATTN_SIM", "-Wno-unknown-pragmas", "-x", "c++")
ADDRESSES = ("-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer")
FLAVOURS = {
    "plain": ("as it is: the quickest, for results", ()),
    "checked": ("each access to shared memory is held against the barriers", ("-fsanitize=thread",)),
    "addresses": ("AddressSanitizer and UBSan; the process must have loaded their libraries", ADDRESSES),
}
"""What each is for, and what its kernels are compiled with."""

MACHINES = ("x86_64", "amd64")
INCLUDE = re.compile(r'^\s*#\s*include\s+"([^"]+)"', re.MULTILINE)


def why_not() -> str | None:
    """Why no kernel can be simulated here; None where one can."""
    if sys.platform != "linux" or platform.machine().lower() not in MACHINES:
        return f"the simulator runs on Linux on x86-64, and this is {sys.platform} on {platform.machine()}"
    try:
        compiler.find_compiler()
    except BuildError as refusal:
        return str(refusal)
    return None


class Part(NamedTuple):
    """One translation unit of a library: a file, and what it is compiled with beside the flavour's own flags."""

    source: Path
    flags: tuple[str, ...] = ()


def usual_flavour() -> str:
    """The checks, or AddressSanitizer where this process was started with it."""
    return "addresses" if hasattr(ctypes.CDLL(None), "__asan_init") else "checked"


def sanitized() -> dict[str, str]:
    """The environment of a process that may load libraries of the flavour `addresses`.

    Raises:
        BuildError: no compiler, or one without sanitizers.
    """
    found = compiler.find_compiler()
    # Loaded before Python, which was not compiled with them; the last one so that they find what throws.
    files = []
    for name in ("libasan.so", "libubsan.so", "libstdc++.so"):
        said = commands.call((*found.command, f"-print-file-name={name}"), commands.VERSION_LIMIT).said.strip()
        if not Path(said).is_absolute():
            raise BuildError(f"{found.version} has no {name}")
        files.append(said)
    return os.environ | {
        "LD_PRELOAD": " ".join(files),
        "ASAN_OPTIONS": "detect_leaks=0:detect_odr_violation=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }


def build(source: Path, flavour: str = "plain", defines: Sequence[str] = ()) -> Path:
    """The library of one .cu file, from the cache folder or compiled into it.

    Raises:
        BuildError: no compiler, or its first error with the command.
    """
    return build_library(source.stem, [Part(source, tuple(f"-D{name}" for name in defines))], flavour)


def build_library(name: str, parts: Sequence[Part], flavour: str = "plain", link: Sequence[str] = ()) -> Path:
    """The same of several translation units; `link` is what the linker is told at last."""
    refused = why_not()
    if refused is not None:
        raise BuildError(refused)
    if flavour not in FLAVOURS:
        raise ValueError(f"flavour={flavour!r} is none of {', '.join(FLAVOURS)}")
    found = compiler.find_compiler()
    flags = (*FLAGS, *FLAVOURS[flavour][1])
    steps = []
    for n, part in enumerate(parts):
        translate = (*AS_KERNEL, "-c", str(part.source.resolve()), "-o", f"{n}.o")
        steps.append(Step(f"{n}.o", (*found.command, *flags, *part.flags, *translate)))
    # The checks' hooks answer what -fsanitize=thread calls; linked with that flag, its own runtime would.
    sanitizer = FLAVOURS[flavour][1] if flavour == "addresses" else ()
    runtime = _runtime(found, flavour)
    objects = [str(each) for each in runtime.iterdir() if flavour == "checked" or not each.name.startswith("hooks")]
    command = (*found.command, *sanitizer, "-shared", *(step.output for step in steps), *sorted(objects), *link)
    library = Step("library.so", (*command, "-o", "library.so"))
    key = _key(found, [part.source for part in parts], *(step.command for step in steps), library.command)
    return _made(cache_folder() / f"{name}_{key}.so", [*steps, library], library.output)


def load(path: Path, *, seed: int = 0, fixed_order: bool = False, resident: int = 2) -> ctypes.CDLL:
    """The library, with the schedule of its next launches: one drawn from `seed`, or threads in turn and copies as late
    as they may; `resident` blocks at a time.
    """
    with build_cache.made(path.parent) as folder, folder.opened(path.name):
        library = build_cache.load(path, None)
    schedule(library, seed=seed, fixed_order=fixed_order, resident=resident)
    return library


def schedule(library: ctypes.CDLL, *, seed: int = 0, fixed_order: bool = False, resident: int = 2) -> None:
    """Another schedule for the next launches of a loaded library."""
    library.fastattn_sim_options(ctypes.c_uint64(seed), int(fixed_order), resident)


class Stored(NamedTuple):
    """What kernels have written to global memory by `arch::store_global`."""

    bytes: int
    sectors: int  # of 32 bytes, as often as an instruction of a warp has written some of one


def stored(library: ctypes.CDLL, lane_bytes: int) -> Stored:
    """What a loaded library's kernels have written by stores of 4, 8 or 16 bytes a lane since this was last asked."""
    found = (ctypes.c_uint64 * 2)()
    pointers = (ctypes.byref(found, n * ctypes.sizeof(ctypes.c_uint64)) for n in range(2))
    library.fastattn_sim_stored(ctypes.c_uint64(lane_bytes), *pointers)
    return Stored(*found)


def _runtime(found: Compiler, flavour: str) -> Path:
    """The folder of the simulator's own objects. Only AddressSanitizer needs other ones."""
    extra = ADDRESSES if flavour == "addresses" else ()
    sources = sorted((compiler.sources() / "sim").glob("*.cpp"))
    steps = [
        Step(f"{path.stem}.o", (*found.command, *FLAGS, *extra, "-c", str(path), "-o", f"{path.stem}.o"))
        for path in sources
    ]
    key = _key(found, sources, *(step.command for step in steps))
    return _made(cache_folder() / f"runtime_{key}", steps, None)


def _made(path: Path, steps: list[Step], output: str | None) -> Path:
    """Run the steps unless their result is there; it is the file `output`, or the whole folder of objects."""

    def make(folder: Path) -> Path:
        compiler.run(steps, folder)
        if output is not None:
            return folder / output
        for file in folder.iterdir():
            if file.suffix != ".o" and file.is_file():
                file.unlink()  # ninja's notes
        return folder

    return once(path, make)


def once(path: Path, make: Callable[[Path], Path]) -> Path:
    """`path`, a file or a folder; where it is not there, what `make` makes in the folder that it is given, and returns
    the place of. Processes that want it at the same time wait for the one that makes it, and it becomes visible whole;
    a file that is another than was made is made again.
    """
    record = path.stem + RECORD
    with build_cache.made(path.parent) as folder, folder.locked(path.stem + LOCK, path.name):
        if path.is_dir() and not path.is_symlink():
            return path
        if path.name in folder.names():
            manifest = Manifest.read(folder.read(record))
            with folder.opened(path.name) as descriptor:
                if manifest is not None and manifest.damage(descriptor) is None:
                    return path
        with folder.scratch(path.stem) as scratch:
            objects = scratch / "objects"
            objects.mkdir()
            made = make(objects)
            if made.is_dir():
                os.replace(made, path)
                return path
            with made.open("rb") as file:
                manifest = Manifest.of(file.fileno(), {})
            folder.remove(record)
            folder.take(made, path.name)
        folder.write(record, manifest.to_bytes())
    return path


def cache_folder() -> Path:
    """Where kernels of tests lie, the simulator's and those that nvcc made."""
    return build_cache.asked_folder() / "simulator"


def _key(found: Compiler, files: list[Path], *commands: tuple[str, ...]) -> str:
    """Of the files, all that they include, the compiler and what it is told."""
    digest = hashlib.sha256(found.version.encode())
    for path in included(files):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    for command in commands:
        digest.update("\0".join(command).encode())
    return digest.hexdigest()[:24]


def included(files: list[Path]) -> list[Path]:
    """The files and what they name in quotes, and what those name."""
    seen: dict[Path, None] = {}
    waiting = [path.resolve() for path in files]
    while waiting:
        path = waiting.pop()
        if path in seen or not path.exists():
            continue
        seen[path] = None
        waiting += [(path.parent / name).resolve() for name in INCLUDE.findall(path.read_text())]
    return sorted(seen)


if __name__ == "__main__":
    print(build(Path(sys.argv[1]), *sys.argv[2:3]))
