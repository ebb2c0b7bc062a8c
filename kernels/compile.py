"""Compile kernels for GPUs that are not here, and read what the compiler made of them.

    python -m fastattn.kernels.compile [--target sm90] [--json]     every row of the tile table

The launches are the ones that would run: a stand-in driver answers Triton's question for a device and nothing is
launched. Registers, spills and instructions are read with the disassemblers that come with triton.
"""

import argparse
import collections
import itertools
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from fastattn.kernels import launch
from fastattn.kernels.configs import TABLE, TileConfig
from fastattn.masks import Causal, Full, Lengths, Mask, Window
from fastattn.spec import AttnInputs, AttnSpec

CAPABILITIES = {"sm80": 80, "sm90": 90, "sm100": 100}


@dataclass(frozen=True)
class Form:
    """A problem that a row is compiled with."""

    mask: Callable[[], Mask] = Full
    batch: int = 2
    heads: int = 4
    length: int = 512
    float32: str = "highest"  # as torch.set_float32_matmul_precision has it


FORMS = {
    "none": Form(),
    "causal": Form(Causal),
    "every-rule": Form(
        lambda: (
            Causal(offset=torch.zeros(2, dtype=torch.int64))
            & Window(8, None)
            & Window(None, 8, offset=torch.zeros(2, dtype=torch.int32))
            & Lengths(*(torch.zeros(2, dtype=torch.int32) for _ in range(3)))
        )
    ),
    "one-token": Form(Causal, batch=1, heads=1, length=1),
    "tf32": Form(float32="high"),
}
"""Nothing hidden, the commonest mask, each rule in each of its forms at once, sizes of 1 (Triton makes constants of
them, which its interpreter does not), and the other way to multiply float32."""
COUNTED = ("HGMMA", "HMMA", "UTMALDG", "LDGSTS", "MUFU.EX2", "LDL", "STL")


@dataclass(frozen=True)
class Compiled:
    """One kernel's binary in figures."""

    kernel: str
    target: str
    head_dim: int
    dtype: str
    form: str
    registers: int
    spilled_bytes: int  # of the stack, per thread
    shared_bytes: int
    instructions: dict[str, int]


def compile_row(row: TileConfig, name: str = "none") -> Compiled:
    """The row's kernel for the widest head it serves, compiled for the row's target with one of `FORMS`."""
    form = FORMS[name]
    dtype = torch.bfloat16 if row.bits == 16 else torch.float32
    shape = (form.batch, form.heads, form.length, row.head_dim)
    inputs = AttnInputs(*(torch.empty(shape, dtype=dtype) for _ in range(3)))
    spec = AttnSpec.of(inputs, mask=form.mask())
    out, lse = spec.empty_out(inputs.query), spec.empty_lse(inputs.query)
    tensors = launch.Backward(out, lse, out, lse, lse, *inputs[:3])
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(form.float32)
    launches = [
        *launch.forward(spec, inputs, out, lse, row.target),
        *launch.backward(spec, inputs, tensors, row.target),
    ]
    torch.set_float32_matmul_precision(before)
    wanted = next(each for each in launches if each.kernel.fn.__name__ == f"attn_{row.kernel}_kernel")
    with pretending(GPUTarget("cuda", CAPABILITIES[row.target], 32)):
        binary = wanted.kernel.warmup(*wanted.args, grid=(wanted.programs,), **wanted.options)
    return _read(binary, row, str(dtype).removeprefix("torch."), name)


@contextmanager
def pretending(target: GPUTarget) -> Iterator[None]:
    """Triton believes that a device of this kind is there."""
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


def _read(binary: Any, row: TileConfig, dtype: str, form: str) -> Compiled:
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(binary.asm["cubin"])
        usage = _output(tools / "cuobjdump", "-res-usage", path)
        listing = _output(tools / "nvdisasm", "-c", path)
    registers, stack = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK"))  # type: ignore[index]
    found = collections.Counter(re.findall("|".join(map(re.escape, COUNTED)), listing))
    shared = binary.metadata.shared
    return Compiled(row.kernel, row.target, row.head_dim, dtype, form, registers, stack, shared, dict(found))


def _output(*command: Any) -> str:
    return subprocess.run([str(word) for word in command], capture_output=True, text=True, check=True).stdout


def _compiled_with(row: TileConfig, form: str) -> bool:
    """Masks and sizes are alike on every target, so that one target's half-precision rows tell."""
    if form == "none" or row.kernel == "delta":
        return form == "none"
    return row.bits == 32 if form == "tf32" else row.target == "sm90"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", choices=list(CAPABILITIES), help="only the rows of this target")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    options = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 is set; the interpreter's kernels cannot be compiled")
    for row, form in itertools.product(TABLE, FORMS):
        if row.target in CAPABILITIES and options.target in (None, row.target) and _compiled_with(row, form):
            result = compile_row(row, form)
            if options.json:
                print(json.dumps(asdict(result)), flush=True)
            else:
                counts = " ".join(f"{name} {count}" for name, count in result.instructions.items())
                print(
                    f"{result.target:6} {result.kernel:5} d{result.head_dim:<4} {result.dtype:9} {result.form:10} "
                    f"{result.registers:3} registers {result.spilled_bytes:4} B stack "
                    f"{result.shared_bytes / 1024:6.1f} KiB shared  {counts}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
