"""The walk: who owns which tile, how many tiles each mask makes it visit, and how that grows with the length."""

import itertools

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed")

import triton.language as tl  # noqa: E402

from fastattn.kernels.host import (  # noqa: E402
    kernel_variant,
    launch,
    mask_lowering,
)
from fastattn.kernels.host.tile_table import l2_group_of  # noqa: E402
from fastattn.kernels.tiling import walk  # noqa: E402
from fastattn.masks import (  # noqa: E402
    Causal,
    Chunked,
    Dense,
    Full,
    Lengths,
    Packed,
    Prefix,
    Segments,
    Window,
    blocks,
)
from fastattn.spec import AttnInputs, AttnSpec  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED = DEVICE == "cpu"
BLOCK = 16


def ints(*values):
    return torch.tensor(values, device=DEVICE)


def spec_of(mask, q_len, kv_len=None, batch=1, heads=1, kv_heads=None, dim=16):
    query = torch.empty(batch, heads, q_len, dim, device=DEVICE)
    key = torch.empty(batch, kv_heads or heads, kv_len or q_len, dim, device=DEVICE)
    return AttnSpec.of(AttnInputs(query, key, key), mask=mask)


@triton.jit
def counts_kernel(
    counts_ptr, sizes, mask_args, lists, VARIANT: tl.constexpr, MIRROR: tl.constexpr, BLOCK: tl.constexpr
):
    """Whose tile a program owns, how many tiles it checks, how many are full."""
    program = tl.program_id(0)
    if MIRROR:
        tile, head, batch, _ = walk.owned(program, tl.cdiv(sizes.kv_len, BLOCK), sizes.num_heads, sizes, VARIANT)
        _, found = walk.query_walk(batch, head, tile, sizes, mask_args, lists, VARIANT, BLOCK, BLOCK)
        lo = tile * BLOCK
    else:
        _, _, _, lo, _, _, found, _ = walk.query_tile(program, sizes, mask_args, lists, VARIANT, BLOCK, BLOCK)
    tl.store(counts_ptr + program * 3, lo // BLOCK)
    tl.store(counts_ptr + program * 3 + 1, found[0])
    tl.store(counts_ptr + program * 3 + 2, found[1])


def counts(mask, q_len, kv_len=None, *, mirror=False):
    """[programs, 3]: the tile a program owns, how many it checks, how many it need not."""
    spec = spec_of(mask, q_len, kv_len)
    lowered = mask_lowering.lower(spec)
    lists = None if lowered.terms else mask_lowering.block_lists(spec, BLOCK, BLOCK, mirror=mirror)
    programs = triton.cdiv(spec.kv_len if mirror else spec.q_len, BLOCK)
    sizes = walk.Sizes(1, 1, 1, 1, spec.q_len, spec.kv_len, programs, 1, 1)
    made = kernel_variant.variant_of(spec, lowered, interpreted=INTERPRETED)
    found = torch.zeros(programs, 3, dtype=torch.int32, device=DEVICE)
    counts_kernel[(programs,)](found, sizes, lowered.args, lists, VARIANT=made, MIRROR=mirror, BLOCK=BLOCK)
    return found.cpu()


def visited(mask, q_len, kv_len=None, *, mirror=False):
    return int(counts(mask, q_len, kv_len, mirror=mirror)[:, 1:].sum())


def ids(n, document=40):
    return torch.arange(n, device=DEVICE)[None] // document


def cuts(n, document=40):
    return torch.arange(0, n + document, document, device=DEVICE).clamp(max=n)


LINEAR = {
    "window": lambda n: Window(40, 0),
    "window-both-ways": lambda n: Window(20, 20),
    "chunked": lambda n: Chunked(40) & Causal(),
    "window-and-sinks": lambda n: Window(40, 0) | Lengths(ints(4)),
    "padding": lambda n: Lengths(ints(40), q_lengths=ints(n)),
    "packed": lambda n: Packed(cuts(n), cuts(n), Causal()),
    "segments-sorted": lambda n: Segments(ids(n), sorted=True),
    "segments-scattered": lambda n: Segments(ids(n)),
    "table": lambda n: Dense(Window(40, 0).dense(n, n, device=DEVICE)),
    "three-terms": lambda n: Window(20, 0) | Window(40, 0) | Lengths(ints(4)),
}


@pytest.mark.parametrize("mirror", [False, True], ids=["forward", "mirrored"])
@pytest.mark.parametrize("name", LINEAR)
def test_local_masks_visit_as_many_tiles_a_row_however_long_the_sequence(name, mirror):
    """Doubling the length doubles the tiles; a step for the ends."""
    short, middle, long = (visited(LINEAR[name](n), n, mirror=mirror) for n in (160, 320, 640))
    assert 0 < short < middle < long
    assert long - middle <= 2 * (middle - short) + 6
    assert long <= 640 / BLOCK * 6


@pytest.mark.parametrize("mirror", [False, True], ids=["forward", "mirrored"])
def test_full_visits_all_tiles_and_causal_half_of_them(mirror):
    for n in (160, 320):
        tiles = n // BLOCK
        assert visited(Full(), n, mirror=mirror) == tiles * tiles
        found = counts(Causal(), n, mirror=mirror)
        assert int(found[:, 1:].sum()) == tiles * (tiles + 1) // 2
        assert (found[:, 1] == 1).all()  # the diagonal alone is checked
    assert not counts(Full(), 160, mirror=mirror)[:, 1].any()


@pytest.mark.parametrize("mirror", [False, True], ids=["forward", "mirrored"])
@pytest.mark.parametrize(
    "mask",
    [
        Causal(), Causal(offset=-30), Window(37, 5), Window(None, 20, offset=11), Window(0, 0),
        Chunked(24, 1, 0), Chunked(7, offset=-50), Lengths(ints(70), ints(50), ints(20)),
        Lengths(ints(20), None, ints(40)),
        Prefix(ints(37)), Prefix(ints(37), offset=-60), Segments(ids(100), ids(130), sorted=True),
        Packed(cuts(100), cuts(100)),
        Dense(torch.rand(100, 130, generator=torch.Generator().manual_seed(0)).to(DEVICE) < 0.01),
        Dense(Window(3, 0).dense(100, 130, device=DEVICE)),
    ],
    ids=lambda mask: type(mask).__name__,
)  # fmt: skip
def test_no_tile_is_visited_in_vain(mask, mirror):
    """Where bounds are exact: one rule, or a table."""
    q_len, kv_len = 100, 130
    table = mask.dense(q_len, kv_len, device=DEVICE).expand(1, 1, q_len, kv_len)[0, 0]
    table = table.mT if mirror else table
    found = counts(mask, q_len, kv_len, mirror=mirror)
    seen = [
        sum(bool(rows[:, at : at + BLOCK].any()) for at in range(0, rows.shape[1], BLOCK))
        for rows in table.split(BLOCK)
    ]
    assert {int(tile): int(checked + full) for tile, checked, full in found} == dict(enumerate(seen))


def test_what_needs_no_check_is_not_checked():
    """A table, scattered documents and spans alike."""
    n = 320
    for mask in (
        Dense(Causal().dense(n, n, device=DEVICE)),
        Segments(ids(n, 160)),
        Segments(ids(n, 160), sorted=True),
        Packed(cuts(n, 160), cuts(n, 160), Full()),
        Window(200, 0),
        Chunked(160),
        Window(200, 0) | Window(20, 20) | Lengths(ints(4)),
    ):
        found = counts(mask, n)
        assert int(found[:, 2].sum()) > int(found[:, 1].sum())


def test_heavy_tiles_come_first():
    """Last tiles of queries, first tiles of keys: under a causal mask they see most."""
    assert counts(Causal(), 160)[:, 0].tolist() == list(range(9, -1, -1))
    assert counts(Causal(), 160, mirror=True)[:, 0].tolist() == list(range(10))


@triton.jit
def owned_kernel(owners_ptr, sizes, tiles, VARIANT: tl.constexpr):
    program = tl.program_id(0)
    for n in tl.static_range(4):
        tl.store(owners_ptr + program * 4 + n, walk.owned(program, tiles, sizes.num_heads, sizes, VARIANT)[n])


@pytest.mark.parametrize("split", [False, True], ids=["whole", "split"])
def test_programs_own_every_tile_once(split):
    """Whatever the L2 group: one head, some, a number that does not divide them, more than there are."""
    splits = 3 if split else 1
    for batch, heads, tiles, l2_group in itertools.product((1, 2), (1, 5), (1, 4), (1, 2, 3, 10, 64)):
        spec = spec_of(Full(), 64, batch=batch, heads=heads)
        made = kernel_variant.variant_of(spec, mask_lowering.lower(spec), interpreted=INTERPRETED, split=split)
        programs = batch * heads * tiles * splits
        owners = torch.full((programs, 4), -1, dtype=torch.int32, device=DEVICE)
        sizes = walk.Sizes(batch, heads, heads, 1, 64, 64, programs, l2_group, splits)
        owned_kernel[(programs,)](owners, sizes, tiles, VARIANT=made)
        wanted = set(itertools.product(range(tiles), range(heads), range(batch), range(splits)))
        assert {tuple(owner) for owner in owners.tolist()} == wanted
        if l2_group == 1:  # one head's tiles in a row
            heads_in_turn = owners[:: tiles * splits, 1:3]
            assert torch.equal(heads_in_turn, owners[tiles * splits - 1 :: tiles * splits, 1:3])


def test_numbers_of_a_grid_fit_32_bits():
    """Few keys and many queries: L2 groups are no larger than there are heads."""
    for q_len, kv_len in ((2**22, 1), (2**20, 0), (2**22, 16)):
        query = torch.empty(1, 1, 1, 1, dtype=torch.bfloat16, device="meta").expand(2, 8, q_len, 64)
        key = torch.empty(1, 1, 1, 1, dtype=torch.bfloat16, device="meta").expand(2, 1, kv_len, 64)
        inputs = AttnInputs(query, key, key)
        spec = AttnSpec.of(inputs)
        out, lse = spec.empty_out(query), spec.empty_lse(query)
        given = {"out": out, "d_out": out, "dq": query, "dk": key, "dv": key, "dbias": None, "dsinks": None}
        tensors = launch.Backward(**dict.fromkeys(launch.Backward._fields, lse) | given)
        launched = launch.forward(spec, inputs, out, lse, "sm90") + launch.backward(spec, inputs, tensors, "sm90")
        sizes = [(each, part) for each in launched for part in each.args if isinstance(part, walk.Sizes)]
        assert len(sizes) >= 4
        for each, part in sizes:
            rows = -(-(spec.kv_len if "dkv" in each.row.kernel else spec.q_len) // each.row.block_m)
            assert part.l2_group * rows < 2**31, each.row
            assert all(0 <= number < 2**31 for number in part)


def test_l2_groups_share_the_cache():
    spec = spec_of(Full(), 4096, batch=4, heads=32, dim=128)
    assert l2_group_of(spec, 4096) * 4096 * 2 * 128 * 4 <= 32 * 2**20
    assert l2_group_of(spec, 2**24) == 1


def test_block_lists_name_each_tile_once_the_checked_ones_first():
    mask = Dense(torch.rand(2, 1, 70, 90, generator=torch.Generator().manual_seed(0)).to(DEVICE) < 0.02)
    grid = blocks.Grid(70, 90, BLOCK, BLOCK, torch.device(DEVICE))
    for mirror in (False, True):
        lists = blocks.block_list(mask, grid, mirror=mirror)
        tiles = lists.tiles.shape[-1]
        assert torch.equal(lists.tiles.sort(-1)[0], torch.arange(tiles, device=DEVICE).expand_as(lists.tiles))
        for batch, row in itertools.product(range(2), range(lists.tiles.shape[2])):
            checked, full = int(lists.checked[batch, 0, row]), int(lists.full[batch, 0, row])
            named = lists.tiles[batch, 0, row].tolist()
            assert named[:checked] == sorted(named[:checked])
            assert named[checked : checked + full] == sorted(named[checked : checked + full])
