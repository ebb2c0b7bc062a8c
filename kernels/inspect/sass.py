"""NVIDIA binaries: a cubin read with the disassemblers that come with triton.

What an instruction asks of which unit follows the pipelines of the Nsight Compute documentation ("Pipelines"): FMA for
FP32 and, on its heavier half, IMAD; ALU for integers, logic, comparisons and packing; XU for special functions and
conversions. Shared memory is counted as asked for: no bank conflicts, no broadcasts, and not what TMA writes, whose
size is in a descriptor.
"""

import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import triton

from fastattn.kernels.inspect.listing import Instruction

LANES = 32
WARPGROUP = 4  # warps that issue one HGMMA together

LINE = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
LABEL = re.compile(r"(\.L_\w+):$")
GUARD = re.compile(r"\*/\s+@")
TARGET = re.compile(r"`\((\.L_\w+)\)")

SECTION = re.compile(r"^\s*\.section\s+\.text\.(\w+),.*$", re.MULTILINE)
USAGE = re.compile(r"Function (\w+):\n(.*)")

HGMMA = re.compile(r"([HQ])GMMA\.(\d+)x(\d+)x(\d+)")
HMMA = {"16816": (16, 8, 16), "1688": (16, 8, 8), "1684": (16, 8, 4)}
UTC = re.compile(r"UTC([HQ])MMA")
IDESC = re.compile(r"idesc\[(UR\d+)\]")
CONSTANT = re.compile(r"(UR\d+), (0x[0-9a-f]+)$")
TENSOR = re.compile(r"([HQIBDO]G?MMA|UTC\w*MMA)\b")

SPECIAL = {"MUFU", "F2F", "F2I", "I2F", "FRND"}
FP32 = {"FADD": 1, "FMUL": 1, "FFMA": 1, "FSWZADD": 1, "HADD2": 1, "HMUL2": 1, "HFMA2": 1}
FP32 |= {"FADD2": 2, "FMUL2": 2, "FFMA2": 2, "IMAD": 2, "IMUL": 2}  # two results; half of the lanes
NO_ARITHMETIC = re.compile(
    r"LD|ST|ATOM|RED$|RED\.|U|R2UR|S2UR|S2R|CS2R|BAR|B[MSRP]|BRA|BREAK|CALL|RET|EXIT|JMP|NOP|SYNCS|WARPSYNC|WARPGROUP"
    r"|DEPBAR|MEMBAR|FENCE|ERRBAR|CCTL|NANOSLEEP|YIELD|KILL|ELECT|ACQ|PREEXIT|SHFL|VOTE|MATCH|CGAERR"
)
"""Memory, control, the uniform datapath, and what crosses lanes: on none of the counted arithmetic units."""
SHARED = re.compile(r"(LDS|STS|LDGSTS|LDSM|STSM|ATOMS|SHFL)\b")


class Binary(NamedTuple):
    """A disassembled kernel."""

    registers: int  # a thread
    spilled_bytes: int  # of the stack, a thread
    code: list[Instruction]


def read(cubin: bytes) -> Binary:
    """The kernel in a cubin."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        usage = _output(tools / "cuobjdump", "-res-usage", path)
        listing = _output(tools / "nvdisasm", "-c", path)
    registers, stack = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK"))  # type: ignore[index]
    return Binary(registers, stack, parse(listing))


def read_all(library: Path) -> dict[str, Binary]:
    """Every kernel in a library that nvcc has linked, or in an object, by its mangled name."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            [str(tools / "cuobjdump"), "-xelf", "all", str(library)], cwd=folder, capture_output=True, check=True
        )
        for cubin in sorted(Path(folder).glob("*.cubin")):
            usage = dict(USAGE.findall(_output(tools / "cuobjdump", "-res-usage", cubin)))
            sections = SECTION.split(_output(tools / "nvdisasm", "-c", cubin))[1:]
            for name, listing in zip(sections[::2], sections[1::2], strict=True):
                registers, stack = (int(re.search(rf"{word}:(\d+)", usage[name])[1]) for word in ("REG", "STACK"))  # type: ignore[index]
                found[name] = Binary(registers, stack, parse(listing))
    return found


def _output(*command: Any) -> str:
    return subprocess.run([str(word) for word in command], capture_output=True, text=True, check=True).stdout


def parse(listing: str) -> list[Instruction]:
    """The instructions of nvdisasm's listing. A tcgen05 product gets the shape that its descriptor has."""
    code: list[Instruction] = []
    labels: list[str] = []
    constants: dict[str, int] = {}
    for line in listing.splitlines():
        if label := LABEL.match(line):
            labels.append(label[1])
        elif match := LINE.match(line):
            opcode, operands = match.groups()
            name = opcode.split(".")[0]
            jumps = tuple(TARGET.findall(line)) if name in ("BRA", "JMP", "BRX", "JMX") else ()
            ends = name in ("BRA", "JMP", "BRX", "JMX", "EXIT", "RET")
            # A predicate stands before the opcode, or as another operand before the label.
            surely = not GUARD.search(line) and (not jumps or operands.startswith("`"))
            if name == "UMOV" and (constant := CONSTANT.match(operands)):
                constants[constant[1]] = int(constant[2], 16)
            elif UTC.match(name) and (register := IDESC.search(operands)) and register[1] in constants:
                opcode = f"{opcode}.{_tcgen05_shape(constants[register[1]], name)}"
            code.append(Instruction(opcode, operands, tuple(labels), jumps, not (ends and surely)))
            labels = []
    return code


def _tcgen05_shape(descriptor: int, name: str) -> str:
    """MxNxK and the factors' format (PTX ISA, "Instruction descriptor" of tcgen05.mma)."""
    m, n = (descriptor >> 24 & 31) << 4, (descriptor >> 17 & 63) << 3
    if name == "UTCQMMA":
        return f"{m}x{n}x32"
    return f"{m}x{n}x8.TF32" if descriptor >> 7 & 7 == 2 else f"{m}x{n}x16"


def is_tensor(each: Instruction) -> bool:
    """Whether it multiplies matrices."""
    return TENSOR.match(each.opcode) is not None


def asks(each: Instruction, warps: int) -> Iterator[tuple[str, str, float]]:
    """(unit, name, amount) for one instruction that `warps` warps issue, as budget.py wants it."""
    yield "issue", "instructions", warps
    threads = warps * LANES
    if is_tensor(each):
        yield from _product(each, warps)
    elif each.name in SPECIAL:
        yield "special", ".".join(each.opcode.split(".")[:2]), threads
    elif each.name in FP32:
        yield "fp32", each.name, FP32[each.name] * threads
    elif SHARED.match(each.opcode):
        yield "shared", each.name, _bytes(each.opcode) * threads
    elif not NO_ARITHMETIC.match(each.opcode):
        yield "alu", each.name, threads


def _product(each: Instruction, warps: int) -> Iterator[tuple[str, str, float]]:
    wgmma, tcgen05 = HGMMA.match(each.opcode), re.match(r"UTC([HQ])MMA\S*?\.(\d+)x(\d+)x(\d+)", each.opcode)
    unit = "tf32" if "TF32" in each.opcode else "half"
    if match := wgmma or tcgen05:
        unit = "fp8" if match[1] == "Q" else unit
        m, n, k = (int(size) for size in match.groups()[1:])
        times = warps / WARPGROUP if wgmma else 1
        from_memory = n + (m if _both_in_memory(each) else 0)
        name = each.opcode[: match.end()]
        yield unit, name, 2 * m * n * k * times
        yield "operands", name, from_memory * k * {"half": 2, "tf32": 4, "fp8": 1}[unit] * times
    elif each.name == "HMMA" and each.opcode.split(".")[1] in HMMA:
        m, n, k = HMMA[each.opcode.split(".")[1]]
        yield unit, ".".join(each.opcode.split(".")[:2]), 2 * m * n * k * warps
    else:
        yield "unknown", each.opcode, 0


def _both_in_memory(each: Instruction) -> bool:
    """Both factors come from shared memory: a wgmma without registers before its descriptor, a tcgen05 with two."""
    if each.name.startswith("UTC"):
        return each.operands.count("gdesc") == 2
    return each.operands.split(", ")[1].startswith("gdesc")


def _bytes(opcode: str) -> float:
    """Bytes of shared memory a lane asks for."""
    if opcode.startswith(("LDSM", "STSM")):  # 8 x 8 matrices of 16 bits, 1, 2 or 4 of them
        count = re.search(r"\.([24])$", opcode)
        return 4 * int(count[1] if count else 1)
    width = re.search(r"\.[US]?(8|16|32|64|128)\b", opcode)
    return int(width[1]) / 8 if width else 4
