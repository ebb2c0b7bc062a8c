"""Each wrapper of csrc/cuda/arch: the simulator's half against the definition in NVIDIA's PTX ISA, written out here
anew; on a GPU the PTX half of the same kernel against the simulator's.
"""

import ctypes
import math
import runpy

import numpy as np
import pytest
import torch

from fastattn.building import compiler

HALVES = {"bf16": torch.bfloat16, "f16": torch.float16}
each_half = pytest.mark.parametrize("half", HALVES)


def words(tensor):
    return tensor.view(torch.int32)


# Numbers ------------------------------------------------------------------------------------------------------------

EXTREMES = [65504.0, 65520.0, 6e-8, 3e-8, 1e-5, 3.4e38]
SPECIAL = [0.0, -0.0, math.inf, -math.inf, math.nan, 1.0, -1.0, 1e-40, -1e-40, *EXTREMES]
NUMBERS = {
    "exp2": (0, torch.exp2, 1e-6),
    "log2": (1, lambda x: torch.log2(torch.where(x.abs() < 2**-126, x * 0, x)), 1e-6),
    "tanh": (2, torch.tanh, 1e-3),
    "reciprocal": (3, lambda x: 1 / torch.where(x.abs() < 2**-126, x * 0, x), 1e-6),
}


def floats():
    return torch.cat([torch.tensor(SPECIAL), torch.randn(1009) * 8, torch.randn(1000) * 1e-6]).contiguous()


@pytest.mark.parametrize("name", NUMBERS)
def test_an_approximate_function_is_near_the_exact_one(execute, name):
    which, exact, rtol = NUMBERS[name]
    x, out = floats(), torch.full((2024,), math.nan)
    assert execute("numbers", which, x, out, len(x), outputs=[out], rtol=rtol, atol=rtol) is None
    want = exact(x)
    if name in ("exp2", "reciprocal"):
        want = torch.where(want.abs() < 2**-126, want * 0, want)
    torch.testing.assert_close(out, want, rtol=rtol, atol=rtol, equal_nan=True)


@each_half
def test_pack_rounds_two_floats_to_nearest_even(execute, half):
    x = floats()
    x = torch.where(x.isnan(), 0.5, x)
    out = torch.zeros(len(x), dtype=torch.int32)
    assert execute("numbers", 4 if half == "bf16" else 5, x, out, len(x), outputs=[out]) is None
    pairs = torch.stack([x, x.view(-1, 2).flip(1).reshape(-1)], 1).to(HALVES[half])
    assert torch.equal(out, words(pairs).reshape(-1))


@each_half
def test_unpack_is_exact(execute, half):
    x = torch.randn(1024, 2).to(HALVES[half])
    x[:4] = torch.tensor([[0.0, -0.0], [math.inf, -math.inf], [6e-8, -3e-7], [1.0, 2.0]]).to(HALVES[half])
    out = torch.zeros(1024, dtype=torch.int32)
    assert execute("numbers", 6 if half == "bf16" else 7, x, out, 1024, outputs=[out]) is None
    both = words(x.float())
    assert torch.equal(out, both[:, 0] ^ both[:, 1])


CANONICAL_NAN = 0x7FFFFFFF
"""The one that instructions of a GPU make: code that takes a number's bits apart sees which."""


def test_max_nan_keeps_a_nan(execute):
    x = floats()[: len(floats()) // 2 * 2].contiguous()
    out = torch.zeros(len(x), dtype=torch.int32)
    assert execute("numbers", 8, x, out, len(x), outputs=[out]) is None
    y = x.view(-1, 2).flip(1).reshape(-1)
    want = torch.where((x == 0) & (y == 0), x + y, torch.maximum(x, y))  # of two zeros, the positive one
    assert torch.equal(out, torch.where(want.isnan(), CANONICAL_NAN, words(want)))


# Matrices of a warp -------------------------------------------------------------------------------------------------


def fragments(matrices, transposed):
    """[4, 8, 8] -> [32 lanes, 4 matrices, 2 elements]: row lane / 4, columns 2 (lane % 4) and the next."""
    if transposed:
        matrices = matrices.transpose(1, 2)
    return matrices.reshape(4, 32, 2).transpose(0, 1).contiguous()


@pytest.mark.parametrize("transposed", [False, True], ids=["", "transposed"])
def test_ldmatrix(execute, transposed):
    matrices = torch.randint(-(2**15), 2**15, (4, 8, 8), dtype=torch.int16)
    out = torch.zeros(32, 4, 2, dtype=torch.int16)
    assert execute("matrices", int(transposed), matrices, out, outputs=[out]) is None
    assert torch.equal(out, fragments(matrices, transposed))


@pytest.mark.parametrize("transposed", [False, True], ids=["", "transposed"])
def test_stmatrix(execute, transposed):
    matrices = torch.randint(-(2**15), 2**15, (4, 8, 8), dtype=torch.int16)
    out = torch.zeros_like(matrices)
    assert execute("matrices", 2 + int(transposed), fragments(matrices, transposed), out, outputs=[out]) is None
    assert torch.equal(out, matrices)


@each_half
def test_mma(execute, half):
    a, b, d = torch.randn(16, 16).to(HALVES[half]), torch.randn(16, 8).to(HALVES[half]), torch.randn(16, 8)
    given = torch.zeros(32, 10, dtype=torch.int32)
    for lane in range(32):
        group, pair = lane // 4, lane % 4 * 2
        own = [a[group + i % 2 * 8, pair + i // 2 * 8 :][:2] for i in range(4)]
        own += [b[pair + 8 * i : pair + 8 * i + 2, group].contiguous() for i in range(2)]
        given[lane, :6] = torch.cat([words(each.contiguous()) for each in own])
        given[lane, 6:] = words(torch.stack([d[group + i // 2 * 8, pair + i % 2] for i in range(4)]))
    out = torch.full((32, 4), math.nan)
    which = 4 if half == "bf16" else 5
    assert execute("matrices", which, given, out, outputs=[out], atol=1e-4, rtol=1e-5) is None
    want = a.double() @ b.double() + d.double()
    got = torch.empty(16, 8)
    for lane in range(32):
        for i in range(4):
            got[lane // 4 + i // 2 * 8, lane % 4 * 2 + i % 2] = out[lane, i]
    torch.testing.assert_close(got.double(), want, atol=1e-4, rtol=1e-5)


# Copies -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", [0, 1], ids=["group", "mbarrier"])
def test_cp_async_copies_and_zero_fills(execute, which):
    pieces, out = torch.randint(-99, 99, (64, 4), dtype=torch.int32), torch.full((64, 4), -1, dtype=torch.int32)
    assert execute("copies", which, pieces, out, outputs=[out]) is None
    want = pieces.clone()
    want[::3] = 0
    assert torch.equal(out, want.view(32, 2, 4).flip(1).view(64, 4))


@pytest.mark.parametrize("which", [2, 3, 4], ids=["load", "store", "add"])
def test_bulk(execute, which):
    given, out = torch.randn(256), torch.randn(256)
    want = given + out if which == 4 else given
    assert execute("copies", which, given, out, outputs=[out]) is None
    assert torch.equal(out, want)


# 32 sectors of 32 bytes hold the 1024 bytes; where each lane writes its own 16 in four instructions, each goes out
# four times.
STORES = {
    "16 bytes a lane": (5, 16, 32),
    "8 bytes a lane": (6, 8, 32),
    "4 bytes a lane": (7, 4, 32),
    "4 of each lane's 16 bytes": (8, 4, 128),
}


@pytest.mark.parametrize("case", STORES)
def test_stores_and_the_sectors_that_they_are_sent_in(execute, stored, case):
    which, lane_bytes, sectors = STORES[case]
    given, out = torch.randn(256), torch.full((256,), math.nan)
    stored("copies", lane_bytes)
    assert execute("copies", which, given, out, outputs=[out]) is None
    assert torch.equal(out, given)
    assert stored("copies", lane_bytes) == (3 * 1024, 3 * sectors)  # under three schedules


# Boxes of tensors ---------------------------------------------------------------------------------------------------

EXTENTS = (72, 11, 3, 2, 2)  # innermost first
SIDES = (8, 2, 2, 1)  # of the box, beyond the innermost
PLACES = {
    "inside": (0, 1, 0, 0, 0),
    "over the end": (40, 7, 2, 1, 1),
    "before the start": (-8, -3, -1, 0, 0),
    "outside": (72, 20, 5, 2, 2),
}
ELEMENTS = {"bf16": (0, torch.bfloat16), "f16": (1, torch.float16), "float32": (2, torch.float32)}


def numbers(*values):
    """An array of ints that the host reads."""
    return (ctypes.c_int * len(values))(*values)


def box_case(rank, swizzle, element, place):
    code, dtype = ELEMENTS[element]
    inner = (16 << swizzle) // dtype.itemsize if swizzle else 16
    sides = (inner, *SIDES[: rank - 1])
    shape = numbers(code, swizzle, *EXTENTS[:rank], *sides, *PLACES[place][:rank])
    tensor = torch.randn(*reversed(EXTENTS[:rank])).to(dtype)
    return shape, tensor, sides, dtype


def swizzled_order(count, itemsize, swizzle, offset=0):
    """Where each element of the box lies: 16-byte pieces change places by bits 7 to 9 of the address."""
    address = offset + np.arange(count) * itemsize
    return torch.from_numpy(((address ^ ((address >> 7) & ((1 << swizzle) - 1)) << 4) - offset) // itemsize)


def visit(sides, place, extents):
    """Each element of a box: its number in the box, its index in the tensor, whether it is inside."""
    for number, index in enumerate(np.ndindex(*reversed(sides))):
        at = tuple(p + i for p, i in zip(reversed(place[: len(sides)]), index, strict=True))
        yield number, at, all(0 <= a < e for a, e in zip(at, reversed(extents[: len(sides)]), strict=True))


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("swizzle", range(4), ids=["plain", "swizzle32", "swizzle64", "swizzle128"])
@pytest.mark.parametrize("rank", range(2, 6))
def test_tma_load(execute, rank, swizzle, place):
    shape, tensor, sides, dtype = box_case(rank, swizzle, "bf16", place)
    count = math.prod(sides)
    out = torch.full((count,), math.nan, dtype=dtype)
    assert execute("boxes", rank, 0, shape, 0, 0, tensor, out, outputs=[out]) is None
    want = torch.zeros(count, dtype=dtype)
    for number, at, inside in visit(sides, PLACES[place], EXTENTS):
        if inside:
            want[number] = tensor[at]
    assert torch.equal(out[swizzled_order(count, dtype.itemsize, swizzle)], want)


@pytest.mark.parametrize("offset", [128, 384, 896])
@pytest.mark.parametrize("swizzle", range(4), ids=["plain", "swizzle32", "swizzle64", "swizzle128"])
def test_a_box_that_begins_within_the_pattern_is_swizzled_by_its_addresses(execute, swizzle, offset):
    """So that boxes of fewer than eight rows, one below another, make one tile."""
    shape, tensor, sides, dtype = box_case(4, swizzle, "bf16", "inside")
    count = math.prod(sides)
    out = torch.full((count,), math.nan, dtype=dtype)
    assert execute("boxes", 4, 0, shape, offset, 0, tensor, out, outputs=[out]) is None
    want = torch.zeros(count, dtype=dtype)
    for number, at, inside in visit(sides, PLACES["inside"], EXTENTS):
        if inside:
            want[number] = tensor[at]
    assert torch.equal(out[swizzled_order(count, dtype.itemsize, swizzle, offset)], want)


@pytest.mark.parametrize("rank", [2, 4])
def test_a_tensor_may_begin_at_any_multiple_of_16_bytes(execute, rank):
    """Nothing more is asked of its address, swizzled or not."""
    shape, tensor, sides, dtype = box_case(rank, 3, "bf16", "inside")
    memory = torch.zeros(tensor.numel() + 64, dtype=dtype)
    count = math.prod(sides)
    for first in (8, 24, 40):
        memory[first : first + tensor.numel()] = tensor.flatten()
        out = torch.full((count,), math.nan, dtype=dtype)
        assert execute("boxes", rank, 0, shape, 0, 2 * first, memory, out, outputs=[out]) is None
        want = torch.zeros(count, dtype=dtype)
        for number, at, inside in visit(sides, PLACES["inside"], EXTENTS):
            if inside:
                want[number] = tensor[at]
        assert torch.equal(out[swizzled_order(count, dtype.itemsize, 3)], want)


@pytest.mark.parametrize("place", ["inside", "outside"])  # one policy each
@pytest.mark.parametrize("element", ELEMENTS)
def test_tma_load_with_a_policy(execute, element, place):
    shape, tensor, sides, dtype = box_case(4, 3, element, place)
    out = torch.full((math.prod(sides),), math.nan, dtype=dtype)
    hinted = out.clone()
    assert execute("boxes", 4, 0, shape, 0, 0, tensor, out, outputs=[out]) is None
    assert execute("boxes", 4, 1, shape, 0, 0, tensor, hinted, outputs=[hinted]) is None
    assert torch.equal(out, hinted) and not out.isnan().any()


each_way_out = pytest.mark.parametrize(
    "rank, action, element", [(4, 2, "bf16"), (5, 2, "f16"), (4, 3, "float32"), (4, 3, "bf16")],
    ids=["store4d", "store5d", "add-float32", "add-bf16"],
)  # fmt: skip
ILLEGAL = "an illegal instruction was encountered"
"""What CUDA says of it, and the simulator, which adds why."""


@pytest.mark.parametrize("place", [place for place in PLACES if min(PLACES[place]) >= 0])
@each_way_out
def test_tma_store_and_add(execute, rank, action, element, place):
    shape, tensor, sides, dtype = box_case(rank, 3, element, place)
    box = torch.randn(math.prod(sides)).to(dtype)
    want = tensor.clone()
    for number, at, inside in visit(sides, PLACES[place], EXTENTS):
        if inside:
            want[at] = want[at] + box[number] if action == 3 else box[number]
    laid = torch.empty_like(box)
    laid[swizzled_order(len(box), dtype.itemsize, 3)] = box
    assert execute("boxes", rank, action, shape, 0, 0, tensor, laid, outputs=[tensor]) is None
    assert torch.equal(tensor, want)


@each_way_out
def test_a_tma_store_or_addition_before_the_start_is_an_illegal_instruction(execute, rank, action, element):
    """On a GPU it spoils the process that runs the kernels, which is another one afterwards. Loads may start there."""
    shape, tensor, sides, dtype = box_case(rank, 3, element, "before the start")
    box, before = torch.randn(math.prod(sides)).to(dtype), tensor.clone()
    said = execute("boxes", rank, action, shape, 0, 0, tensor, box, outputs=[tensor], refusal=ILLEGAL)
    assert "coordinate 0 is -8, and a box that goes out starts at 0 or beyond" in said
    assert torch.equal(tensor, before)


@pytest.mark.parametrize("dimension", range(5))
def test_the_simulator_refuses_each_negative_coordinate_of_a_store(simulate, dimension):
    """Any one of them: which are enough for the hardware has not been tried."""
    tensor = torch.randn(*reversed(EXTENTS)).half()
    at = [-1 if each == dimension else 0 for each in range(5)]
    shape = numbers(1, 3, *EXTENTS, 64, *SIDES, *at)
    said = simulate("boxes", 5, 2, shape, 0, 0, tensor, torch.randn(64 * math.prod(SIDES)).half())
    assert said.startswith(f"{ILLEGAL}: coordinate {dimension} is -1,") and "cp.async.bulk.tensor (store)" in said


REFUSED = {
    "a side of 0": ((0, 0, 72, 11, 16, 0), "side 1 is 0"),
    "a side of 257": ((0, 0, 72, 11, 16, 257), "side 1 is 257"),
    "a row of 24 bytes": ((0, 0, 72, 11, 12, 8), "24 bytes"),
    "a row wider than the swizzle": ((0, 1, 72, 11, 64, 8), "the swizzle's pattern is 32 wide"),
    "a stride of 22 bytes": ((0, 0, 11, 72, 8, 8), "stride 1 is 22 bytes"),
    "an extent of 0": ((0, 0, 72, 0, 16, 8), "extent 1 is 0"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_tensor_map_that_cuda_refuses_is_refused(simulate, case):
    shape, words_of_it = REFUSED[case]
    tensor = torch.zeros(4096)
    said = simulate("boxes", 2, 0, numbers(*shape, 0, 0), 0, 0, tensor, tensor)
    assert said is not None and words_of_it in said


# Products of a warpgroup --------------------------------------------------------------------------------------------

SIZES = runpy.run_path(str(compiler.sources() / "cuda" / "arch" / "generate_wgmma.py"))["SIZES"]
LAYOUTS = ["ss-k-k", "rs-mn", "ss-k-mn", "ss-mn-k", "ss-mn-mn", "rs-k"]
PRODUCTS = [(n, form) for n in SIZES for form in range(6 if n == 64 else 2)]


@pytest.mark.parametrize("n, form", PRODUCTS, ids=[f"n{n}-{LAYOUTS[form]}" for n, form in PRODUCTS])
@each_half
def test_wgmma(execute, half, n, form):
    a, b = torch.randn(64, 64).to(HALVES[half]), torch.randn(64, n).to(HALVES[half])
    d = torch.full((64, n), math.nan)
    assert execute("products", n, int(half == "bf16"), form, a, b, d, outputs=[d], atol=1e-3, rtol=1e-5) is None
    torch.testing.assert_close(d.double(), 1 + a.double() @ b.double(), atol=1e-4, rtol=1e-5)


# Barriers, fences, registers ----------------------------------------------------------------------------------------


def doubling(count):
    return [count] + [2**block for block in range(count)]


BARRIERS = {
    "named barriers take turns": (0, torch.full((16,), -1), [0, 1] * 8),
    "elect one thread of each warp": (1, torch.full((4,), -1), [1, 1, 1, 1]),
    "an mbarrier counts arrivals and bytes": (
        2,
        torch.cat([torch.full((32,), -1), torch.tensor([5, 6, 7, 8])]),
        [10 * turn + i + 5 + i for turn in range(8) for i in range(4)] + [5, 6, 7, 8],
    ),
    "registers change hands": (3, torch.full((384,), -1), list(range(384))),
    "blocks in turn": (4, torch.zeros(13), doubling(12)),
    "a fence before the copy engine reads global memory": (5, torch.full((8,), -1), [0, 7, 14, 21, 1, 8, 15, 22]),
    "shared memory starts at a multiple of 1024": (6, torch.full((1,), -1), [0]),
    "a launch that waits for the one before": (7, torch.zeros(32), [3] * 32),
}


@pytest.mark.parametrize("case", BARRIERS)
def test_barriers(execute, case):
    which, start, want = BARRIERS[case]
    out = start.to(torch.int32)
    assert execute("barriers", which, out, outputs=[out]) is None
    assert out.tolist() == want


# Whole kernels ------------------------------------------------------------------------------------------------------


@each_half
@pytest.mark.parametrize("b_mn", [False, True], ids=["b-k", "b-mn"])
@pytest.mark.parametrize("a_registers", [False, True], ids=["ss", "rs"])
def test_a_pipeline_of_tma_and_wgmma(execute, a_registers, b_mn, half):
    dtype = HALVES[half]
    a, b = torch.randn(104, 200).to(dtype), torch.randn(200, 136).to(dtype)
    c = torch.full((104, 136), math.nan, dtype=dtype)
    given = b if b_mn else b.t().contiguous()
    form = int(half == "bf16"), int(b_mn), int(a_registers)
    said = execute("product", a, given, c, 104, 136, 200, *form, 0, outputs=[c], atol=0.13, rtol=1e-2)
    assert said is None
    torch.testing.assert_close(c.double(), a.double() @ b.double(), atol=0.13, rtol=1e-2)


def test_a_pipeline_of_cp_async_and_mma(execute):
    a, b = torch.randn(72, 104).bfloat16(), torch.randn(40, 104).bfloat16()
    c = torch.full((72, 40), math.nan)
    assert execute("ampere", a, b, c, 72, 40, 104, 0, outputs=[c], atol=1e-4, rtol=1e-5) is None
    torch.testing.assert_close(c.double(), a.double() @ b.double().T, atol=1e-4, rtol=1e-5)
