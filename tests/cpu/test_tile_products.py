"""TDPBF16PS, bit for bit: the emulation, and the instruction where the processor has it, against exact fractions."""

import ctypes
import subprocess
from fractions import Fraction

import pytest
import torch

from fastattn.building import compiler

SOURCE = """
#define FASTATTN_ISA product
#include "cpu/amx.h"
extern "C" __attribute__((visibility("default"))) void product(const void* a, const void* b, void* c) {
  using namespace fastattn::product;
  const ShapedTiles shaped;
  load_tile<0>(c, 64);
  load_tile<1>(a, 64);
  load_tile<2>(b, 64);
  multiply_tiles<0, 1, 2>();
  store_tile<0>(c, 64);
}
"""
LEAST = Fraction(2) ** -126  # of float32's normal numbers


@pytest.fixture(params=["emulated", "instruction"])
def product(request, tmp_path, library):
    """c + a @ b of tiles, in place of c: a [16, 16, 2] (row, pair, which), b [16, 16, 2] (pair, column, which)."""
    if request.param == "instruction" and ("amx" not in library.isas() or " amx_bf16" not in _cpuinfo()):
        pytest.skip("this processor has no AMX tiles")  # `isas` has asked the system for them
    source, output = tmp_path / "product.cpp", tmp_path / "product.so"
    source.write_text(SOURCE)
    flags = ["-DFASTATTN_EMULATE_AMX"] if request.param == "emulated" else []
    command = compiler.find_compiler().command
    subprocess.run(
        [*command, *compiler.FLAGS, *flags, "-I", compiler.sources(), "-shared", source, "-o", output], check=True
    )
    call = ctypes.CDLL(str(output)).product

    def run(a, b, c):
        call(*(ctypes.c_void_p(each.data_ptr()) for each in (a, b, c)))
        return c

    return run


def _cpuinfo():
    try:
        with open("/proc/cpuinfo") as file:
            return file.read()
    except OSError:
        return ""


def _rounded(exact):
    """To float32, ties to even; what is denormal becomes 0."""
    if abs(exact) < LEAST:
        return Fraction(0)
    exponent = 0  # of the last bit of 24
    while abs(exact) >= 2**24 * Fraction(2) ** exponent:
        exponent += 1
    while abs(exact) < 2**23 * Fraction(2) ** exponent:
        exponent -= 1
    step = Fraction(2) ** exponent
    return round(exact / step) * step  # of Fraction: ties to even


def _expected(a, b, c):
    """As the manual defines it: two chains of fused multiply-adds, then their sum, then c."""
    a, b, c = ([[Fraction(x) for x in row] for row in each.flatten(1).double().tolist()] for each in (a, b, c))
    rows = []
    for r in range(16):
        rows.append([])
        for n in range(16):
            first = second = Fraction(0)
            for k in range(16):
                first = _rounded(first + a[r][2 * k] * b[k][2 * n])
                second = _rounded(second + a[r][2 * k + 1] * b[k][2 * n + 1])
            rows[-1].append(float(_rounded(c[r][n] + _rounded(first + second))))
    return torch.tensor(rows, dtype=torch.float64).float()


def _tiles(seed, spread):
    """Random tiles with the exponents of numbers spread over +-`spread` powers of two."""
    torch.manual_seed(seed)
    made = [torch.randn(16, 16, 2) * torch.randint(-spread, spread + 1, (16, 16, 2)).float().exp2() for _ in "ab"]
    c = torch.randn(16, 16) * torch.randint(-spread, spread + 1, (16, 16)).float().exp2()
    return made[0].bfloat16(), made[1].bfloat16(), c


@pytest.mark.parametrize("spread", [0, 6, 20])
def test_random_tiles(product, spread):
    a, b, c = _tiles(spread, spread)
    expected = _expected(a, b, c)
    in_order = c + torch.einsum("rkw,knw->rn", a.float(), b.float())
    assert not torch.equal(expected, in_order)  # so the order of the sums shows in the bits
    torch.testing.assert_close(product(a, b, c), expected, rtol=0, atol=0)


def test_denormals_are_zeros(product):
    """Going in, between the steps and coming out."""
    a, b, c = _tiles(1, 1)
    a[:5] = a[:5] * 2.0**-66
    b[:, :9] = b[:, :9] * 2.0**-62  # products near the least normal number
    a[5:9] = 2.0**-130  # themselves denormal
    c[:, :12] = c[:, :12] * 2.0**-126
    assert bool((a[5:9] != 0).all())
    flushed = a.clone()
    flushed[5:9] = 0
    small = torch.where(c.abs() < 2.0**-126, 0.0, c)
    expected = _expected(flushed, b, small)
    assert bool(((expected == 0) & (c != 0)).any()) and bool((expected != 0).any())
    torch.testing.assert_close(product(a, b, c.clone()), expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("a", "b", "c", "expected"),
    [
        pytest.param(torch.inf, 1.0, 0.0, torch.inf, id="inf"),
        pytest.param(torch.inf, 0.0, 0.0, torch.nan, id="inf-times-0"),
        pytest.param(3e38, 3e38, -torch.inf, torch.nan, id="overflow-and-minus-inf"),
        pytest.param(1.0, 1.0, torch.nan, torch.nan, id="nan-in-c"),
    ],
)
def test_what_is_not_finite(product, a, b, c, expected):
    rows, columns = torch.zeros(16, 16, 2, dtype=torch.bfloat16), torch.zeros(16, 16, 2, dtype=torch.bfloat16)
    sums = torch.zeros(16, 16)
    rows[3, 4, 1], columns[4, 5, 1], sums[3, 5] = a, b, c
    got = product(rows, columns, sums)
    torch.testing.assert_close(got[3, 5], torch.tensor(expected), equal_nan=True)
    assert bool((got[:3] == 0).all()) and bool((got[4:] == 0).all())
