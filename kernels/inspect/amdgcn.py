"""AMD binaries: the assembly that Triton's compiler hands to its assembler.

One VALU pipe serves FP32 and integers alike, so that both are asked of "alu" (CDNA 3 ISA).
"""

import re
from collections.abc import Iterator

from fastattn.kernels.inspect.listing import Instruction
from fastattn.kernels.inspect.sass import Binary

LANES = 64

LABEL = re.compile(r"(\.LBB\w+):")
LINE = re.compile(r"\t([a-z]\w+)(?: ([^;]*))?")
MFMA = re.compile(r"v_mfma_f32_(\d+)x(\d+)x(\d+)_?(\w*)")
SPECIAL = re.compile(r"v_(exp|log|rcp|rsq|sqrt|sin|cos)_\w+")
MEMORY = re.compile(r"ds_(read|write|load|store)(2(?:st64)?)?_[bui](8|16|32|64|96|128)")
FIELDS = {"registers": r"\.vgpr_count:\s+(\d+)", "spilled": r"\.private_segment_fixed_size:\s+(\d+)"}


def read(text: str) -> Binary:
    """The kernel in an assembly text; spilled is what a lane keeps in scratch memory, in bytes."""
    registers, spilled = (int(re.findall(pattern, text)[-1]) for pattern in FIELDS.values())
    return Binary(registers, spilled, parse(text))


def parse(text: str) -> list[Instruction]:
    """The instructions of the text."""
    code: list[Instruction] = []
    labels: list[str] = []
    for line in text.split(".section\t.rodata")[0].splitlines():
        if label := LABEL.match(line):
            labels.append(label[1])
        elif match := LINE.match(line):
            opcode, operands = match[1], (match[2] or "").strip()
            jumps = (operands,) if opcode.startswith(("s_branch", "s_cbranch")) else ()
            code.append(Instruction(opcode, operands, tuple(labels), jumps, opcode not in ("s_branch", "s_endpgm")))
            labels = []
    return code


def is_tensor(each: Instruction) -> bool:
    """Whether it multiplies matrices."""
    return each.opcode.startswith(("v_mfma", "v_smfmac"))


def asks(each: Instruction, warps: int) -> Iterator[tuple[str, str, float]]:
    """(unit, name, amount) for one instruction that `warps` waves issue, as budget.py wants it."""
    yield "issue", "instructions", warps
    threads = warps * LANES
    if is_tensor(each):
        match = MFMA.match(each.opcode)
        if match is None:
            yield "unknown", each.opcode, 0
            return
        m, n, k = (int(size) for size in match.groups()[:3])
        unit = next((unit for mark, unit in (("xf32", "tf32"), ("8", "fp8")) if mark in match[4]), "half")
        yield unit, match[0], 2 * m * n * k * warps
    elif SPECIAL.match(each.opcode):
        yield "special", each.opcode.split("_e32")[0], threads
    elif match := MEMORY.match(each.opcode):
        yield "shared", match[0], int(match[3]) / 8 * (2 if match[2] else 1) * threads
    elif each.opcode.startswith("v_"):
        yield "alu", each.opcode.split("_e32")[0].split("_e64")[0], threads
