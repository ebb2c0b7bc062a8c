"""What one iteration of a loop asks of each unit of a multiprocessor, and the clocks that takes.

bound  = tensor / the busiest unit        the share of the tensor cores' peak if everything overlaps
serial = tensor / the sum of all units    the same if nothing does
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

Parts = Mapping[str, Mapping[str, tuple[int, float]]]
"""By unit and instruction: how many of it a warp issues, and what they ask of the unit, all warps of the program
together. Units: those of `Rates`; "operands", bytes of shared memory that tensor cores read themselves; "unknown"."""


class Rates(NamedTuple):
    """What one multiprocessor does in a clock."""

    half: int  # FLOP of the tensor cores, dense, by the factors: 16 bits,
    tf32: int  # tf32,
    fp8: int  # 8 bits
    special: int  # results of the special functions: exp2, reciprocals, some conversions
    fp32: int  # operations of the FP32 lanes
    alu: int  # operations of the integer and logic lanes
    shared: int  # bytes of shared memory
    issue: int  # instructions


RATES = {
    "sm80": Rates(2048, 1024, 0, 16, 64, 64, 128, 4),
    "sm90": Rates(4096, 2048, 8192, 16, 128, 64, 128, 4),
    "sm100": Rates(8192, 4096, 16384, 16, 128, 64, 128, 4),
}
"""Sources. Tensor cores: the data sheets' dense peaks over multiprocessors and boost clock (A100 312 TFLOP/s, 108 x
1.41 GHz; H100 SXM 989, 132 x 1.83; B200 2250, 148 x 1.85). Special functions, FP32, integers: CUDA C++ Programming
Guide, "Throughput of Native Arithmetic Instructions". Shared memory: 32 banks of 4 bytes. Issue: an instruction a
scheduler and clock."""

TENSOR = ("half", "tf32", "fp8")


class Budget(NamedTuple):
    """Clocks of each unit for one iteration, and the share of the tensor cores' peak."""

    tensor: float
    special: float
    fp32: float
    alu: float
    shared: float  # the tensor cores' operands too
    issue: float
    bound: float
    serial: float


def gather(asked: Iterable[tuple[str, str, float]]) -> Parts:
    """(unit, instruction, amount), one for each time, summed up."""
    parts: dict[str, dict[str, tuple[int, float]]] = {}
    for unit, name, amount in asked:
        count, before = parts.setdefault(unit, {}).get(name, (0, 0.0))
        parts[unit][name] = count + 1, before + amount
    return parts


def total(parts: Parts, unit: str) -> float:
    return sum(amount for _, amount in parts.get(unit, {}).values())


def flop(parts: Parts) -> float:
    """Of the tensor cores."""
    return sum(total(parts, unit) for unit in TENSOR)


def budget(parts: Parts, rates: Rates) -> Budget | None:
    """None where an instruction of the tensor cores does not say how much it multiplies.

    In `serial` the tensor cores' own reads of shared memory are no step by themselves, nor is issuing.
    """
    if "unknown" in parts or not flop(parts):
        return None

    def clocks(unit: str, rate: int) -> float:
        return total(parts, unit) / rate

    tensor = sum(clocks(unit, getattr(rates, unit)) for unit in TENSOR if unit in parts)
    special, fp32, alu, issue = (clocks(unit, getattr(rates, unit)) for unit in ("special", "fp32", "alu", "issue"))
    operands, others = clocks("operands", rates.shared), clocks("shared", rates.shared)
    shared = operands + others
    busiest = max(tensor, special, fp32, alu, shared, issue)
    in_turn = max(tensor, operands) + special + fp32 + alu + others
    return Budget(tensor, special, fp32, alu, shared, issue, tensor / busiest, tensor / in_turn)


def spelled_out(parts: Parts, rates: Rates) -> list[str]:
    """The arithmetic, a line a unit: what is issued, what that asks, what a clock does, the clocks."""
    lines = []
    for unit, noun in UNITS.items():
        if amount := total(parts, unit):
            asked = " + ".join(f"{count} {name}" for name, (count, _) in ordered(parts[unit]))
            rate = rates.shared if unit == "operands" else getattr(rates, unit)
            clocks = f"{amount:,.0f} {noun} / {rate:,} = {amount / rate:,.0f} clocks"
            lines.append(f"{unit:8}  {clocks}: {asked}")
    return lines


def ordered(names: Mapping[str, tuple[int, float]]) -> list[tuple[str, tuple[int, float]]]:
    """What asks most comes first."""
    return sorted(names.items(), key=lambda item: (-item[1][1], item[0]))


UNITS = {
    "half": "FLOP",
    "tf32": "FLOP",
    "fp8": "FLOP",
    "special": "results",
    "fp32": "operations",
    "alu": "operations",
    "operands": "bytes",
    "shared": "bytes",
    "issue": "instructions",
}
"""In the order of the lines, with what an amount counts."""
