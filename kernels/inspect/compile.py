"""Compile kernels for GPUs that are not here, and read what the compiler made of them.

The launches are the ones that would run: a stand-in driver answers Triton's question for a device and nothing is
launched. `fastattn inspect` starts this file as a process of its own, which reads jobs and answers with figures, a line
of JSON each: a compiler that dies takes one job with it, and Triton's interpreter is never in the way.
"""

import json
import os
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import product
from types import SimpleNamespace
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from fastattn.kernels.host import launch
from fastattn.kernels.host.kernel_variant import wide
from fastattn.kernels.host.tile_table import ANCESTORS, TABLE, shared_limit
from fastattn.kernels.inspect import sass
from fastattn.kernels.inspect.budget import RATES, Parts, budget, flop, gather
from fastattn.kernels.inspect.compile_cases import COMPILE_CASES, DTYPES, call
from fastattn.kernels.inspect.listing import Instruction, innermost

GPUS = {
    "sm80": GPUTarget("cuda", 80, 32),
    "sm90": GPUTarget("cuda", 90, 32),
    "sm100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
TILES_OF = {"gfx942": "sm80"}
"""Whose tiles a target takes that has none in the table."""
PRODUCTS = {"fwd": 2, "short": 2, "decode": 2, "dq": 3, "dkv": 4}
"""Matrix products that a kernel makes of a tile."""


@dataclass(frozen=True)
class CompileJob:
    """One kernel to compile. Its fields are keys of `fastattn inspect --json`."""

    target: str
    kernel: str  # as the tile table names it
    head_dim: int
    dtype: str
    form: str  # the name of its compile case

    def __str__(self) -> str:
        return f"{self.target} {self.kernel} d{self.head_dim} {self.dtype} {self.form}"


@dataclass
class Loop:
    """One iteration of an innermost loop that multiplies matrices; of several such, where roles of a program differ."""

    warps: int
    issued: int  # instructions, by each warp
    counts: dict[str, int]  # by name
    parts: Parts
    flop: float
    tiles: float | None  # flop over what one tile needs: above 1, several tiles a round, or work done twice
    clocks: dict[str, float] | None  # None: an instruction does not say how much it multiplies


@dataclass
class Compiled:
    """A job's binary in figures, or why there is none. Registers and spilled bytes are a thread's; where the target has
    no disassembler here, they are 0 and there are neither counts nor loops.
    """

    problem: CompileJob  # called as --json calls it
    triton: str = triton.__version__
    error: str | None = None
    warps: int = 0
    tile: dict[str, int] = field(default_factory=dict)
    registers: int = 0
    spilled_bytes: int = 0
    shared_bytes: int = 0
    shared_limit: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    loops: list[Loop] = field(default_factory=list)  # the main loop first

    @property
    def main(self) -> Loop | None:
        """The loop with the fewest instructions for its multiplications: the one that checks no mask."""
        return self.loops[0] if self.loops else None


def plan(
    targets: Iterable[str] = tuple(GPUS),
    kernels: Sequence[str] | None = None,
    head_dims: Sequence[int] | None = None,
    dtypes: Iterable[str] = tuple(DTYPES),
    cases: Iterable[str] = tuple(COMPILE_CASES),
) -> list[CompileJob]:
    """The product; None stands for everything there is. A case that makes no difference to a kernel is left out."""
    dims = head_dims or sorted({row.head_dim for row in TABLE})
    jobs, seen = [], set()
    for target, head_dim, dtype, case in product(targets, dims, dtypes, cases):
        for kernel, each in launches(target, head_dim, dtype, case).items():
            key = (target, head_dim, dtype, kernel, repr((_specialized(each.args), each.options)))
            if (kernels is None or kernel in kernels) and key not in seen:
                jobs.append(CompileJob(target, kernel, head_dim, dtype, case))
            seen.add(key)
    return jobs


def table_plan() -> list[CompileJob]:
    """Each row of the tile table for its own target, in each case once: at the widest head that takes the row."""
    jobs, seen = [], set()
    dims = sorted({row.head_dim for row in TABLE}, reverse=True)
    for target, dtype, head_dim, name in product(ANCESTORS, ("fp32", "bf16"), dims, COMPILE_CASES):
        if target in GPUS and COMPILE_CASES[name].rows in ("all", "fp32" if dtype == "fp32" else target):
            for kernel, each in launches(target, head_dim, dtype, name).items():
                if each.row.target == target and (each.row, name) not in seen:
                    seen.add((each.row, name))
                    jobs.append(CompileJob(target, kernel, head_dim, dtype, name))
    return jobs


def launches(target: str, head_dim: int, dtype: str, case: str) -> dict[str, launch.Launch]:
    """What the case is about of what the forward and the backward pass launch, by its name in the tile table."""
    made = COMPILE_CASES[case]
    spec, inputs = call(made, head_dim, DTYPES[dtype])
    out, lse = spec.empty_out(inputs.query), spec.empty_lse(inputs.query)
    tiles = target if target in ANCESTORS else TILES_OF[target]
    dbias = None if inputs.bias is None else launch.empty_dbias(spec, inputs.bias)
    dsinks = None if inputs.sinks is None else launch.empty_dsinks(spec, inputs.sinks, tiles)
    tensors = launch.Backward(out, lse, out, lse, *launch.empty_terms(spec, lse), *inputs[:3], dbias, dsinks)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(made.float32)
    try:
        listed = [
            *launch.forward(spec, inputs, out, lse, tiles),
            *launch.backward(spec, inputs, tensors, tiles),
        ]
    finally:
        torch.set_float32_matmul_precision(before)
    return {each.row.kernel: each for each in listed if each.row.kernel in made.kernels}


def _specialized(value: Any) -> Any:
    """What of an argument Triton compiles for."""
    if isinstance(value, tuple):
        return tuple(map(_specialized, value))
    if isinstance(value, torch.Tensor):
        return str(value.dtype)
    if isinstance(value, int):
        return "1" if value == 1 else f"{value % 16 == 0} {abs(value) >= 2**31}"
    return type(value).__name__, getattr(value, "block_shape", None)


def compile_job(job: CompileJob) -> Compiled:
    """Compiles one kernel and reads it. ValueError where the call launches no such kernel."""
    launched = launches(job.target, job.head_dim, job.dtype, job.form)
    if job.kernel not in launched:
        raise ValueError(f"this call launches no kernel {job.kernel!r}; it launches {', '.join(launched)}")
    wanted = launched[job.kernel]
    with pretending(GPUS[job.target]):
        binary = wanted.kernel.warmup(*wanted.args, grid=(wanted.programs,), **wanted.options)
    warps = binary.metadata.num_warps
    row = wanted.row
    tile = {"block_m": row.block_m, "block_n": row.block_n, "num_stages": wanted.options["num_stages"]}
    compiled = Compiled(
        job,
        warps=warps,
        tile=tile,
        shared_bytes=binary.metadata.shared,
        shared_limit=shared_limit(row, job.target),
    )
    if "cubin" in binary.asm:
        read = sass.read(binary.asm["cubin"])
        compiled.registers, compiled.spilled_bytes = read.registers, read.spilled_bytes
        compiled.counts = _counted(read.code)
        compiled.loops = _loops(read.code, warps, binary.asm["ttgir"], job.target)
        needs = 2 * row.block_m * row.block_n * wide(job.head_dim) * PRODUCTS.get(row.kernel, 0)
        for loop in compiled.loops:
            loop.tiles = loop.flop / needs if needs else None
    return compiled


def _counted(code: Iterable[Instruction]) -> dict[str, int]:
    """By name; exp2 among the special functions by its own name too."""
    counts = Counter(each.name for each in code)
    counts["MUFU.EX2"] = sum(each.opcode.startswith("MUFU.EX2") for each in code)
    return {name: count for name, count in sorted(counts.items()) if count}


def _loops(code: list[Instruction], warps: int, ttgir: str, target: str) -> list[Loop]:
    """The main loop, then the others. Where warps have roles, equal loops of theirs are one loop of more warps."""

    def loop(body: list[Instruction], by: int) -> Loop:
        parts = gather(asked for each in body for asked in sass.asks(each, by))
        clocks = budget(parts, RATES[target])
        return Loop(by, len(body), _counted(body), parts, flop(parts), None, clocks and clocks._asdict())

    roles = [int(count) for count in re.findall(r"^\s*partition\d+\(.*\bnum_warps\((\d+)\)", ttgir, re.MULTILINE)]
    found = [(loop(body, roles[0] if roles else warps), body) for body in innermost(code, sass.is_tensor)]
    found.sort(key=lambda pair: (pair[0].issued / pair[0].flop if pair[0].flop else float("inf"), pair[0].issued))
    if not roles or not found:
        return [each for each, _ in found]
    others = [each for each, _ in found if each.flop != found[0][0].flop]
    return [loop(found[0][1], roles[0] * (len(found) - len(others))), *others]


@contextmanager
def pretending(target: GPUTarget) -> Iterator[None]:
    """Triton believes that such a device is there."""
    stand_in = SimpleNamespace(
        get_current_target=lambda: target,
        get_current_device=lambda: str(target),
        get_current_stream=lambda device: 0,
        get_active_torch_device=lambda: torch.device("cpu"),
    )
    driver.set_active(stand_in)
    try:
        yield
    finally:
        driver.set_active(None)


def read_compiled(answer: dict[str, Any]) -> Compiled:
    """The reverse of `dataclasses.asdict`."""
    loops = [Loop(**loop) for loop in answer["loops"]]
    return Compiled(**{**answer, "problem": CompileJob(**answer["problem"]), "loops": loops})


def main() -> None:
    """Answers jobs from standard input, one a line, until it ends."""
    if launch.INTERPRETED:
        raise SystemExit("TRITON_INTERPRET=1 is set; the interpreter's kernels cannot be compiled")
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # compilers print, too
    for line in sys.stdin:
        job = CompileJob(**json.loads(line))
        try:
            compiled = compile_job(job)
        except Exception as failure:
            compiled = Compiled(job, error=f"{type(failure).__name__}: {failure}")
        print(json.dumps(asdict(compiled)), file=answers)


if __name__ == "__main__":
    main()
