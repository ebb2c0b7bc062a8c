"""The conformance test: every Triton rule against the mask's table, by element and by tile, forward and mirrored."""

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed")

import triton.language as tl  # noqa: E402

from fastattn.kernels.host import kernel_variant, mask_lowering  # noqa: E402
from fastattn.kernels.rules import masks  # noqa: E402
from fastattn.kernels.tiling import walk  # noqa: E402
from fastattn.masks import blocks  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED = DEVICE == "cpu"
# Lengths, blocks of queries and keys, splits: one of each, odd ones either way round, wide and narrow tiles.
SIZES = ((1, 1, 16, 16, 2), (37, 53, 16, 16, 3), (53, 37, 32, 16, 1), (1, 70, 16, 32, 2), (33, 1, 16, 16, 1))
SPACE = 128
"""Queries and keys that the table of `keep` has space for: past every length above."""


@triton.jit
def elements_kernel(kept_ptr, q_len, kv_len, num_heads, mask_args, VARIANT: tl.constexpr, SPACE: tl.constexpr):
    """`keep` for a whole [SPACE, SPACE], as it is and mirrored, of one batch item and head a program."""
    place = tl.program_id(0)
    numbers = masks.read_numbers(VARIANT, mask_args, place // num_heads, place % num_heads, q_len, kv_len)
    idx = tl.arange(0, SPACE)
    kept = masks.keep(VARIANT, idx[:, None], idx[None, :], numbers).to(tl.int8) + tl.zeros([SPACE, SPACE], tl.int8)
    mirrored = masks.keep(VARIANT, idx[None, :], idx[:, None], numbers).to(tl.int8) + tl.zeros([SPACE, SPACE], tl.int8)
    at = kept_ptr + place * SPACE * SPACE * 2 + idx[:, None] * SPACE + idx[None, :]
    tl.store(at, kept)
    tl.store(at + SPACE * SPACE, mirrored)


@triton.jit
def visits_kernel(visits_ptr, sizes, mask_args, lists, VARIANT: tl.constexpr, MIRROR: tl.constexpr, MOST: tl.constexpr,
                  BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """Whose tile each program owns and where the tiles begin that it visits: batch, head, start, split, how many to
    check, how many full, then their starts.
    """
    program = tl.program_id(0)
    if MIRROR:
        tile, head, batch, split = walk.owned(program, tl.cdiv(sizes.kv_len, BLOCK_N), sizes.num_heads, sizes, VARIANT)
        lo = tile * BLOCK_N
        _, found = walk.query_walk(batch, head, tile, sizes, mask_args, lists, VARIANT, BLOCK_M, BLOCK_N)
        BLOCK: tl.constexpr = BLOCK_M
    else:
        batch, head, _, lo, _, _, found, split = walk.query_tile(
            program, sizes, mask_args, lists, VARIANT, BLOCK_M, BLOCK_N
        )
        BLOCK: tl.constexpr = BLOCK_N
    at = visits_ptr + program * (6 + MOST)
    tl.store(at, batch)
    tl.store(at + 1, head)
    tl.store(at + 2, lo)
    tl.store(at + 3, split)
    begin, end = walk.part(found, walk.CHECKED, split, sizes.splits, VARIANT)
    checked = tl.maximum(end - begin, 0)
    tl.store(at + 4, checked)
    for n in tl.range(begin, end):
        tl.store(at + 6 + n - begin, walk.tile_start(VARIANT, found, walk.CHECKED, n, BLOCK))
    begin, end = walk.part(found, walk.FULL, split, sizes.splits, VARIANT)
    tl.store(at + 5, tl.maximum(end - begin, 0))
    for n in tl.range(begin, end):
        tl.store(at + 6 + checked + n - begin, walk.tile_start(VARIANT, found, walk.FULL, n, BLOCK))


def elements(spec, lowered, made):
    """int8 [batch, heads, 2, SPACE, SPACE]."""
    kept = torch.full((spec.batch, spec.num_heads, 2, SPACE, SPACE), -1, dtype=torch.int8, device=DEVICE)
    programs = (spec.batch * spec.num_heads,)
    elements_kernel[programs](kept, spec.q_len, spec.kv_len, spec.num_heads, lowered.args, VARIANT=made, SPACE=SPACE)
    return kept


def visits(spec, lowered, made, block_m, block_n, *, mirror, splits):
    """For each (batch, head, start of the owner's tile, split): tiles to check, full tiles."""
    lists = None if lowered.terms else mask_lowering.block_lists(spec, block_m, block_n, mirror=mirror)
    length, block, other, width = (
        (spec.kv_len, block_n, spec.q_len, block_m) if mirror else (spec.q_len, block_m, spec.kv_len, block_n)
    )
    programs = triton.cdiv(length, block) * spec.batch * spec.num_heads * splits
    heads = spec.num_heads, spec.num_heads, 1
    sizes = walk.Sizes(spec.batch, *heads, spec.q_len, spec.kv_len, programs, 2, splits)
    most = 2 * triton.cdiv(other, width) + 1  # space for a walk that visits tiles twice
    found = torch.full((programs, 6 + most), -1, dtype=torch.int32, device=DEVICE)
    visits_kernel[(programs,)](
        found, sizes, lowered.args, lists, VARIANT=made, MIRROR=mirror, MOST=most, BLOCK_M=block_m, BLOCK_N=block_n
    )
    owners = {}
    for batch, head, lo, split, checked, full, *starts in found.tolist():
        assert (batch, head, lo, split) not in owners
        owners[batch, head, lo, split] = starts[:checked], starts[checked : checked + full]
    assert len(owners) == programs
    return owners


def hold(table, owners, block_rows, block_columns, splits):
    """Tiles that show something are visited once, whole tiles only, full ones inside the problem and visible; the
    splits of a tile share them out evenly.
    """
    width = table.shape[-1]
    for batch, head, lo in {owner[:3] for owner in owners}:
        rows = table[batch, head, lo : lo + block_rows]
        shares = [owners[batch, head, lo, split] for split in range(splits)]
        sizes = [len(checked) + len(full) for checked, full in shares]
        assert max(sizes) - min(sizes) <= 1
        starts = [start for checked, full in shares for start in (*checked, *full)]
        assert len(set(starts)) == len(starts)
        assert all(start % block_columns == 0 and 0 <= start < width for start in starts)
        shown = {start for start in range(0, width, block_columns) if rows[:, start : start + block_columns].any()}
        assert shown <= set(starts)
        for start in (start for _, full in shares for start in full):
            assert start + block_columns <= width
            assert rows[:, start : start + block_columns].all()


def conform(spec, block_m, block_n, splits):
    q_len, kv_len, mask, batch, heads = spec.q_len, spec.kv_len, spec.mask, spec.batch, spec.num_heads
    lowered = mask_lowering.lower(spec)
    made = [kernel_variant.variant_of(spec, lowered, interpreted=INTERPRETED, split=split) for split in (False, True)]
    wanted = mask.dense(q_len, kv_len, device=DEVICE).expand(batch, heads, q_len, kv_len)
    kept = elements(spec, lowered, made[0])
    whole = torch.zeros(batch, heads, SPACE, SPACE, dtype=torch.int8, device=DEVICE)
    whole[:, :, :q_len, :kv_len] = wanted
    assert torch.equal(kept[:, :, 0], whole)
    assert torch.equal(kept[:, :, 1], whole.mT)
    wanted = wanted.cpu()
    owners = visits(spec, lowered, made[1], block_m, block_n, mirror=False, splits=splits)
    hold(wanted, owners, block_m, block_n, splits)
    owners = visits(spec, lowered, made[0], block_m, block_n, mirror=True, splits=1)
    hold(wanted.mT, owners, block_n, block_m, 1)


def test_rules_agree_with_the_table(name, spec_of):
    for q_len, kv_len, *tiling in SIZES:
        conform(spec_of(name, q_len, kv_len), *tiling)


TELLING = {
    "Causal": "causal-top-left",
    "Window": "window",
    "Chunked": "chunked-back",
    "Lengths": "lengths-all",
    "Prefix": "prefix",
    "Rows": "segments-sorted",
    "Segments": "segments",
    "Dense": "dense",
}
"""A mask that each rule serves."""


@triton.jit
def _wrong_edge(q_idx, numbers):
    return q_idx + 2


@triton.jit
def _wrong_keep(q_idx, kv_idx, numbers):
    return (q_idx + kv_idx) % 3 == 0


@triton.jit
def _nothing(lo, hi, numbers, BLOCK: tl.constexpr):
    return 0, 0, 0, 0


@triton.jit
def _everything(lo, hi, numbers, BLOCK: tl.constexpr):
    return 0, 0, masks.UNBOUNDED, masks.UNBOUNDED


WRONG = {
    "start": [_wrong_edge],
    "stop": [_wrong_edge],
    "keep": [_wrong_keep],
    "kv_span": [_nothing, _everything],
    "q_span": [_nothing, _everything],
}


@pytest.fixture
def no_known_variants():
    """Variants are remembered by the names of their rules."""
    kernel_variant._variant.cache_clear()
    yield
    kernel_variant._variant.cache_clear()


@pytest.mark.parametrize("rule_name", TELLING)
@pytest.mark.usefixtures("no_known_variants")
def test_the_conformance_test_sees_a_wrong_rule(rule_name, spec_of, monkeypatch):
    """Any one of a rule's functions replaced by a wrong one is noticed."""
    rule = masks.RULES[rule_name]
    there = [(place, wrong) for place in WRONG for wrong in WRONG[place] if getattr(rule, place) is not None]
    assert there
    for place, wrong in there:
        kernel_variant._variant.cache_clear()
        monkeypatch.setitem(masks.RULES, rule_name, rule._replace(**{place: wrong}))
        with pytest.raises(AssertionError):
            conform(spec_of(TELLING[rule_name], 37, 53), 16, 16, 1)


@pytest.mark.parametrize("wrong", [torch.zeros_like, torch.ones_like], ids=["hidden", "full"])
def test_the_conformance_test_sees_wrong_block_lists(wrong, spec_of, monkeypatch):
    def classify(mask, grid):
        return blocks.TileClasses(*map(wrong, right(mask, grid)))

    right = blocks.classify
    monkeypatch.setattr(blocks, "classify", classify)
    with pytest.raises(AssertionError):
        conform(spec_of("dense", 37, 53), 16, 16, 1)


def test_every_rule_is_in_the_zoo(zoo, spec_of):
    used = {rule for each in zoo for rule in mask_lowering.lower(spec_of(each, 37, 53)).rules}
    assert used == set(masks.RULES) == set(TELLING)
