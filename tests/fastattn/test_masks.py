"""Masks: the definitions by hand-drawn pictures, their intervals, counts, primitives, block lists and refusals."""

import dataclasses
import doctest
import functools
import itertools
import operator
import sys

import pytest
import torch

from fastattn import masks
from fastattn.masks import (
    Causal,
    Chunked,
    Dense,
    Full,
    Lengths,
    Mask,
    Packed,
    Prefix,
    Segments,
    Window,
    base,
    kinds,
    serialize,
    visible_pairs,
)
from fastattn.masks.blocks import Grid, block_list, classify

SIZES = ((0, 3), (3, 0), (1, 1), (5, 5), (4, 9), (9, 4), (17, 13))


def zoo(q_len: int, kv_len: int) -> dict[str, Mask]:
    """One of everything, and combinations, for batch 2."""
    generator = torch.Generator().manual_seed(q_len * 31 + kv_len)
    scattered = lambda n: torch.randint(-1, 3, (2, n), generator=generator)
    in_order = lambda n: torch.arange(n)[None].repeat(2, 1) * 3 // max(n, 1)
    part = lambda n: torch.tensor([n // 2, n])
    return {
        "full": Full(),
        "causal": Causal(),
        "causal-top-left": Causal(align="top-left"),
        "causal-offset": Causal(offset=-2),
        "causal-offsets": Causal(offset=torch.tensor([1, -3])),
        "window": Window(2, 1),
        "window-left": Window(3, 0, align="top-left"),
        "window-open-left": Window(None, 1),
        "window-open-right": Window(0, None),
        "window-outside": Window(1, 1, offset=50),
        "chunked": Chunked(3),
        "chunked-back": Chunked(2, 1, 0, offset=-3),
        "chunked-open": Chunked(4, None, 1),
        "lengths": Lengths(part(kv_len)),
        "lengths-all": Lengths(part(kv_len), q_lengths=part(q_len), kv_starts=torch.tensor([1, 0])),
        "prefix": Prefix(torch.tensor([0, 3])),
        "segments": Segments(scattered(q_len), scattered(kv_len)),
        "segments-sorted": Segments(in_order(q_len), in_order(kv_len), sorted=True),
        "dense": Dense(torch.rand(2, 3, q_len, kv_len, generator=generator) < 0.5),
        "dense-row": Dense(torch.rand(1, kv_len, generator=generator) < 0.5),
        "and": Causal() & Lengths(part(kv_len)),
        "or": Window(1, 0) | Lengths(torch.tensor([2, 1])),
        "and-of-or": (Window(1, 0) | Lengths(torch.tensor([2, 1]))) & Causal(),
        "or-of-three": Window(0, 0) | Lengths(torch.tensor([1, 1])) | Window(0, 0, offset=3),
        "and-dense": Dense(torch.rand(q_len, kv_len, generator=generator) < 0.5) & Chunked(2),
    }


ZOO = sorted(zoo(4, 4))


def test_pictures_in_the_docstrings_are_drawn_by_the_masks():
    results = [doctest.testmod(module, extraglobs=vars(kinds)) for module in (base, kinds)]
    assert sum(result.attempted for result in results) > 10
    assert not any(result.failed for result in results)


@pytest.mark.parametrize(
    ("mask", "q_len", "kv_len", "shows"),
    [
        pytest.param(Causal(), 3, 5, lambda i, j: j <= i + 2, id="causal-bottom-right"),
        pytest.param(Causal(), 5, 3, lambda i, j: j <= i - 2, id="causal-more-queries"),
        pytest.param(Causal(align="top-left"), 3, 5, lambda i, j: j <= i, id="causal-top-left"),
        pytest.param(Causal(offset=1), 3, 5, lambda i, j: j <= i + 1, id="causal-offset"),
        pytest.param(Chunked(3, 1), 7, 7, lambda i, j: 0 <= i // 3 - j // 3 <= 1, id="chunked"),
        pytest.param(Chunked(3, offset=-4), 7, 7, lambda i, j: (i - 4) // 3 == j // 3, id="chunked-negative"),
        pytest.param(Chunked(2, 0, 1), 6, 6, lambda i, j: -1 <= i // 2 - j // 2 <= 0, id="chunked-ahead"),
    ],
)
def test_tables_are_what_the_contract_says_of_each_pair(mask, q_len, kv_len, shows):
    table = mask.dense(q_len, kv_len)[0, 0].expand(q_len, kv_len)
    assert table.tolist() == [[shows(i, j) for j in range(kv_len)] for i in range(q_len)]


@pytest.mark.parametrize(
    ("mask", "picture"),
    [
        pytest.param(
            Window(2, 1), ". x x x x . .|. . x x x x .|. . . x x x x|. . . . x x x", id="4-queries-at-the-end-of-7"
        ),
        pytest.param(Window(2, 1, align="top-left"), "x x . . .|x x x . .|x x x x .|. x x x x", id="top-left"),
        pytest.param(Window(None, 0), "x x . .|x x x .|x x x x", id="open-left-is-causal"),
        pytest.param(Window(0, None, offset=1), ". x x|. . x|. . .", id="open-right"),
        pytest.param(Window(1, 1, offset=-2), ". .|x .|x x|x x|. x", id="offset"),
    ],
)
def test_windows_are_what_the_pictures_show(mask, picture):
    rows = picture.split("|")
    assert mask.draw(len(rows), len(rows[0].split())) == "\n".join(rows)


@pytest.mark.parametrize(
    ("mask", "same"),
    [
        pytest.param(Window(sys.maxsize, sys.maxsize), Full(), id="window"),
        pytest.param(Window(sys.maxsize, 0), Causal(), id="window-left"),
        pytest.param(Window(0, sys.maxsize, offset=torch.tensor([0, sys.maxsize - 1])), None, id="window-offsets"),
        pytest.param(Chunked(3, sys.maxsize, sys.maxsize), Full(), id="chunks"),
        pytest.param(Chunked(sys.maxsize, 1, 1), Full(), id="chunk-size"),
        pytest.param(Causal(offset=sys.maxsize), Full(), id="offset"),
    ],
)
def test_sizes_beyond_everything_do_not_wrap_around(mask, same):
    for q_len, kv_len in SIZES:
        table = mask.dense(q_len, kv_len)
        if same is None:
            same_row = torch.arange(kv_len) >= torch.arange(q_len)[:, None]
            assert torch.equal(table, torch.stack([same_row, torch.zeros_like(same_row)])[:, None])
        else:
            assert torch.equal(table, same.dense(q_len, kv_len).expand_as(table))


def test_nothing_is_counted_where_there_is_nothing():
    for mask in (
        Lengths(torch.zeros(0, dtype=torch.long)),
        Segments(torch.zeros(0, 3, dtype=torch.long)),
        Dense(torch.ones(0, 1, 3, 3) > 0),
    ):
        assert visible_pairs(mask, 0, 2, 3, 3) == 0
    assert visible_pairs(Dense(torch.ones(2, 0, 3, 3) > 0), 2, 0, 3, 3) == 0


def test_masks_are_made_of_mapped_tensors():
    """Under vmap values cannot be looked at, so they are not."""
    lengths = torch.tensor([[1, 2], [3, 0]])
    tables = torch.vmap(lambda each: Lengths(each).dense(3, 4))(lengths)
    for table, each in zip(tables, lengths, strict=True):
        assert torch.equal(table, Lengths(each).dense(3, 4))
    torch.vmap(lambda each: Segments(each[None], sorted=True).dense(2, 2))(torch.tensor([[0, 1], [1, 1]]))
    torch.vmap(lambda each: Packed(each, each).dense(2, 2))(torch.tensor([[0, 1], [0, 2]]))


def test_packed_equals_each_sequence_alone():
    cu_q, cu_kv = [0, 3, 3, 8], [0, 5, 7, 10]
    for inside in (Full(), Causal(), Window(1, 0), Chunked(2) & Causal(), Causal(align="top-left")):
        table = Packed(torch.tensor(cu_q), torch.tensor(cu_kv), inside).dense(9, 11)[0, 0]
        want = torch.zeros(9, 11, dtype=torch.bool)  # one padding token at the end of each
        for (q0, q1), (k0, k1) in zip(itertools.pairwise(cu_q), itertools.pairwise(cu_kv), strict=True):
            want[q0:q1, k0:k1] = inside.dense(q1 - q0, k1 - k0)[0, 0]
        assert torch.equal(table, want), inside


def test_prefix_is_causal_or_lengths():
    lengths = torch.tensor([0, 4])
    for q_len, kv_len in SIZES:
        both = Causal() | Lengths(lengths)
        assert torch.equal(Prefix(lengths).dense(q_len, kv_len), both.dense(q_len, kv_len).expand(2, 1, q_len, kv_len))


@pytest.mark.parametrize("name", ZOO)
@pytest.mark.parametrize(("q_len", "kv_len"), SIZES, ids=lambda n: str(n))
def test_every_mask_is_consistent_with_its_table(name, q_len, kv_len):
    mask = zoo(q_len, kv_len)[name]
    table = mask.dense(q_len, kv_len).expand(2, 3, q_len, kv_len)
    mask.check(2, 3, q_len, kv_len)
    # counts
    assert visible_pairs(mask, 2, 3, q_len, kv_len) == int(table.sum())
    # primitives and back
    again = serialize.unpack(*serialize.pack(mask))
    assert torch.equal(again.dense(q_len, kv_len).expand_as(table), table)
    # intervals
    intervals = mask.intervals(q_len, kv_len)
    if intervals is not None:
        kv_idx = torch.arange(kv_len)
        union = torch.zeros_like(table)
        for start, stop in intervals:
            union |= (kv_idx >= start[..., None]) & (kv_idx < stop[..., None])
        assert torch.equal(union, table)
    # block lists: nothing visible is lost, full means full, the list holds exactly the tiles to visit
    for block_m, block_n in ((2, 3), (4, 4), (64, 64)):
        grid = Grid(q_len, kv_len, block_m, block_n, table.device)
        visit, full = (each.expand(2, 3, -1, -1) for each in classify(mask, grid))
        assert visit.shape[2:] == (-(-q_len // block_m), -(-kv_len // block_n))
        for m, n in itertools.product(range(visit.shape[2]), range(visit.shape[3])):
            tile = table[:, :, m * block_m : (m + 1) * block_m, n * block_n : (n + 1) * block_n].flatten(2)
            assert not (tile.any(-1) & ~visit[:, :, m, n]).any()
            assert not (full[:, :, m, n] & ~tile.all(-1)).any()
        for mirror in (False, True):
            hold_list(block_list(mask, grid, mirror=mirror), visit, full, mirror, (kv_len, block_n, q_len, block_m))


def hold_list(listed, visit, full, mirror, sizes):
    """The list holds the tiles to visit, first those to check, then the full ones; one that reaches over is checked."""
    length, block = sizes[2:] if mirror else sizes[:2]
    if mirror:
        visit, full = visit.mT, full.mT
    whole = torch.tensor([(n + 1) * block <= length for n in range(visit.shape[3])], dtype=torch.bool)
    checked, sure = (count.expand(*visit.shape[:2], -1) for count in (listed.checked, listed.full))
    tiles = listed.tiles.expand(*visit.shape[:2], -1, -1)
    for b, h, m in itertools.product(*map(range, visit.shape[:3])):
        free = visit[b, h, m] & full[b, h, m] & whole
        want = [(visit[b, h, m] & ~free).nonzero().flatten().tolist(), free.nonzero().flatten().tolist()]
        cut = [0, int(checked[b, h, m]), int(checked[b, h, m] + sure[b, h, m])]
        assert [tiles[b, h, m, cut[n] : cut[n + 1]].tolist() for n in range(2)] == want


def test_closed_forms_keep_only_tiles_that_show_something():
    """For one row a tile the bounds are exact: no empty tile is visited, no full one is checked."""
    for name, mask in zoo(9, 13).items():
        if mask.intervals(9, 13) is None:
            continue
        visit, full = classify(mask, Grid(9, 13, 1, 4, torch.device("cpu")))
        table = mask.dense(9, 13)
        pieces = table.expand(*visit.shape[:2], 9, 13).split(4, -1)
        assert torch.equal(visit, torch.stack([piece.any(-1) for piece in pieces], -1)), name
        if len(mask.intervals(9, 13)) == 1:
            assert torch.equal(full, torch.stack([piece.all(-1) for piece in pieces], -1)), name


def test_masks_are_pytrees():
    from torch.utils import _pytree as pytree

    mask = Causal(offset=3) & Lengths(torch.tensor([2, 4]))
    leaves, tree = pytree.tree_flatten(mask)
    assert [leaf.tolist() for leaf in leaves] == [[2, 4]]
    moved = pytree.tree_unflatten([leaf + 1 for leaf in leaves], tree)
    assert moved.right.kv_lengths.tolist() == [3, 5]
    assert moved.left.offset == 3


def test_masks_are_frozen():
    with pytest.raises(AttributeError):
        Window(1, 0).left = 2


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        pytest.param(lambda: Window(-1, 0), ValueError, "left must be an int of at least 0", id="negative-window"),
        pytest.param(lambda: Window(1.5, 0), ValueError, "left must be an int", id="fractional-window"),
        pytest.param(lambda: Causal(align="middle"), ValueError, "align must be one of", id="align"),
        pytest.param(lambda: Window(2**63, 0), ValueError, r"below 2\*\*63, or None .unbounded", id="endless-window"),
        pytest.param(lambda: Causal(offset=1.0), TypeError, "must be an int, or an int32 or int64 tensor", id="offset"),
        pytest.param(lambda: Causal(offset=2**64), ValueError, "offset must be an int .* below", id="endless-offset"),
        pytest.param(lambda: Chunked(0), ValueError, "size must be an int of at least 1", id="chunk-size"),
        pytest.param(lambda: Lengths([1, 2]), TypeError, "kv_lengths must be an int32 or int64 tensor", id="list"),
        pytest.param(lambda: Lengths(torch.ones(2)), ValueError, "got torch.float32", id="float-lengths"),
        pytest.param(
            lambda: Lengths(torch.tensor([-1])), ValueError, "must not be negative, got -1", id="negative-length"
        ),
        pytest.param(
            lambda: Prefix(torch.tensor([2, -1])), ValueError, "must not be negative, got -1", id="negative-prefix"
        ),
        pytest.param(lambda: masks.And(Causal(), torch.ones(2, 2) > 0), TypeError, "And: right must be", id="and"),
        pytest.param(lambda: masks.Or(None, Causal()), TypeError, "Or: left must be a mask, got NoneType", id="or"),
        pytest.param(
            lambda: Packed(torch.tensor([0]), torch.tensor([0]), None), TypeError, "inside must be a", id="no-inside"
        ),
        pytest.param(lambda: Dense(torch.ones(2, 2)), ValueError, "go into bias=", id="float-table"),
        pytest.param(lambda: Segments(torch.zeros(3, dtype=torch.long)), ValueError, "2 dimensions", id="flat-ids"),
        pytest.param(
            lambda: Segments(torch.tensor([[1, 0]]), sorted=True), ValueError, "never decrease", id="unsorted"
        ),
        pytest.param(lambda: Packed(torch.tensor([1, 2]), torch.tensor([0, 2])), ValueError, "start at 0", id="packed"),
        pytest.param(
            lambda: Packed(torch.tensor([0]), torch.tensor([0]), Lengths(torch.tensor([1]))),
            ValueError,
            "inside",
            id="inside",
        ),
    ],
)
def test_bad_masks_are_refused_with_a_sentence(make, error, says):
    with pytest.raises(error, match=says):
        make()


def test_validate_decides_whether_values_are_looked_at():
    assert Lengths(torch.tensor([-1]), validate=False).kv_lengths.item() == -1
    with pytest.raises(ValueError, match="negative"):
        Lengths(torch.tensor([-1]), validate=True)


@pytest.mark.parametrize("terms, count", [(1, 1), (2, 2), (3, None)])
def test_how_many_intervals_is_told_by_the_kinds(terms, count):
    windows = [Window(0, 0, offset=5 * n) for n in range(terms)]
    either, both = functools.reduce(operator.or_, windows), functools.reduce(operator.and_, windows)
    for mask, want in (
        (either, count),
        (both, 1),
        (either & Causal(), count),
        (Segments(torch.zeros(1, 4, dtype=torch.int64)), None),
    ):
        found = mask.intervals(4, 4) if want else None
        assert mask.interval_count() == want == (None if found is None else len(found))


BY_VALUE = {
    "full": lambda: Full(),
    "causal": lambda: Causal(),
    "causal-offset": lambda: Causal(offset=3),
    "window": lambda: Window(4, None),
    "chunked": lambda: Chunked(4, 1),
    "and": lambda: Causal() & Window(4, None),
    "or": lambda: Causal() | Chunked(4),
}


@pytest.mark.parametrize("name", BY_VALUE)
def test_masks_without_tensors_are_equal_by_value(name):
    """So that a mask made anew for each call is met as an old one."""
    made = {other: make() for other, make in BY_VALUE.items()}
    again = BY_VALUE[name]()
    assert again == made[name] and hash(again) == hash(made[name]) and {again: 1}[made[name]] == 1
    assert all(again != each for other, each in made.items() if other != name)


@dataclasses.dataclass(frozen=True, eq=False)
class Listed(Mask):
    """A user's, whose field may change."""

    keys: list

    def interval(self, q_idx, q_len, kv_len):
        return q_idx * 0, q_idx * 0 + len(self.keys)


@dataclasses.dataclass(frozen=True, eq=False)
class Drawn(Mask):
    """A user's, with more in it than its field says."""

    size: int

    def __post_init__(self):
        object.__setattr__(self, "stops", torch.randint(self.size, (self.size,)))

    def interval(self, q_idx, q_len, kv_len):
        return q_idx * 0, self.stops[q_idx]


class Shifted(Window):
    """A user's, made of one of the library's."""

    def __init__(self, left, by):
        super().__init__(left, 0)
        object.__setattr__(self, "by", by)

    def interval(self, q_idx, q_len, kv_len):
        return tuple(each + self.by for each in super().interval(q_idx, q_len, kv_len))


@pytest.mark.parametrize(
    "make",
    [
        lambda: Lengths(torch.tensor([3])),
        lambda: Causal(offset=torch.tensor([3])),
        lambda: Causal() & Lengths(torch.tensor([3])),
        lambda: Listed([1, 2]),
        lambda: Drawn(9),
        lambda: Shifted(3, 1),
        lambda: Causal() & Drawn(9),
    ],
    ids=["lengths", "offsets", "and", "users-list", "users-number", "users-window", "users-in-and"],
)
def test_masks_that_may_change_equal_themselves_alone(make):
    one, other = make(), make()
    assert one == one and one != other and len({one, other}) == 2
