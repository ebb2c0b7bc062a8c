"""The PTX halves compile for Hopper wherever nvcc is found, without spills and without products that wait for one
another; the checked-in wgmma variants are what their generator writes.
"""

import re
import runpy
from pathlib import Path

import pytest

from fastattn.building import compiler

ARCH = compiler.sources() / "cuda" / "arch"
SIMULATED = ("mistakes", "addresses")  # whose mistakes are for the simulator alone
KERNELS = Path(__file__).parent / "kernels"
FILES = [path.stem for path in sorted(KERNELS.glob("*.cu")) if path.stem not in SIMULATED]
MOST_OF_THEM = 50
SPILL = re.compile(r"[1-9]\d* bytes spill")
SERIAL = re.compile(r"C75(?:10|14|17|18|19)\b")
WRAPPER = re.compile(r"((?:^//[^\n]*\n)*)^(?:template <[^\n]*>\n)?DEVICE (.*?)^}$", re.MULTILINE | re.DOTALL)
SECTION = re.compile(r"PTX ISA: \w")


@pytest.mark.parametrize("name", FILES)
def test_nvcc_compiles_the_wrappers(compile_for_gpu, name):
    _, said = compile_for_gpu(name)
    assert "Used" in said, said
    assert not SPILL.search(said), said
    assert not SERIAL.search(said), said


def test_the_older_half_compiles_for_sm_80(compile_for_gpu):
    _, said = compile_for_gpu("ampere", "arch=compute_80,code=sm_80")
    assert "sm_80" in said and not SPILL.search(said), said


def test_the_patterns_see_what_they_look_for():
    assert SPILL.search("8 bytes stack frame, 12 bytes spill stores") and not SPILL.search("0 bytes spill stores")
    assert SERIAL.search("ptxas info    : (C7519) warpgroup.arrive is injected") and not SERIAL.search("(C7508)")


def test_the_wgmma_variants_are_what_the_generator_writes():
    written = runpy.run_path(str(ARCH / "generate_wgmma.py"))["files"]()
    assert {path.name: path.read_text() for path in (ARCH / "wgmma").glob("*.h")} == written


def functions(text):
    """The comment and the body of each wrapper with a PTX half."""
    for comment, body in WRAPPER.findall(text):
        if "asm" in body:
            yield comment, body


def test_the_wrappers_are_found():
    assert sum(len(list(functions(path.read_text()))) for path in ARCH.glob("*.h")) >= MOST_OF_THEM


def name_of(body):
    return re.match(r"[\w ]*?(\w+)\(", body)[1]


def test_a_kernel_executes_each_wrapper():
    """On a GPU its PTX half, in the tests marked gpu."""
    kernels = "".join((KERNELS / f"{name}.cu").read_text() for name in FILES)
    names = {name_of(body) for path in ARCH.glob("*.h") for _, body in functions(path.read_text())}
    assert sorted(name for name in names if not re.search(rf"\b{name}\b", kernels)) == []


@pytest.mark.parametrize("path", sorted(ARCH.glob("*.h")), ids=lambda path: path.name)
def test_each_wrapper_has_both_halves_and_names_its_instruction(path):
    text = path.read_text()
    named = False
    for comment, body in functions(text):
        name = name_of(body)
        assert "FASTATTN_SIM" in body, f"{name} has no simulator half"
        # Overloads follow the one whose comment names the instruction.
        named = named or bool(SECTION.search(comment))
        assert named, f"{name} does not say which instruction of the PTX ISA it is"
