"""The CPU backend and the simulated CUDA backend under sanitizers: their tests with addresses and undefined behaviour
watched, the CPU backend's threads with races watched. What `make sanitize` runs; needs a g++ or clang++ with its
sanitizers, on Linux.

Races between a kernel's threads are no matter of this: the simulator's own checks look for them in every test run.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from fastattn.building import compiler
from fastattn.testing import simulator

ROOT = Path(__file__).resolve().parent.parent
WATCH = ("-O1", "-g", "-fno-omit-frame-pointer")
ADDRESSES = (*WATCH, "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")
RACES = (*WATCH, "-fsanitize=thread")
TESTS = (
    "tests/cpu/test_attention.py",
    "tests/cpu/test_weights.py",
    "tests/sim/test_instructions.py",
    "tests/cuda/test_forward.py",
)
KERNELS = ("ampere", "barriers", "boxes", "copies", "matrices", "numbers", "product", "products")
BUILD = """
import pathlib, runpy, sys
from fastattn.building import cpu_library
from fastattn.testing import simulator
cpu_library.LIBRARY.build()
for name in sys.argv[1:]:
    simulator.build(pathlib.Path("tests/sim/kernels", name + ".cu"), "addresses")
runpy.run_path("tests/cuda/conftest.py")["build"]("addresses")
"""


def main() -> int:
    found = compiler.find_compiler()
    with tempfile.TemporaryDirectory(prefix="fastattn-sanitize-") as name:
        return addresses(found, Path(name), sys.argv[1:]) or races(found, Path(name))


def addresses(found: compiler.Compiler, folder: Path, arguments: list[str]) -> int:
    """The backends' tests, on libraries of their own."""
    environment = simulator.sanitized() | {"CXXFLAGS": " ".join(ADDRESSES), "FASTATTN_CACHE_DIR": str(folder)}
    # The compiler itself runs without them: they slow it down.
    compiling = {name: value for name, value in environment.items() if name != "LD_PRELOAD"}
    subprocess.run([sys.executable, "-c", BUILD, *KERNELS], env=compiling, cwd=ROOT, check=True)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *TESTS, *arguments]
    return subprocess.run(command, env=environment | {"FASTATTN_BUILD": "never"}, cwd=ROOT).returncode


def races(found: compiler.Compiler, folder: Path) -> int:
    """The backend without torch on threads of our own, on each instruction set."""
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
