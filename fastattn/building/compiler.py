"""The C++ compiler of this machine, and what it is told: translation units, flags, one shared library out of them."""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from fastattn.building import commands
from fastattn.building.commands import BuildError, Done, PassingError

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


@dataclass(frozen=True)
class Compiler:
    """How it is called, and the first line of what it says of itself: empty where it has not been asked."""

    command: tuple[str, ...]
    version: str = ""

    def program(self) -> list[int]:
        """Size and time of change of the program's file: another one is another compiler."""
        status = os.stat(self.command[0])
        return [status.st_size, status.st_mtime_ns]


@dataclass(frozen=True)
class Step:
    """One command that makes one file in the folder it runs in."""

    output: str
    command: tuple[str, ...]


def sources() -> Path:
    """The folder of the C++ sources: within the installed package, or beside it in a checkout."""
    package = Path(__file__).parents[1]
    inside = package / "csrc"
    return inside if inside.is_dir() else package.parent / "csrc"


@functools.cache
def source_digest(backend: str) -> str:
    """Of every C++ file of a backend, its name and what it says: the backend's own, and those that all share."""
    root = sources()
    digest = hashlib.sha256()
    for path in sorted([*root.glob("*"), *(root / "common").rglob("*"), *(root / backend).rglob("*")]):
        if path.suffix in (".h", ".cpp", ".cu"):
            digest.update(f"{path.relative_to(root).as_posix()}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def named_compiler() -> str:
    """What CXX says; empty where the choice is free."""
    return os.environ.get("CXX", "").strip()


def find_compiler() -> Compiler:
    """The one that CXX names, or the first of NAMES. BuildError where none works."""
    return _find_compiler(named_compiler() or None, os.environ.get("PATH"))


def locate_compiler() -> Compiler | None:
    """The first that lies where it is looked for. Nothing is run, so that it may be no compiler."""
    try:
        return next((Compiler(each) for each in _commands(named_compiler() or None, os.environ.get("PATH"))), None)
    except BuildError:  # CXX is no command line
        return None


def words(name: str, text: str) -> list[str]:
    """A variable's value as words of a command line."""
    try:
        return shlex.split(text)
    except ValueError as refusal:
        raise BuildError(f"{name}={text} is no command line ({refusal})") from refusal


def _commands(named: str | None, path: str | None) -> Iterator[tuple[str, ...]]:
    for name, *options in [words("CXX", named)] if named else [[name] for name in NAMES]:
        found = shutil.which(name, path=path)
        if found is not None:
            yield (found, *options)


@functools.cache
def _find_compiler(named: str | None, path: str | None) -> Compiler:
    hung = []
    for command in _commands(named, path):
        try:
            said = version_of(command)
        except PassingError:
            raise
        except BuildError as refusal:
            hung.append(str(refusal))
            continue
        if said:
            return Compiler(command, said.splitlines()[0])
    reason = NO_COMPILER.format(f"CXX={named}" if named else f"looked for {', '.join(NAMES)}")
    raise BuildError("; ".join([reason, *hung]))


_HUNG: dict[tuple[str, ...], str] = {}
"""Compilers that this process has waited for in vain, and is not going to ask again."""


def version_of(command: tuple[str, ...]) -> str:
    """What a compiler says of itself; empty where it is none. BuildError where it does not end."""
    if command in _HUNG:
        raise BuildError(_HUNG[command])
    try:
        done = commands.call((*command, "--version"), commands.VERSION_LIMIT)
    except PassingError:
        raise
    except BuildError as refusal:
        _HUNG[command] = f"asked for its version, {refusal}"
        raise BuildError(_HUNG[command]) from refusal
    except OSError:  # a file of that name that is no program
        return ""
    return done.said.strip() if done.code == 0 else ""


def made_for(backend: str, steps: list[Step]) -> dict[str, str]:
    """What decides whether a library serves here, whichever compiler is called in `steps`: a backend's sources, the
    machine, torch's headers, what the compiler is told.
    """
    import torch

    said = hashlib.sha256()
    code, headers = str(sources()), str(torch_folder())
    for step in steps:  # where the sources and torch lie makes no other library
        for part in step.command:
            said.update(part.replace(code, "").replace(headers, "").encode(errors="surrogateescape") + b"\0")
    return {
        "sources": source_digest(backend),
        "machine": platform.machine(),
        "platform": sys.platform,
        "torch": ".".join(torch.__version__.split(".")[:2]),
        "commands": said.hexdigest()[:16],
    }


def digest_of(*parts: str) -> str:
    """A name for some words."""
    return hashlib.sha256("\0".join(parts).encode(errors="surrogateescape")).hexdigest()[:24]


def plan(compiler: Compiler, library: str) -> list[Step]:
    """The steps that make `library`; the last one links what the others made. CXXFLAGS and LDFLAGS are heeded."""
    root, torch = sources(), torch_folder()
    extra, link = (words(name, os.environ.get(name, "")) for name in ("CXXFLAGS", "LDFLAGS"))
    files: dict[str, tuple[str, ...]] = {"cpu/dispatch": (), "cpu/kernel_generic": ()}
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
    """Run the steps in a folder, all but the last at once: with ninja where there is one.

    Raises:
        BuildError: a step failed, made nothing, or the time limit is over; or the library is not a regular file.
            PassingError if it may work soon.
    """
    ninja = shutil.which("ninja")
    if ninja:
        _run_ninja(ninja, steps, folder)
    else:
        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            done = pool.map(lambda step: _call(step.command, folder), steps[:-1])
            for step, each in zip(steps[:-1], done, strict=True):
                _check(step, each)
        _check(steps[-1], _call(steps[-1].command, folder))
    for step in steps:
        made, wrong = folder / step.output, None
        if step is steps[-1] and (made.is_symlink() or (made.exists() and not made.is_file())):
            wrong = f"left {step.output}, which is not a regular file"
        elif not made.is_file() or made.stat().st_size == 0:
            wrong = f"made no {step.output}"
        if wrong is not None:
            raise BuildError(
                f"the compiler ended without an error and {wrong}\nthe command was: {shlex.join(step.command)}"
            )


def _call(command: tuple[str, ...], folder: Path) -> Done:
    try:
        return commands.call(command, commands.BUILD_LIMIT, folder)
    except OSError as refusal:
        return Done(1, f"error: {refusal}")


def _run_ninja(ninja: str, steps: list[Step], folder: Path) -> None:
    """Ninja's own log says which step failed; what a signal has ended says nothing, and its shell has the number."""
    lines = ["rule step", "  command = $words || { code=$$?; echo exit code $$code; exit $$code; }"]
    for step in steps:
        needs = " ".join(each.output for each in steps[:-1]) if step is steps[-1] else ""
        lines += [f"build {step.output}: step {needs}", f"  words = {shlex.join(step.command).replace('$', '$$')}"]
    (folder / "build.ninja").write_text("\n".join(lines) + "\n")
    done = _call((ninja, "-C", str(folder)), folder)
    failed = re.search(r"^FAILED: (?:\[.*?\] )?(\S+)", done.said, re.MULTILINE)
    step = next((step for step in steps if failed and step.output == failed[1]), steps[-1])
    said = done.said[failed.start() :].partition("\n")[2].partition("\n")[2] if failed else done.said
    exit_code = re.search(r"^exit code (\d+)$", said, re.MULTILINE)
    _check(step, Done(int(exit_code[1]) if done.code and exit_code else done.code, said))


def _check(step: Step, done: Done) -> None:
    if done.code == 0:
        return
    lines = [line.strip() for line in done.said.splitlines() if line.strip()]
    first = next((line for line in lines if ERROR.search(line)), lines[0] if lines else f"exit code {done.code}")
    kind = PassingError if done.passing else BuildError
    raise kind(f"the compiler says: {first}\nthe command was: {shlex.join(step.command)}")
