"""Clocks of each unit: against the data sheets, and against arithmetic done by hand."""

import pytest

pytest.importorskip("triton", reason="triton is not installed")

from fastattn.kernels.inspect import sass
from fastattn.kernels.inspect.budget import RATES, UNITS, budget, flop, gather, spelled_out, total
from fastattn.kernels.inspect.listing import Instruction

DATA_SHEETS = {
    # dense TFLOP/s in 16 bits, FP32 TFLOP/s (vectors), multiprocessors, boost clock in GHz
    "sm80": (312, 19.5, 108, 1.41),
    "sm90": (989.4, 66.9, 132, 1.83),
    "sm100": (2250, 75, 148, 1.85),
}


@pytest.mark.parametrize("target", RATES)
def test_rates_are_those_of_the_data_sheets(target):
    half, fp32, processors, clock = DATA_SHEETS[target]
    per_tera = processors * clock / 1000
    assert RATES[target].half * per_tera == pytest.approx(half, rel=0.01)
    assert 2 * RATES[target].fp32 * per_tera == pytest.approx(fp32, rel=0.09)  # given for another clock
    assert RATES[target].tf32 * 2 == RATES[target].half


def of(*lines, warps=8):
    return gather(ask for opcode, operands in lines for ask in sass.asks(Instruction(opcode, operands), warps))


def forward(block_n, dim):
    """The products and exponentials of a 128-row forward tile on two warpgroups, P in registers."""
    first = [(f"HGMMA.64x{block_n}x16.F32.BF16", "R24, gdesc[UR8], R24")] * (dim // 16)
    second = [(f"HGMMA.64x{dim}x16.F32.BF16", "R88, R24, gdesc[UR8].tnspB, R88")] * (block_n // 16)
    return of(*first, *second, *[("MUFU.EX2", "R1, R2")] * (128 * block_n // 256))


def test_a_forward_tile_costs_what_arithmetic_by_hand_says():
    """128 x 128 x 128: 4 x 128^3 FLOP; 128^2 exponentials; Q, K for the first product, V for the second, each
    warpgroup for itself."""
    found = budget(forward(128, 128), RATES["sm90"])
    assert (found.tensor, found.special) == (4 * 128**3 / 4096, 128 * 128 / 16)
    assert found.shared == 2 * (8 * (64 + 128) * 32 + 8 * 128 * 32) / 128
    assert (found.tensor, found.special, found.shared) == (2048, 1024, 1280)
    assert found.bound == 1.0


def test_a_narrow_head_is_bound_by_its_exponentials():
    found = budget(forward(128, 64), RATES["sm90"])
    assert found.tensor == found.special == 1024
    assert found.serial == 0.5


def test_bound_is_the_busiest_unit_and_serial_the_sum():
    parts = gather(
        [
            ("half", "HGMMA", 4096 * 100),
            ("operands", "HGMMA", 128 * 60),
            ("special", "MUFU", 16 * 50),
            ("fp32", "FFMA", 128 * 20),
            ("alu", "SEL", 64 * 30),
            ("shared", "LDS", 128 * 90),
            ("issue", "instructions", 4 * 40),
        ]
    )
    found = budget(parts, RATES["sm90"])
    assert found[:6] == (100, 50, 20, 30, 150, 40)
    assert found.bound == pytest.approx(100 / 150)
    assert found.serial == pytest.approx(100 / (100 + 50 + 20 + 30 + 90))


def test_narrower_factors_are_rated_by_their_own_speed():
    found = budget(gather([("tf32", "HGMMA", 2048 * 10), ("half", "HGMMA", 4096 * 5)]), RATES["sm90"])
    assert found.tensor == 15


@pytest.mark.parametrize(
    "asked", [[], [("issue", "instructions", 8)], [("half", "A", 8), ("unknown", "B", 0)]], ids=str
)
def test_there_is_no_budget_without_the_size_of_every_product(asked):
    assert budget(gather(asked), RATES["sm90"]) is None


def test_amounts_of_one_instruction_add_up():
    parts = of(("FFMA", "R1, R2, R3, R4"), ("IMAD", "R1, R2, R3, R4"), ("FFMA", "R1, R2, R3, R4"))
    assert parts["fp32"] == {"FFMA": (2, 512.0), "IMAD": (1, 512.0)}
    assert total(parts, "fp32") == 1024 and total(parts, "alu") == 0 == flop(parts)


def test_the_lines_hold_the_budgets_figures():
    parts = forward(128, 128)
    lines = dict(line.split(maxsplit=1) for line in spelled_out(parts, RATES["sm90"]))
    assert list(lines) == ["half", "special", "operands", "issue"]
    assert lines["half"] == "8,388,608 FLOP / 4,096 = 2,048 clocks: 16 HGMMA.64x128x16"
    assert lines["special"].startswith("16,384 results / 16 = 1,024 clocks: 64 MUFU.EX2")
    assert set(lines) <= set(UNITS)
