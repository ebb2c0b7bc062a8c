"""Launches as values: which compiled kernel they need, how many programs, how much memory. Nothing is computed here."""

import itertools

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime.jit import JITFunction

from fastattn import dispatch
from fastattn.kernels.host import launch, tile_table
from fastattn.kernels.host.tile_table import ANCESTORS, PASSES, l2_group_of, pick, pick_forward, splits_of, tiles_of
from fastattn.kernels.inspect.compile import GPUS, pretending
from fastattn.masks import Causal, Chunked, Dense, Lengths, Prefix, Segments, Window
from fastattn.spec import AttnInputs, AttnSpec

TARGETS = ("sm80", "sm90")
HALF = torch.bfloat16
MOST_PROGRAMS = 2**31 - 1
"""Of the first axis of a grid; the others end at 65,535."""


def empty(*shape, dtype=HALF):
    return torch.empty(shape, dtype=dtype, device="meta")


def call(*, batch=2, num_heads=8, num_kv_heads=None, q_len=4096, kv_len=None, head_dim=64, head_dim_v=None, dtype=HALF,
         mask=None, bias=None, sinks=False, view=lambda tensor: tensor, **numbers):  # fmt: skip
    """A spec and its tensors on the meta device."""
    kv_heads, kv_len = num_kv_heads or num_heads, q_len if kv_len is None else kv_len
    query = view(empty(batch, num_heads, q_len, head_dim, dtype=dtype))
    key = view(empty(batch, kv_heads, kv_len, head_dim, dtype=dtype))
    value = view(empty(batch, kv_heads, kv_len, head_dim_v or head_dim, dtype=dtype))
    inputs = AttnInputs(
        query,
        key,
        value,
        None if bias is None else empty(*bias, dtype=torch.float32),
        empty(num_heads, dtype=torch.float32) if sinks else None,
        empty(1, dtype=torch.int64) if numbers.get("dropout_p") else None,
    )
    return AttnSpec.of(inputs, mask=mask, **numbers), inputs


def launches(spec, inputs, target):
    """Both passes."""
    out, lse = spec.empty_out(inputs.query), spec.empty_lse(inputs.query)
    dbias = None if inputs.bias is None else launch.empty_dbias(spec, inputs.bias)
    dsinks = None if inputs.sinks is None else launch.empty_dsinks(spec, inputs.sinks, target)
    terms = launch.empty_terms(spec, lse)
    tensors = launch.Backward(out, lse, torch.empty_like(out), lse, *terms, *inputs[:3], dbias, dsinks)
    return [*launch.forward(spec, inputs, out, lse, target), *launch.backward(spec, inputs, tensors, target)]


# ---- one kernel, many problems


@pytest.fixture
def kernels_of(monkeypatch):
    """kernels_of(target, **call) -> {kernel's name: the keys of what Triton would compile}."""
    found, jitted = {}, {}

    def compile_nothing(self, key, *_):
        found.setdefault(self.fn.__name__, set()).add(key)

    monkeypatch.setattr(JITFunction, "_do_compile", compile_nothing)

    def of(target, **arguments):
        found.clear()
        with pretending(GPUS[target]):
            for each in launches(*call(**arguments), target):
                # Instead of the interpreter's functions, which have no keys.
                kernel = jitted.setdefault(each.kernel.fn, JITFunction(each.kernel.fn))
                kernel.warmup(*each.args, grid=(each.programs,), **each.options)
        return {name: frozenset(keys) for name, keys in found.items()}

    return of


def ints(*shape):
    return empty(*shape, dtype=torch.int32)


def heads_after_length(tensor):
    return tensor.transpose(1, 2).contiguous().transpose(1, 2)


def rows_apart(tensor):
    """A part of a larger tensor, as of queries, keys and values made by one projection."""
    return tensor.new_empty(*tensor.shape[:3], 3 * tensor.shape[3])[..., : tensor.shape[3]]


SIZES = {
    "lengths": [{"q_len": n, "kv_len": m} for n, m in ((4097, 4097), (1000, 77), (513, 2**16), (2**17, 1), (200, 16))],
    "batches": [{"batch": n} for n in (16, 17, 160)],
    "heads": [{"num_heads": n} for n in (16, 20, 23)],
    "groups": [{"num_kv_heads": n} for n in (1, 2, 4)],
    "scales": [{"scale": x} for x in (1.0, 0.3, 16.0)],
    "layouts": [{"view": view} for view in (heads_after_length, rows_apart)],
}
"""None with so few tiles that keys are split, nor more than 2^31 elements: those are other kernels."""


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_other_sizes_take_the_same_kernel(kernels_of, sizes, target, head_dim):
    """Sizes of 1, which Triton would make constants of, and sizes that 16 divides among them."""
    base = {"batch": 2, "num_heads": 80, "head_dim": head_dim}
    want = kernels_of(target, **base)
    assert len(want) == 4
    for each in sizes:
        assert kernels_of(target, **base | each) == want, each


BEYOND = 2**40
MASKS = {
    "causal": [Causal(), Causal(align="top-left"), Causal(offset=1), Causal(offset=-16), Causal(offset=BEYOND)],
    "window": [Window(17, 0), Window(1, 0), Window(0, 16), Window(100, 100, offset=1), Window(0, 0, offset=-16)],
    "chunked": [Chunked(1), Chunked(16, 1), Chunked(17, None, 0), Chunked(100, 16, 1, offset=-1), Chunked(BEYOND)],
    "offsets": [Causal(offset=ints(64)), Causal(offset=ints(1))],
    "lengths": [Lengths(ints(64)), Lengths(ints(1))],
    "prefix": [Prefix(ints(64)), Prefix(ints(1), offset=1), Prefix(ints(64), align="top-left")],
    "both": [Causal() & Window(5, None), Causal(offset=1) & Window(16, None), Causal() & Window(1, None, offset=3)],
    "either": [Window(5, 0) | Lengths(ints(64)), Window(1, 16) | Lengths(ints(1))],
}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("masks", MASKS.values(), ids=MASKS)
def test_other_numbers_in_a_mask_take_the_same_kernel(kernels_of, masks, target):
    """Whatever the lengths. Whether a causal mask or a window surely hides nobody is a kernel's matter."""
    kernels = {}
    for mask, q_len in itertools.product(masks, (4096, 4097, 513)):
        spec, _ = call(batch=64, q_len=q_len, mask=mask)
        hides = launch.LaunchBuilder(spec, target).mask.hides
        kernels.setdefault(hides, []).append(kernels_of(target, batch=64, q_len=q_len, mask=mask))
    assert all(each == alike[0] for alike in kernels.values() for each in alike)


CHANGES = {
    "dtype": {"dtype": torch.float16},
    "float32": {"dtype": torch.float32},
    "head-dim": {"head_dim": 128},
    "head-dim-v": {"head_dim_v": 32},
    "mask": {"mask": Causal()},
    "softcap": {"softcap": 5.0},
    "sinks": {"sinks": True},
    "bias": {"bias": (4096, 4096)},
    "bias-of-keys": {"bias": (4096,)},
    "dropout": {"dropout_p": 0.1},
    "negative-scale": {"scale": -1.0},
}


@pytest.mark.parametrize("changed", CHANGES.values(), ids=CHANGES)
def test_another_dtype_width_or_feature_is_another_kernel(kernels_of, changed):
    """Else the test above could not tell kernels apart."""
    plain, other = kernels_of("sm90"), kernels_of("sm90", **changed)
    for name in ("attn_fwd_kernel", "attn_dq_kernel", "attn_dkv_kernel"):
        assert plain[name].isdisjoint(other[name])


def test_another_precision_of_float32_is_another_kernel(kernels_of):
    before, found = torch.get_float32_matmul_precision(), []
    try:
        for precision in ("highest", "high"):
            torch.set_float32_matmul_precision(precision)
            found.append(kernels_of("sm90", dtype=torch.float32))
    finally:
        torch.set_float32_matmul_precision(before)
    assert found[0]["attn_fwd_kernel"].isdisjoint(found[1]["attn_fwd_kernel"])


@pytest.mark.parametrize("target", TARGETS)
def test_more_than_32_bits_of_elements_are_another_kernel(kernels_of, target):
    """Strides take 64 bits then; descriptors have none."""
    many, more = (kernels_of(target, num_heads=200, q_len=n) for n in (2**17, 2**18))
    assert many["attn_delta_kernel"].isdisjoint(more["attn_delta_kernel"])
    assert (many["attn_fwd_kernel"] == more["attn_fwd_kernel"]) == (target == "sm90")


@pytest.mark.parametrize("target", TARGETS)
def test_few_queries_take_the_same_kernels_at_any_length_of_the_keys(kernels_of, target):
    """Split or whole, two kernels in all."""
    found = {"merge": set(), "whole": set()}
    for kv_len, batch, q_len in itertools.product((1, 16, 999, 10**5), (1, 16, 333), (1, 2)):
        kernels = kernels_of(target, batch=batch, num_kv_heads=2, q_len=q_len, kv_len=kv_len)
        found["merge" if "attn_merge_kernel" in kernels else "whole"].add(kernels["attn_fwd_kernel"])
    assert len(found["merge"]) == len(found["whole"]) == 1 and found["merge"].isdisjoint(found["whole"])


@pytest.mark.parametrize("p", [0.5, 0.75, 1.0])
def test_another_dropout_probability_takes_the_same_kernel(kernels_of, p):
    assert kernels_of("sm90", dropout_p=p) == kernels_of("sm90", dropout_p=0.1)


def test_softcaps_take_the_same_kernel(kernels_of):
    assert kernels_of("sm90", softcap=1.0) == kernels_of("sm90", softcap=16.0) == kernels_of("sm90", softcap=0.3)


TABLES = {
    "bias": lambda batch, heads, n: {"bias": (n, n)},
    "bias-of-all": lambda batch, heads, n: {"bias": (batch, heads, n, n)},
    "bias-of-keys": lambda batch, heads, n: {"bias": (batch, 1, 1, n)},
    "mask": lambda batch, heads, n: {"mask": Dense(empty(n, n, dtype=torch.bool))},
    "mask-of-all": lambda batch, heads, n: {"mask": Dense(empty(batch, heads, n, n, dtype=torch.bool))},
}


def table_kernels(kernels_of, table, lengths):
    """How many kernels of each name serve all lengths."""
    found = {}
    for n, batch in itertools.product(lengths, (2, 3)):
        kernels = kernels_of("sm80", batch=batch, num_heads=80, q_len=n, **TABLES[table](batch, 80, n))
        for name, keys in kernels.items():
            found.setdefault(name, set()).update(keys)
    return {name: len(keys) for name, keys in found.items()}


@pytest.mark.parametrize("table", TABLES)
def test_tables_of_aligned_lengths_take_the_same_kernel(kernels_of, table):
    assert set(table_kernels(kernels_of, table, (1008, 1024, 2064, 4096)).values()) == {1}


@pytest.mark.parametrize("table", ["bias-of-all", "bias-of-keys", "mask-of-all"])
def test_tables_of_any_length_take_two_kernels_at_most(kernels_of, table):
    """One where whole vectors of a row can be read, one where not; a row of one element apart."""
    assert set(table_kernels(kernels_of, table, (1000, 1001, 1002, 1004, 1016, 1024, 4096)).values()) <= {1, 2}


# ---- the choice of tiles


def everything(**changed):
    padding = Lengths(empty(2, dtype=torch.int64))
    return call(mask=Causal() & padding, bias=(1, 8, 1, 4096), sinks=True, dropout_p=0.1, **changed)


@pytest.mark.parametrize("target", ANCESTORS)
@pytest.mark.parametrize("made", [call, everything], ids=["plain", "everything"])
def test_the_choice_is_pure(monkeypatch, made, target):
    """The same row each time, from the spec alone: no device is asked, no tensor read."""
    for name in ("get_device_properties", "get_device_capability", "current_device", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: pytest.fail("the device was asked"))
    first, second = ({kernel: made_rows(made()[0], kernel, target) for kernel in PASSES} for _ in range(2))
    assert first == second


def made_rows(spec, kernel, target):
    row = pick_forward(spec, target) if kernel in ("short", "decode") else pick(spec, kernel, target)
    parts = [splits_of(spec, row, target, programs) for programs in (1, 3, 50)] if row.block_n else []
    return row, parts, l2_group_of(spec, spec.kv_len)


@pytest.mark.parametrize("target", ANCESTORS)
def test_rows_do_not_depend_on_sizes(target):
    """But for few queries, which have tiles of their own."""
    for kernel in (each for each in PASSES if each not in ("short", "decode")):
        rows = {
            pick(call(batch=b, q_len=n, num_heads=h)[0], kernel, target) for b, n, h in ((1, 1, 1), (7, 10**6, 160))
        }
        assert len(rows) == 1


# ---- grids


def test_a_grid_has_one_axis_and_is_not_launched_empty():
    grids = []

    class Kernel:
        def __getitem__(self, grid):
            grids.append(grid)
            return lambda *args, **options: None

    for programs in (0, 1, 70_000):
        launch.Launch(Kernel(), programs, (), {}, None).run()
    assert grids == [(1,), (70_000,)]


@pytest.mark.parametrize("target", ANCESTORS)
@pytest.mark.parametrize("sizes", [(70_000, 1, 300), (1, 70_000, 1), (300, 300, 1000), (2, 40, 2**20)], ids=str)
def test_big_problems_have_a_program_for_each_tile(sizes, target):
    """Or, of persistent rows, as many as the device runs; below what an axis of a grid holds."""
    batch, heads, length = sizes
    spec, inputs = call(batch=batch, num_heads=heads, q_len=length, head_dim=128)
    listed = launches(spec, inputs, target)
    assert len(listed) == 4
    for each in listed:
        block = each.row.block_n if each.row.kernel == "dkv" else each.row.block_m
        tiles = batch * heads * tiles_of(length, block)
        if each.row.persistent:
            assert each.programs == min(tiles, tile_table.PROCESSORS[target])
        else:
            assert each.programs == tiles
        assert each.programs <= MOST_PROGRAMS


def test_the_gradient_of_a_bias_has_a_program_for_each_of_its_tiles():
    for shape, tables in (((1000, 1000), 1), ((3, 1, 1000, 1000), 3), ((3, 8, 1000, 1000), 24)):
        last = launches(*call(batch=3, q_len=1000, bias=shape), "sm80")[-1]
        assert last.row.kernel == "dbias"
        assert last.programs == tables * tiles_of(1000, last.row.block_m) * tiles_of(1000, last.row.block_n)


# ---- memory


class Counting(TorchDispatchMode):
    """Adds up the bytes of all memory taken, given back or not."""

    def __init__(self):
        super().__init__()
        self.taken, self.kept = 0, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = {
            each.untyped_storage()._cdata for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)
        }
        for each in tree_leaves(result):
            if isinstance(each, torch.Tensor):
                storage = each.untyped_storage()
                if storage._cdata not in given | self.kept.keys():
                    self.kept[storage._cdata] = storage  # or its address would come again
                    self.taken += storage.nbytes()
        return result


@pytest.fixture
def scratch(monkeypatch):
    """scratch(**call) -> bytes taken by both passes, beyond the inputs and what is returned."""
    monkeypatch.setattr(launch.Launch, "run", lambda self: None)
    monkeypatch.setattr(launch, "target_for", lambda device: "sm90")
    backend = dispatch.load("triton")

    def of(**arguments):
        spec, inputs = call(**arguments)
        with Counting() as counting:
            out, lse = backend.forward(spec, inputs)
            grads = backend.backward(spec, inputs, out, lse, out, lse)
        returned = sum(each.untyped_storage().nbytes() for each in (out, lse, *grads) if each is not None)
        return counting.taken - returned

    return of


def test_what_is_counted(scratch):
    """Two rows of float32 numbers a query, padded, and nothing else."""
    assert scratch(batch=2, num_heads=40, q_len=1000) == 2 * 4 * 2 * 40 * 1008


LINEAR = {
    "plain": lambda n: {},
    "causal": lambda n: {"mask": Causal()},
    "window": lambda n: {"mask": Window(128, 0)},
    "lengths": lambda n: {"mask": Causal() & Lengths(empty(2, dtype=torch.int64))},
    "sinks-dropout": lambda n: {"sinks": True, "dropout_p": 0.1, "softcap": 3.0},
    "bias-of-keys": lambda n: {"bias": (2, 1, 1, n)},
    "bias-of-queries": lambda n: {"bias": (8, n, 1)},
    "documents": lambda n: {"mask": Segments(ints(2, n), sorted=True)},
    "strided": lambda n: {"view": rows_apart},
}


@pytest.mark.parametrize("made", LINEAR.values(), ids=LINEAR)
def test_memory_grows_with_the_length_and_not_its_square(scratch, made):
    """At most 512 bytes a token of each head, whatever the length."""
    short, long = (scratch(q_len=n, **made(n)) for n in (2**12, 2**16))
    assert short <= 512 * 2 * 8 * 2**12
    assert long <= 16 * short


def test_block_lists_are_small_beside_the_table(scratch):
    """One number a tile, not one a pair of a query and a key; a table is cut down to its tiles keys first."""
    n = 2**14
    assert scratch(q_len=n, mask=Segments(ints(1, n))) < n * n // 50
    assert scratch(q_len=n, mask=Dense(empty(n, n, dtype=torch.bool))) < n * n // 4


def test_split_keys_take_no_more_for_longer_ones(scratch):
    """Partial outputs: as many as fill the device."""
    short, long = (scratch(batch=1, num_heads=8, num_kv_heads=1, q_len=1, kv_len=n) for n in (2**18, 2**22))
    assert 0 < long == short
