"""The CPU room under sanitizers: its tests with addresses and undefined behaviour watched, its threads with races
watched. What `make sanitize` runs; needs a g++ or clang++ with its sanitizers, on Linux.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from fastattn import compiler

ROOT = Path(__file__).resolve().parent.parent
WATCH = ("-O1", "-g", "-fno-omit-frame-pointer")
ADDRESSES = (*WATCH, "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")
RACES = (*WATCH, "-fsanitize=thread")
TESTS = ("tests/cpu/test_attention.py", "tests/cpu/test_weights.py")
RUNTIMES = ("libasan.so", "libubsan.so", "libstdc++.so")
"""Loaded before Python, which was not compiled with them; the last so that they find what throws."""


def main() -> int:
    found = compiler.find_compiler()
    with tempfile.TemporaryDirectory(prefix="fastattn-sanitize-") as name:
        return addresses(found, Path(name), sys.argv[1:]) or races(found, Path(name))


def addresses(found: compiler.Compiler, folder: Path, arguments: list[str]) -> int:
    """The room's tests, on a library of their own."""
    files = [
        subprocess.check_output([*found.command, f"-print-file-name={file}"], text=True).strip() for file in RUNTIMES
    ]
    environment = os.environ | {
        "CXXFLAGS": " ".join(ADDRESSES),
        "FASTATTN_CACHE_DIR": str(folder),
        "LD_PRELOAD": " ".join(files),
        "ASAN_OPTIONS": "detect_leaks=0:detect_odr_violation=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    # The compiler itself runs without them: they slow it down.
    compiling = {name: value for name, value in environment.items() if name != "LD_PRELOAD"}
    build = "from fastattn import native; native.build()"
    subprocess.run([sys.executable, "-c", build], env=compiling, check=True)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *TESTS, *arguments]
    return subprocess.run(command, env=environment | {"FASTATTN_BUILD": "never"}, cwd=ROOT).returncode


def races(found: compiler.Compiler, folder: Path) -> int:
    """The room without torch on threads of our own, on each instruction set."""
    steps = [step for step in compiler.plan(found, "library")[:-1] if step.output != "ops.o"]
    steps = [compiler.Step(step.output, (*step.command, *RACES)) for step in steps]
    driver = ("-std=c++17", *RACES, "-c", str(ROOT / "tests" / "cpu" / "threads.cpp"), "-o", "threads.o")
    steps.append(compiler.Step("threads.o", (*found.command, *driver)))
    objects = [step.output for step in steps]
    steps.append(compiler.Step("threads", (*found.command, *RACES, *objects, "-pthread", "-o", "threads")))
    compiler.run(steps, folder)
    for isa in ("generic", "avx2", "avx512"):
        environment = os.environ | {"FASTATTN_CPU_ISA": isa}
        done = subprocess.run([folder / "threads"], env=environment, capture_output=True, text=True)
        print(done.stdout + done.stderr, end="", flush=True)
        if done.returncode and "FASTATTN_CPU_ISA" not in done.stdout:
            return done.returncode
    return 0


if __name__ == "__main__":
    sys.exit(main())
