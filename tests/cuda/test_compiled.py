"""What nvcc makes of the CUDA backend, for a GPU that need not be here: the promises about the machine code."""

import itertools
import json
import re
from pathlib import Path

import pytest

from fastattn import cli
from fastattn.building import compiler, nvcc
from fastattn.building.cuda_library import LIBRARY
from fastattn.cli import inspect_cuda

pytest.importorskip("triton", reason="triton, whose disassemblers read the kernels, is not installed")
from fastattn.kernels.inspect import sass
from fastattn.kernels.inspect.listing import Instruction

MOST_KERNELS = 120
PERFORMANCE = Path(__file__).resolve().parents[2] / "docs" / "performance.md"


@pytest.fixture(scope="module")
def library():
    """The library, built by nvcc; skipped where there is none."""
    try:
        nvcc.find_nvcc()
    except compiler.BuildError as refusal:
        pytest.skip(str(refusal))
    return LIBRARY.load(LIBRARY.build(retry=True))


@pytest.fixture(scope="module")
def rows(library):
    return inspect_cuda.rows(library)


def test_every_kernel_is_there(rows):
    have = {(row.dtype, (row.width, row.width_v), row.kind) for row in rows}
    assert have == set(itertools.product(nvcc.DTYPES, nvcc.WIDTHS, inspect_cuda.VARIANTS))
    assert len(rows) <= MOST_KERNELS


def test_no_promise_is_broken(rows):
    """No spills, registers under the cap, wgmma, TMA and setmaxnreg in the machine code; the softmax where the source
    has it, under the product of the values, whose wait the compiler likes to lift; the output's stores of 16 bytes,
    which it likes to cut into four.
    """
    assert {row.name: row.broken for row in rows if row.broken} == {}


def test_nvcc_waits_for_no_product_that_the_source_does_not_wait_for(library):
    """A batch of products is begun four times, ended four times, and waited for four times: for all, then, in the loop,
    for all but one and for all, and at the end for all. A fifth wait would be nvcc's, for registers that are touched in
    flight.
    """
    for name, binary in sass.read_all(Path(library.path)).items():
        if inspect_cuda.KERNEL.search(name) is None:
            continue
        begun = [each for each in binary.code if each.opcode == "WARPGROUP.ARRIVE"]
        ended = [each for each in binary.code if each.name == "HGMMA" and "gsb0" in each.operands]
        waits = [each.operands for each in binary.code if each.opcode.startswith("WARPGROUP.DEPBAR")]
        assert (len(begun), len(ended)) == (4, 4), name
        assert [each.split(",")[1].strip() for each in waits] == ["0x0", "0x1", "0x0", "0x0"], name


def test_the_tensor_cores_are_the_busiest_unit_of_what_people_meet_first(rows):
    """In the kernels for plain and masked attention nothing takes longer than the products."""
    shares = {row.name: row.clocks["bound"] for row in rows if row.kind != "everything"}
    assert shares and min(shares.values()) >= 0.99, shares


def test_exponentials_are_shared_out_at_width_64(rows):
    """A sixteenth of them are no special functions; elsewhere all are."""
    for row in rows:
        if row.kind == "plain":
            elements = row.block_n // 2
            share = elements // 16 if row.width == 64 else 0
            assert row.clocks["special"] == (elements - share + 2) * 32 * row.block_m // 16 / 16, row.name


def test_broken_promises_are_seen():
    row = inspect_cuda.Row("bf16", 64, 64, "plain", 128, 128, 200, 16, {"HGMMA": 8})
    assert row.broken == [
        "16 bytes of stack",
        "200 registers, where setmaxnreg counts on 168",
        "0 stores of 16 bytes, where the output has 4",
        "no UTMALDG",
        "no USETMAXREG",
    ]


def test_a_softmax_that_waits_for_the_product_is_seen():
    exp, scores, values = (Instruction(*each) for each in (
        ("MUFU.EX2", "R1, R1"), ("WARPGROUP.DEPBAR.LE", "gsb0, 0x1"), ("WARPGROUP.DEPBAR.LE", "gsb0, 0x0")
    ))  # fmt: skip
    share = inspect_cuda.under_products
    assert share([scores, exp, exp, exp, values, exp]) == share([exp, values, exp, scores, exp, exp]) == 0.75
    assert share([scores, values, exp]) == share([values, exp]) == share([exp]) == 0.0
    counts = {"HGMMA": 8, "UTMALDG": 1, "USETMAXREG": 2}
    row = inspect_cuda.Row("bf16", 64, 64, "plain", 128, 128, 168, 0, counts, wide_stores=4)
    row.under_products = 0.05
    assert row.broken == ["5% of the softmax under the product"]


def test_the_command_prints_them(library, capsys, tmp_path):
    path = tmp_path / "rows.json"
    assert cli.main(["inspect", "--cuda", "--json", str(path)]) == 0
    out = capsys.readouterr().out
    assert "bf16 128 plain" in out and "of peak" in out
    assert len(json.loads(path.read_text())) == len(nvcc.DTYPES) * len(nvcc.WIDTHS) * len(inspect_cuda.VARIANTS)


def test_the_page_shows_what_is_compiled(rows):
    """Whoever changes a kernel prints its budget anew: fastattn inspect --cuda --md docs/performance.md."""
    found = re.search(inspect_cuda.BLOCK, PERFORMANCE.read_text())[0].strip()
    want = inspect_cuda.markdown(rows).strip()
    if found.splitlines()[0] != want.splitlines()[0]:
        pytest.skip(f"the page says: {found.splitlines()[0]} Here is {nvcc.find_nvcc().version}")
    assert found == want
