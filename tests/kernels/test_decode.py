"""Few queries: the heads of a group in one tile, keys split over programs, parts merged by their lse."""

import dataclasses

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from fastattn import dropout_mask, reference
from fastattn.backends import triton
from fastattn.kernels.host import launch, tile_table
from fastattn.kernels.host.tile_table import pick, pick_forward, splits_of, tiles_of
from fastattn.masks import Causal, Chunked, Dense, Full, Lengths, Packed, Prefix, Segments, Window
from fastattn.masks.paged import Paged
from fastattn.spec import AttnInputs, AttnSpec
from fastattn.testing import Case, check_close, make_inputs, run

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TARGET = launch.target_for(torch.device(DEVICE))
MANY = 10_000
"""Processors: more than there is work for, so that only the keys limit the splits."""


def ints(*values):
    return torch.tensor(values, device=DEVICE)


@pytest.fixture
def processors(monkeypatch):
    """Pretends that the device has this many; plans made for another number are forgotten."""

    def pretend(count):
        monkeypatch.setitem(tile_table.PROCESSORS, TARGET, count)
        monkeypatch.setattr("fastattn.kernels.host.run._PLANS", {})

    return pretend


def problem_of(q_len, kv_len, group=1, mask=None, **fields):
    """One batch item, one key head, 16 wide."""
    sizes = {"batch": 1, "num_heads": group, "num_kv_heads": 1, "head_dim": 16} | fields
    return make_inputs(Case("decode", q_len, kv_len, mask=lambda case, device: mask, **sizes), DEVICE)


TILE = pick(problem_of(1, 1).spec, "decode", TARGET).block_n
"""Keys that a tile of few queries takes at a time; a part takes four tiles at least."""
PER_SPLIT = 4 * TILE


def launches(problem):
    """What the forward pass launches."""
    spec = problem.spec
    out, lse = spec.empty_out(problem.inputs.query), spec.empty_lse(problem.inputs.query)
    return launch.forward(spec, problem.inputs, out, lse, TARGET)


def splits(problem):
    """Over how many programs the keys of a tile are split, by the memory that the parts take."""
    first, *merge = launches(problem)
    assert first.options["VARIANT"].SPLIT.value == bool(merge)
    return first.args[4].lse.shape[0] // problem.spec.batch


def most_splits(problem):
    """What the keys allow."""
    return problem.spec.kv_len // (4 * launches(problem)[0].row.block_n)


def is_packed(problem):
    return launches(problem)[0].options["VARIANT"].PACKED.value


def check(problem, grads=False):
    """Against float64; the results."""
    results = run(problem, "triton", grads=grads)
    check_close(problem, results)
    return results


# ---- the heads of a group in one tile


@pytest.mark.parametrize("group", range(1, 9))
@pytest.mark.parametrize("q_len", [1, 2, 3])
def test_the_heads_of_a_group_share_a_tile(q_len, group):
    """Where they fit one: the tile of few queries holds so many rows."""
    problem = problem_of(q_len, 37, group, Causal(), batch=2, num_heads=2 * group, num_kv_heads=2)
    row = pick_forward(problem.spec, TARGET)
    fits = q_len * group <= pick(problem.spec, "decode", TARGET).block_m
    assert (row.kernel == "decode") == fits
    assert is_packed(problem) == (group > 1 and row.kernel != "fwd")
    if is_packed(problem):
        assert launches(problem)[0].programs == 4
    check(problem)


@pytest.mark.parametrize(("q_len", "group"), [(1, 16), (16, 1), (4, 4), (5, 3), (1, 17), (17, 1), (3, 6)], ids=str)
def test_tiles_that_are_just_full_and_just_too_small(q_len, group):
    check(problem_of(q_len, 40, group, Causal()))


FEATURES = {
    "bias-all": {"bias": (2, 6, 2, 37)},
    "bias-keys": {"bias": (37,)},
    "bias-queries": {"bias": (6, 2, 1)},
    "bias-heads": {"bias": (6, 1, 1)},
    "sinks": {"sinks": True},
    "softcap": {"softcap": 2.0},
    "dropout": {"dropout_p": 0.3},
    "float16": {"dtype": torch.float16},
    "float32": {"dtype": torch.float32},
    "head-dims": {"head_dim": 24, "head_dim_v": 40},
    "heads-after-length": {"layout": "blhd"},
    "every-second": {"layout": "strided"},
    "all": {"bias": (6, 2, 37), "sinks": True, "softcap": 3.0, "dropout_p": 0.2},
}


@pytest.mark.parametrize("extra", FEATURES.values(), ids=FEATURES)
def test_packed_rows_keep_their_heads_features(extra):
    """Two queries of three heads in a tile: each row has its head's bias, sink and dropout bits."""
    problem = problem_of(2, 37, 3, Causal(), batch=2, num_heads=6, num_kv_heads=2, **extra)
    assert is_packed(problem)
    check(problem, grads="sinks" in extra)


def heads_table(*shape):
    return Dense((torch.rand(shape, generator=torch.Generator().manual_seed(3)) < 0.5).to(DEVICE))


def test_heads_that_see_different_keys_have_tiles_of_their_own():
    for heads, packed in ((1, True), (6, False)):
        problem = problem_of(2, 37, 3, heads_table(1, heads, 2, 37), num_heads=6, num_kv_heads=2)
        assert is_packed(problem) == packed
        check(problem)


# ---- keys split over programs

LENGTH = 5 * PER_SPLIT + 7
MASKS = {
    "full": Full(),
    "causal": Causal(),
    "causal-top-left": Causal(align="top-left"),
    "window": Window(2 * TILE, 0),
    "window-of-one-tile": Window(3, 0),
    "nobody": Window(1, 1, offset=10 * LENGTH),
    "lengths": Lengths(ints(3 * TILE + 1, LENGTH)),
    "left-padding": Lengths(ints(LENGTH, 9), kv_starts=ints(LENGTH - TILE - 3, 20)),
    "lengths-of-queries": Causal() & Lengths(ints(LENGTH, LENGTH), q_lengths=ints(1, 0)),
    "chunked": Chunked(2 * TILE, 1),
    "prefix": Prefix(ints(TILE + 3, 0), offset=4),
    "or": Window(TILE, 0) | Lengths(ints(5, LENGTH // 2)),
    "three-terms": Window(4, 0) | Window(1, 1, offset=9) | Lengths(ints(3, 0)),
    "table": heads_table(2, 1, 2, LENGTH),
    "segments": Segments((torch.arange(2) % 2)[None].to(DEVICE), (torch.arange(LENGTH) % 3)[None].to(DEVICE)),
    "segments-sorted": Segments(ints([0, 1]), (torch.arange(LENGTH) * 3 // LENGTH)[None].to(DEVICE), sorted=True),
}


@pytest.mark.parametrize("mask", MASKS)
def test_masks_with_split_keys(processors, mask):
    """Parts may see nothing, all of them even."""
    processors(MANY)
    problem = problem_of(2, LENGTH, 2, MASKS[mask], batch=2)
    assert splits(problem) == 5
    check(problem)


def test_packed_sequences_with_split_keys(processors):
    processors(MANY)
    cu_q, cu_kv = ints(0, 1, 1, 4), ints(0, TILE + 5, 2 * TILE, LENGTH)
    for inside in (Causal(), Window(TILE, 0)):
        problem = problem_of(4, LENGTH, 2, Packed(cu_q, cu_kv, inside))
        assert splits(problem) == 5
        check(problem)


@pytest.mark.parametrize("parts", [1, 2, 3, 7])
def test_any_number_of_parts(processors, parts):
    """Two programs each, of one batch item and one group: shares differ by a tile at most."""
    processors(parts)
    problem = problem_of(3, 8 * PER_SPLIT, 4, Causal(), num_heads=8, num_kv_heads=2)
    assert splits(problem) == (parts if parts > 2 else 1)
    check(problem)


def test_more_parts_than_tiles_to_visit(processors):
    """Eight parts of one visible tile: seven see nothing and must weigh nothing, in the sums and in lse."""
    processors(MANY)
    problem = problem_of(1, 8 * PER_SPLIT, 1, Window(2, 0))
    assert splits(problem) == 8
    results = check(problem)
    last = problem.inputs.key[..., -3:, :].float()
    want = (problem.inputs.query.float() @ last.mT * problem.spec.scale).logsumexp(-1)
    torch.testing.assert_close(results["lse"], want, atol=1e-4, rtol=1e-4)


def test_parts_of_nothing_make_nothing(processors):
    processors(MANY)
    problem = problem_of(2, 4 * PER_SPLIT, 2, Lengths(ints(0)), sinks=True)
    assert splits(problem) == 4
    results = check(problem)
    assert (results["out"] == 0).all() and (results["lse"] == -torch.inf).all()


@pytest.mark.parametrize("extra", FEATURES.values(), ids=FEATURES)
def test_features_with_split_keys(processors, extra):
    """The same as with whole ones; a bias of the keys' own length."""
    processors(MANY)
    kv_len = 3 * PER_SPLIT + 5
    if "bias" in extra:
        extra = extra | {"bias": tuple(kv_len if size == 37 else size for size in extra["bias"])}
    problem = problem_of(2, kv_len, 3, Causal(), batch=2, num_heads=6, num_kv_heads=2, **extra)
    assert splits(problem) == most_splits(problem) >= 3
    check(problem)


SINKS = {"minus-infinity": -torch.inf, "small": -50.0, "one": 1.0, "large": 300.0}


@pytest.mark.parametrize("sink", SINKS.values(), ids=SINKS)
def test_a_sink_counts_once_however_many_parts(processors, sink):
    problem = problem_of(2, 4 * PER_SPLIT, 2, Window(PER_SPLIT + 3, 0), sinks=True)
    sinks = torch.tensor([sink, 0.5], device=DEVICE)
    problem = dataclasses.replace(problem, inputs=problem.inputs._replace(sinks=sinks))
    parts = []
    for count in (1, MANY):
        processors(count)
        parts.append(splits(problem))
        results = check(problem)
        without = run(dataclasses.replace(problem, inputs=problem.inputs._replace(sinks=None)), "triton", grads=False)
        torch.testing.assert_close(results["lse"], without["lse"], atol=0, rtol=0)
    assert parts == [1, 4]


def test_dropout_bits_do_not_depend_on_the_parts(processors):
    """Equal weights and a value that tells its key: what is dropped is missing from the sum."""
    processors(MANY)
    kv_len, heads = 256, 3
    problem = problem_of(2, kv_len, heads, dropout_p=0.3, dtype=torch.float32, head_dim_v=kv_len)
    inputs = problem.inputs._replace(value=torch.eye(kv_len, device=DEVICE)[None, None])
    problem = dataclasses.replace(problem, inputs=inputs)
    assert splits(problem) == most_splits(problem) > 1 and is_packed(problem)
    kept = run(problem, "triton", grads=False)["out"] != 0
    assert torch.equal(kept, dropout_mask(1, heads, 2, kv_len, p=0.3, seed=problem.inputs.dropout_seed))


def test_gradients_after_a_split_forward(processors):
    """The backward knows the total alone."""
    processors(MANY)
    problem = problem_of(2, 2 * PER_SPLIT, 2, Causal(), sinks=True, bias=(2, 1, 2 * PER_SPLIT))
    assert splits(problem) == 2
    check(problem, grads=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_many_queries_are_split_too_where_there_are_few_tiles(processors, dtype):
    """The general kernel, whose programs may take tile after tile: more parts than programs."""
    processors(7)
    row = pick(problem_of(40, 40, dtype=dtype).spec, "fwd", TARGET)
    rows = row.block_m + 8 if TARGET == "interpreter" else 200
    problem = problem_of(rows, 28 * row.block_n + 3, mask=Causal(), dtype=dtype, sinks=True)
    first, _ = launches(problem)
    tiles = tiles_of(rows, row.block_m)
    assert first.row == row and splits(problem) == 14 // tiles > 1
    assert first.programs == (7 if row.persistent and DEVICE == "cpu" else tiles * (14 // tiles))
    check(problem)


@pytest.mark.parametrize("mask", ["causal", "window-of-one-tile", "table"])
def test_the_same_bits_twice(processors, mask):
    processors(MANY)
    problem = problem_of(2, LENGTH, 2, MASKS[mask], batch=2, sinks=True, softcap=4.0)
    assert splits(problem) > 1
    first, second = (run(problem, "triton", grads=False) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("kv_len", [0, 1, TILE, TILE + 1])
@pytest.mark.parametrize("q_len", [0, 1, 2])
def test_lengths_of_nothing_and_one(processors, q_len, kv_len):
    processors(MANY)
    problem = problem_of(q_len, kv_len, 2, Causal(), batch=2, sinks=True)
    assert splits(problem) == 1
    check(problem)


# ---- keys in blocks


def test_pools_of_other_sizes_that_lie_alike():
    """Their strides do not say how many blocks there are, and entries beyond them are clamped."""
    for blocks, block in ((2, 1), (8, 7), (4, 3)):
        pools = torch.randn(2, blocks, 1, TILE, 16, device=DEVICE, dtype=torch.bfloat16)
        table = torch.tensor([[block, 0]], dtype=torch.int32, device=DEVICE)
        inputs = AttnInputs(torch.randn(1, 2, 1, 16, device=DEVICE, dtype=torch.bfloat16), *pools)
        spec = AttnSpec.of(inputs, mask=Paged(Full(), table, TILE))
        for found, want in zip(triton.forward(spec, inputs), reference.forward(spec, inputs), strict=True):
            torch.testing.assert_close(found, want, atol=2e-2, rtol=2e-2)


# ---- how many parts


def spec_of(batch, heads, kv_len, q_len=1):
    query, key = (
        torch.empty(batch, heads, length, 64, dtype=torch.bfloat16, device="meta") for length in (q_len, kv_len)
    )
    return AttnSpec.of(AttnInputs(query, key, key))


@pytest.mark.parametrize("target", tile_table.ANCESTORS)
def test_parts_fill_the_device_and_no_more(target):
    """Two waves at most, four tiles of keys each at least, none where four fifths of the device have work."""
    device = tile_table.PROCESSORS[target]
    for programs in (0, 1, 2, 5, 50, 100, 148, 1000):
        for kv_len in (0, 1, 500, 5000, 10**6):
            spec = spec_of(1, 1, kv_len)
            row = pick_forward(spec, target)
            parts = splits_of(spec, row, target, programs)
            assert parts >= 1 and (parts == 1 or parts * 4 * row.block_n <= kv_len)
            assert parts == 1 or (parts * programs <= 2 * device and programs <= 0.8 * device)
            if 0 < programs <= 0.8 * device and kv_len == 10**6:
                assert (parts + 1) * programs > 2 * device


@pytest.mark.parametrize("target", tile_table.ANCESTORS)
def test_parts_take_little_memory(target):
    """As many as fit the device, whatever the length: partial outputs do not grow with it."""
    spec = spec_of(1, 1, 2**27)
    assert splits_of(spec, pick_forward(spec, target), target, 1) <= 2 * tile_table.PROCESSORS[target]
