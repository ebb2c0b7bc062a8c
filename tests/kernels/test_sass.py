"""Disassemblies: what is a loop, what an instruction asks of which unit."""

import pytest

pytest.importorskip("triton", reason="triton is not installed")

from fastattn.kernels.inspect import sass
from fastattn.kernels.inspect.listing import Instruction, innermost


def code_of(text):
    """Instructions from lines like nvdisasm's: `label:` or an instruction."""
    lines = []
    for n, line in enumerate(filter(None, map(str.strip, text.splitlines()))):
        lines.append(line if line.endswith(":") else f"        /*{16 * n:04x}*/                   {line} ;")
    return sass.parse("\n".join(lines))


def loops_of(text):
    return [[each.name for each in loop] for loop in innermost(code_of(text), sass.is_tensor)]


@pytest.mark.parametrize("text", ["", "MOV R1, R2\nEXIT", "HGMMA.64x64x16.F32 R24, gdesc[UR8], R24\nEXIT"])
def test_code_without_a_loop_has_none(text):
    assert loops_of(text) == []


def test_a_loop_without_products_is_no_loop():
    assert loops_of(".L_x_0:\nFADD R1, R1, R2\n@P0 BRA `(.L_x_0)\nEXIT") == []


def test_a_rare_path_placed_elsewhere_does_not_widen_the_loop():
    """The wait for a barrier stands at the end of the text, behind instructions that are in no loop."""
    text = """
        MOV R1, R2
        .L_x_1:
        SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R4
        @!P0 BRA `(.L_x_2)
        .L_x_3:
        HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24, gsb0
        @P1 BRA `(.L_x_1)
        FADD R9, R9, R9
        EXIT
        .L_x_2:
        SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R4
        @!P0 BRA `(.L_x_2)
        BRA `(.L_x_3)
    """
    assert loops_of(text) == [["SYNCS", "BRA", "HGMMA", "BRA", "SYNCS", "BRA", "BRA"]]


def test_a_jump_back_is_no_loop_unless_it_always_came_that_way():
    """What waits for a barrier elsewhere returns to code that was already passed."""
    text = """
        @!P0 BRA `(.L_x_2)
        .L_x_1:
        HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24, gsb0
        EXIT
        .L_x_2:
        SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R4
        BRA `(.L_x_1)
    """
    assert loops_of(text) == []


def test_of_nested_loops_the_innermost_with_products_counts():
    """Around it the loop over heads, inside it a wait."""
    text = """
        .L_x_0:
        MOV R1, R2
        .L_x_1:
        .L_x_2:
        SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R4
        @!P0 BRA `(.L_x_2)
        HMMA.16816.F32.BF16 R4, R8, R12, R4
        @P1 BRA `(.L_x_1)
        @P2 BRA `(.L_x_0)
        EXIT
    """
    assert loops_of(text) == [["SYNCS", "BRA", "HMMA", "BRA"]]


def test_two_loops_one_after_the_other_are_two():
    text = """
        .L_x_0:
        HMMA.16816.F32 R4, R8, R12, R4
        FADD R1, R1, R1
        BRA.U UP0, `(.L_x_0)
        .L_x_1:
        HMMA.16816.F32 R4, R8, R12, R4
        @P0 BRA `(.L_x_1)
        EXIT
    """
    assert loops_of(text) == [["HMMA", "FADD", "BRA"], ["HMMA", "BRA"]]


def test_a_guarded_exit_goes_on_and_an_unguarded_one_does_not():
    """Behind an exit for certain, nothing can be reached: the branch back is in no loop."""
    text = ".L_x_0:\nHMMA.16816.F32 R4, R8, R12, R4\n{} EXIT\nBRA `(.L_x_0)"
    assert loops_of(text.format("@P0")) == [["HMMA", "EXIT", "BRA"]]
    assert loops_of(text.format("")) == []


def asked(line, warps=8):
    """Everything but the issue slot."""
    *_, each = code_of(line)
    return [ask for ask in sass.asks(each, warps) if ask[0] != "issue"]


PRODUCTS = {
    # 2 x 64 x 128 x 16 a warpgroup; 128 columns of 16 halves from memory, and 64 rows where no registers give them
    "HGMMA.64x128x16.F32.BF16 R24, R120, gdesc[UR4].tnspB, R24": ("half", 2 * 262144, 2 * 4096),
    "HGMMA.64x128x16.F32 R24, gdesc[UR4], R24, gsb0": ("half", 2 * 262144, 2 * (4096 + 2048)),
    "HGMMA.64x128x8.F32.TF32 R24, gdesc[UR4], R24": ("tf32", 2 * 131072, 2 * (4096 + 2048)),
    "QGMMA.64x128x32.F32.E4M3.E4M3 R24, gdesc[UR4], R24": ("fp8", 2 * 524288, 2 * (4096 + 2048)),
    "HMMA.16816.F32.BF16 R4, R8, R12, R4": ("half", 8 * 4096, None),
    "HMMA.1688.F32.TF32 R4, R8, R12, R4": ("tf32", 8 * 2048, None),
    # one thread issues these for the whole program
    "UMOV UR43, 0x8100490\nUTCHMMA gdesc[UR1], gdesc[UR2], tmem[UR3], tmem[UR42], idesc[UR43], UPT": (
        "half",
        2 * 128 * 64 * 16,
        (128 + 64) * 16 * 2,
    ),
    "UMOV UR43, 0x8210490\nUTCHMMA tmem[UR1], gdesc[UR2], tmem[UR3], tmem[UR42], idesc[UR43], UPT": (
        "half",
        2 * 128 * 128 * 16,
        128 * 16 * 2,
    ),
}


@pytest.mark.parametrize("line", PRODUCTS, ids=lambda line: line.split("\n")[-1].split(",")[0])
def test_a_product_says_how_much_it_multiplies(line):
    unit, flop, operands = PRODUCTS[line]
    amounts = {each_unit: amount for each_unit, _, amount in asked(line)}
    assert amounts == {unit: flop} | ({} if operands is None else {"operands": operands})


@pytest.mark.parametrize("line", ["UTCHMMA gdesc[UR1], gdesc[UR2], tmem[UR3], idesc[UR9], UPT", "IMMA.16832.S8.S8 R0"])
def test_a_product_of_unknown_size_says_so(line):
    assert [unit for unit, _, _ in asked(line)] == ["unknown"]


BYTES = {
    "LDS.U8 R1, [R2]": 1,
    "LDS R1, [R2]": 4,
    "LDS.64 R1, [R2]": 8,
    "STS.128 [R2], R4": 16,
    "LDSM.16.M88.4 R4, [R2]": 16,
    "LDSM.16.MT88.2 R4, [R2]": 8,
    "LDSM.16.M88 R4, [R2]": 4,
    "STSM.16.M88.4 [R2], R4": 16,
    "LDGSTS.E.BYPASS.128 [R2], desc[UR4][R4.64]": 16,
    "LDGSTS.E [R2], desc[UR4][R4.64]": 4,
    "SHFL.BFLY PT, R1, R2, 0x1, 0x1f": 4,
}


@pytest.mark.parametrize("line", BYTES)
def test_shared_memory_is_counted_in_bytes_of_each_lane(line):
    assert [(unit, amount) for unit, _, amount in asked(line, warps=2)] == [("shared", BYTES[line] * 64)]


UNITS = {
    "MUFU.EX2 R1, R2": ("special", 1),
    "F2I.FTZ.U32.TRUNC.NTZ R1, R2": ("special", 1),
    "FFMA.FTZ R1, R2, R3, R4": ("fp32", 1),
    "FMUL2 R4, R6.F32x2.HI_LO, R8.F32x2.HI_LO": ("fp32", 2),
    "IMAD.MOV.U32 R1, RZ, RZ, R2": ("fp32", 2),
    "FMNMX R1, R2, R3, !PT": ("alu", 1),
    "F2FP.BF16.F32.PACK_AB R1, R2, R3": ("alu", 1),
    "ISETP.GE.AND P0, PT, R1, R2, PT": ("alu", 1),
    "@!P0 SEL R1, R2, R3, P1": ("alu", 1),
    "VIADD R1, R2, 0x40": ("alu", 1),
}


@pytest.mark.parametrize("line", UNITS)
def test_arithmetic_runs_on_its_pipe(line):
    unit, operations = UNITS[line]
    assert [(each, amount) for each, _, amount in asked(line)] == [(unit, operations * 8 * 32)]


@pytest.mark.parametrize(
    "line",
    [
        "UIADD3 UR4, UR5, 0x1, URZ",
        "R2UR UR4, R1",
        "LDG.E.128 R4, desc[UR4][R2.64]",
        "STL [R1], R2",
        "UTMALDG.4D [UR8], [UR6]",
        "BAR.SYNC.DEFER_BLOCKING 0x0",
        "BSSY.RECONVERGENT B0, `(.L_x_6)",
        "WARPGROUP.ARRIVE",
        "LDTM.x64 R4, tmem[UR12]",
    ],
)
def test_control_memory_and_uniform_instructions_take_an_issue_slot_alone(line):
    assert asked(line) == []
    assert list(sass.asks(code_of(line)[0], 8)) == [("issue", "instructions", 8)]


def test_an_instruction_is_known_by_its_first_word():
    assert Instruction("MUFU.EX2", "R1, R2").name == "MUFU"
