"""The order of a problem's tiles: each once, the heaviest first, by L2 groups of heads, evenly over the blocks."""

import ctypes
import heapq
from pathlib import Path

import pytest
import torch

from fastattn.testing import simulator

BLOCKS = 132
BLOCK_M = 128
SHAPES = {  # batch, num_kv_heads, group, q_tiles, splits, l2_group
    "one": (1, 1, 1, 1, 1, 1),
    "fewer-than-blocks": (1, 5, 3, 4, 1, 15),
    "one-group": (2, 8, 1, 32, 1, 16),
    "groups": (4, 8, 2, 16, 1, 32),
    "uneven-groups": (1, 7, 2, 16, 1, 4),
    "long": (1, 4, 4, 128, 1, 4),
    "splits": (2, 4, 1, 3, 7, 8),
}


@pytest.fixture(scope="module")
def order():
    refused = simulator.why_not()
    if refused is not None:
        pytest.skip(refused)
    library = simulator.load(simulator.build(Path(__file__).parent / "kernels" / "order.cu"))
    library.order.restype = ctypes.c_char_p

    def run(batch, num_kv_heads, group, q_tiles, splits, l2_group, blocks=BLOCKS):
        programs = batch * num_kv_heads * group * q_tiles * splits
        rows = torch.full((programs, 6), -1, dtype=torch.int32)
        said = library.order(min(blocks, programs), batch, num_kv_heads, group, q_tiles, splits, l2_group,
                             ctypes.c_void_p(rows.data_ptr()))  # fmt: skip
        assert said is None, said
        return rows

    return run


@pytest.mark.parametrize("shape", SHAPES)
def test_each_tile_is_computed_once(shape, order):
    batch, num_kv_heads, group, q_tiles, splits, _ = SHAPES[shape]
    rows = order(*SHAPES[shape])
    assert (rows >= 0).all()
    tiles = {tuple(row) for row in rows[:, 2:].tolist()}
    assert len(tiles) == len(rows) == batch * num_kv_heads * group * q_tiles * splits
    assert set(rows[:, 4].tolist()) == {BLOCK_M * n for n in range(q_tiles)}


@pytest.mark.parametrize("shape", SHAPES)
def test_the_heaviest_go_first_by_l2_groups_of_heads(shape, order):
    """The heads of an L2 group together, so that their keys stay in the cache; of those the last queries first."""
    l2_group = SHAPES[shape][-1]
    rows = order(*SHAPES[shape]).long()
    unit = rows[:, 2] * (rows[:, 3].max() + 1) + rows[:, 3]
    groups = unit // l2_group
    assert (groups.diff() >= 0).all()
    for each in groups.unique():
        assert (rows[groups == each, 4].diff() <= 0).all()


@pytest.mark.parametrize("shape", ["one-group", "groups", "long"])
def test_blocks_share_a_problem_evenly(shape, order):
    """Of a causal problem who is ready takes the next tile, by a counter; of equal tiles each block takes as many."""
    rows = order(*SHAPES[shape]).long()
    weights = (rows[:, 4] // BLOCK_M + 1).tolist()
    busy = [0] * BLOCKS
    for weight in weights:  # blocks by when they are ready
        heapq.heapreplace(busy, busy[0] + weight)
    assert max(busy) <= 1.04 * sum(weights) / BLOCKS
    rounds = torch.zeros(BLOCKS, dtype=torch.long).index_add_(0, rows[:, 0], torch.ones(len(rows), dtype=torch.long))
    assert int(rounds.max() - rounds.min()) <= 1
