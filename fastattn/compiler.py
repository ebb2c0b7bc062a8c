"""The C++ compiler of this machine, and what it is told: translation units, flags, one shared library out of them."""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

NAMES = ("c++", "g++", "clang++")
"""Looked for in this order, where CXX names none."""

TORCH_ABI = "0x020b000000000000"
"""The oldest LibTorch stable ABI that the library runs on: 2.11."""

FLAGS = (
    "-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast",
)  # fmt: skip
AVX2 = ("-mavx2", "-mfma", "-mf16c")
AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c")
AVX512BF16 = (*AVX512, "-mavx512bf16")
X86 = {"kernel_avx2": AVX2, "kernel_avx512": AVX512, "kernel_avx512bf16": AVX512BF16, "kernel_amx": AVX512BF16}
"""A translation unit for each instruction set: no other is compiled for more than the architecture's least."""

ERROR = re.compile(r"\b(?:fatal )?error\b", re.IGNORECASE)
NO_COMPILER = "no C++ compiler is found ({0}); install g++ or clang++, or name one in CXX"


class BuildError(RuntimeError):
    """The library is not there and could not be made; the message is a sentence."""


@dataclass(frozen=True)
class Compiler:
    """How it is called, and the first line of what it says of itself."""

    command: tuple[str, ...]
    version: str


@dataclass(frozen=True)
class Step:
    """One command that makes one file in the folder it runs in."""

    output: str
    command: tuple[str, ...]


def sources() -> Path:
    """The folder of the C++ sources: within the installed package, or beside it in a checkout."""
    inside = Path(__file__).parent / "csrc"
    return inside if inside.is_dir() else Path(__file__).parent.parent / "csrc"


@functools.cache
def source_digest(room: str) -> str:
    """Of every C++ file of a room, its name and what it says: the room's own, and those that all share."""
    root = sources()
    digest = hashlib.sha256()
    for path in sorted([*root.glob("*"), *(root / "common").rglob("*"), *(root / room).rglob("*")]):
        if path.suffix in (".h", ".cpp", ".cu"):
            digest.update(f"{path.relative_to(root).as_posix()}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def find_compiler() -> Compiler:
    """The one that CXX names, or the first of NAMES. BuildError where none works."""
    return _find_compiler(os.environ.get("CXX", "").strip() or None, os.environ.get("PATH"))


def words(name: str, text: str) -> list[str]:
    """A variable's value as words of a command line."""
    try:
        return shlex.split(text)
    except ValueError as refusal:
        raise BuildError(f"{name}={text} is no command line ({refusal})") from refusal


@functools.cache
def _find_compiler(named: str | None, path: str | None) -> Compiler:
    for command in [words("CXX", named)] if named else [[name] for name in NAMES]:
        found = shutil.which(command[0], path=path)
        if found is None:
            continue
        try:
            said = subprocess.run([found, *command[1:], "--version"], capture_output=True, text=True, check=False)
        except OSError:  # a file of that name that is no program
            continue
        if said.returncode == 0 and said.stdout.strip():
            return Compiler((found, *command[1:]), said.stdout.strip().splitlines()[0])
    raise BuildError(NO_COMPILER.format(f"CXX={named}" if named else f"looked for {', '.join(NAMES)}"))


def key(room: str, version: str, steps: list[Step]) -> str:
    """One name for equal libraries of a room: sources, flags, the compiler's version, machine, torch's headers."""
    import torch

    said = [source_digest(room), version, platform.machine(), sys.platform, *torch.__version__.split(".")[:2]]
    for step in steps:  # where the sources and torch lie makes no other library
        said += [part.replace(str(sources()), "").replace(str(torch_folder()), "") for part in step.command]
    return hashlib.sha256("\0".join(said).encode()).hexdigest()[:24]


def plan(compiler: Compiler, library: str) -> list[Step]:
    """The steps that make `library`; the last one links what the others made. CXXFLAGS and LDFLAGS are heeded."""
    root, torch = sources(), torch_folder()
    extra, link = (words(name, os.environ.get(name, "")) for name in ("CXXFLAGS", "LDFLAGS"))
    files: dict[str, tuple[str, ...]] = {"cpu/room": (), "cpu/kernel_generic": ()}
    if platform.machine().lower() in ("x86_64", "amd64"):
        files |= {f"cpu/{name}": flags for name, flags in X86.items()}
    files["ops"] = ("-isystem", str(torch / "include"), f"-DTORCH_TARGET_VERSION={TORCH_ABI}")
    steps = [
        Step(
            f"{name.replace('/', '_')}.o",
            (
                *compiler.command,
                *FLAGS,
                *flags,
                *extra,
                "-c",
                str(root / f"{name}.cpp"),
                "-o",
                f"{name.replace('/', '_')}.o",
            ),
        )
        for name, flags in files.items()
    ]
    objects = [step.output for step in steps]
    torch_is = ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else [f"-L{torch / 'lib'}", "-ltorch_cpu"]
    command = (*compiler.command, "-shared", *extra, *objects, *torch_is, *link, "-o", library)
    return [*steps, Step(library, command)]


def torch_folder() -> Path:
    """Where torch is installed: its headers and libraries are below."""
    import torch

    return Path(torch.__file__).parent


def run(steps: list[Step], folder: Path) -> None:
    """Run the steps in a folder, all but the last at once: with ninja where there is one. BuildError if one fails."""
    ninja = shutil.which("ninja")
    if ninja:
        _run_ninja(ninja, steps, folder)
        return
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        for step, done in zip(steps[:-1], pool.map(lambda step: _call(step.command, folder), steps[:-1]), strict=True):
            _check(step, *done)
    _check(steps[-1], *_call(steps[-1].command, folder))


def _call(command: tuple[str, ...], folder: Path) -> tuple[int, str]:
    """Exit code, and standard output with the errors in it."""
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            check=False,
        )
    except OSError as refusal:
        return 1, f"error: {refusal}"
    return done.returncode, done.stdout


def _run_ninja(ninja: str, steps: list[Step], folder: Path) -> None:
    """Ninja's own log says which step failed."""
    lines = ["rule step", "  command = $words"]
    for step in steps:
        needs = " ".join(each.output for each in steps[:-1]) if step is steps[-1] else ""
        lines += [f"build {step.output}: step {needs}", f"  words = {shlex.join(step.command).replace('$', '$$')}"]
    (folder / "build.ninja").write_text("\n".join(lines) + "\n")
    code, said = _call((ninja, "-C", str(folder)), folder)
    failed = re.search(r"^FAILED: (?:\[.*?\] )?(\S+)", said, re.MULTILINE)
    step = next((step for step in steps if failed and step.output == failed[1]), steps[-1])
    _check(step, code, said[failed.start() :].partition("\n")[2].partition("\n")[2] if failed else said)


def _check(step: Step, code: int, said: str) -> None:
    if code == 0:
        return
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    first = next((line for line in lines if ERROR.search(line)), lines[0] if lines else f"exit code {code}")
    raise BuildError(f"the compiler says: {first}\nthe command was: {shlex.join(step.command)}")
