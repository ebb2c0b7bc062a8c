"""The tile table: legal rows, a pure choice."""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from fastattn import dispatch
from fastattn.kernels.host.tile_table import ANCESTORS, MAX_HEAD_DIM, PASSES, TABLE, WIDE_FLOAT32, pick, target_of
from fastattn.masks import Causal, Dense, Lengths
from fastattn.spec import AttnInputs, AttnSpec


def spec(head_dim, dtype, head_dim_v=None):
    query, value = (
        torch.empty(1, 1, 4, head_dim, dtype=dtype),
        torch.empty(1, 1, 4, head_dim_v or head_dim, dtype=dtype),
    )
    return AttnSpec.of(AttnInputs(query, query, value))


def test_rows_are_frozen_and_legal():
    assert isinstance(TABLE, tuple)
    for row in TABLE:
        assert row.target in ANCESTORS
        assert row.kernel in PASSES
        assert row.num_warps in (1, 2, 4, 8)
        for block in (row.block_m, row.block_n):
            assert block & (block - 1) == 0
    with pytest.raises(AttributeError):
        TABLE[0].block_m = 1


@pytest.mark.parametrize("target", ANCESTORS)
@pytest.mark.parametrize("kernel", [kernel for kernel in PASSES if kernel not in ("short", "decode")])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_every_problem_has_a_row(target, kernel, dtype):
    for head_dim in (1, 16, 33, 64, 65, 128, 200, MAX_HEAD_DIM):
        row = pick(spec(head_dim, dtype), kernel, target)
        assert row.head_dim >= head_dim
        assert row.bits >= dtype.itemsize * 8
        assert row.target in ANCESTORS[target]
        assert pick(spec(1, dtype, head_dim), kernel, target) == row
    with pytest.raises(ValueError, match="no tile for"):
        pick(spec(MAX_HEAD_DIM + 1, dtype), kernel, target)


def test_targets_by_capability():
    capabilities = ((8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0))
    assert [target_of(each) for each in capabilities] == ["sm80", "sm80", "sm80", "sm90", "sm100", "sm80"]
    assert target_of(None) == "interpreter"


def test_what_a_problem_carries_chooses_smaller_tiles():
    """Nothing, a mask that hides, a table; each falls back on lighter rows where there is none of its own."""
    tensors = [torch.empty(1, 1, 64, 128, dtype=torch.bfloat16)] * 3
    masks = Causal(), Causal() | Lengths(torch.ones(1).int()), Dense(torch.ones(64, 64, dtype=torch.bool)) & Causal()
    rows = [pick(AttnSpec.of(AttnInputs(*tensors), mask=mask), "fwd", "sm90") for mask in masks]
    assert [row.load for row in rows] == [0, 1, 2]
    areas = [row.block_m * row.block_n for row in rows]
    assert areas == sorted(areas, reverse=True)
    assert pick(AttnSpec.of(AttnInputs(*tensors), mask=masks[2]), "merge", "sm90").load == 0


def test_the_adapter_knows_the_tables_limits():
    """It names them itself, so that a refusal does not import triton."""
    adapter = dispatch.load("triton")
    assert (adapter.MAX_HEAD_DIM, adapter.WIDE_FLOAT32) == (MAX_HEAD_DIM, WIDE_FLOAT32)
