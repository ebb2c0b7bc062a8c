"""Against CuTe, where nvidia-cutlass is installed: the simulator's fragments and layouts of shared memory, and the PTX
of each wgmma, operand by operand.
"""

import importlib.util
import re
import runpy
import subprocess
from pathlib import Path

import pytest

from fastattn.building import compiler, nvcc
from fastattn.building.compiler import BuildError

SOURCE = Path(__file__).parent / "oracle.cpp"
COMPARED = 11


@pytest.fixture(scope="module")
def headers():
    found = importlib.util.find_spec("cutlass_library")
    if found is None or found.origin is None:
        pytest.skip("needs CuTe's headers: pip install --no-deps nvidia-cutlass==4.2.0.0")
    return Path(found.origin).parent / "source" / "include"


def test_fragments_and_layouts_are_those_of_cute(headers, tmp_path):
    try:
        found = nvcc.find_nvcc()  # a C++ compiler with CUDA's headers
    except BuildError as refusal:
        pytest.skip(str(refusal))
    command = [*found.command, "-std=c++17", "-O1", "-Xcompiler", "-w", "-I", str(headers), str(SOURCE)]
    built = subprocess.run([*command, "-o", str(tmp_path / "oracle")], capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    said = subprocess.run([str(tmp_path / "oracle")], capture_output=True, text=True, check=True).stdout.splitlines()
    assert len(said) == COMPARED
    assert [line for line in said if not line.endswith(": 0")] == []


GENERATOR = runpy.run_path(str(compiler.sources() / "cuda" / "arch" / "generate_wgmma.py"))
STATEMENT = re.compile(r"asm volatile\(\s*((?:\"[^\"]*\"\s*)+):(.*?)\);", re.DOTALL)
OPERAND = re.compile(r"\"(\+f|r|l|n)\"\((.*?)\)(?=\s*[,:]|\s*$)", re.DOTALL)
NAMES = (
    (r"d\[?0*(\d+)\]?", r"d\1"), (r"a\[?0*(\d+)\]?", r"a\1"), (r"a|desc_a", "a"), (r"b|desc_b", "b"),
    (r"A|.*tnspA.*", "trans a"), (r"B|.*tnspB.*", "trans b"), (r".*(?:accumulate|scale_D).*", "accumulate"),
    (r".*scale[AB].*", "1"),
)  # fmt: skip


def meaning(text):
    """An asm statement with its operands' names in the place of their numbers, without spaces."""
    found = STATEMENT.search(text)
    code = "".join(re.findall(r'"([^"]*)"', found[1])).replace("\\n", "")
    names = []
    for constraint, expression in OPERAND.findall(found[2]):
        name = next(re.sub(f"^(?:{old})$", new, expression.strip()) for old, new in NAMES
                    if re.fullmatch(old, expression.strip()))  # fmt: skip
        names.append(name if name == "1" else f"<{constraint} {name}>")
    return re.sub(r"\s+", "", re.sub(r"%(\d+)", lambda at: names[int(at[1])], code))


@pytest.mark.parametrize("registers", [False, True], ids=["ss", "rs"])
@pytest.mark.parametrize("kind", GENERATOR["TYPES"])
@pytest.mark.parametrize("n", GENERATOR["SIZES"])
def test_each_wgmma_has_the_operands_of_cutes(n, kind, registers, headers):
    form, of = "RS" if registers else "SS", 2 * kind.upper()
    text = "".join((headers / "cute" / "arch" / f"mma_sm90_gmma{part}.hpp").read_text() for part in ("", "_ext"))
    start = re.search(rf"struct MMA_64x{n}x16_F32{of}_{form}\b", text).start()
    want = meaning(text[start : start + 20_000])
    assert f"m64n{n}k16" in want and "<+fd0>" in want and "transb" in want
    assert meaning(GENERATOR["function"](n, kind, registers)) == want
