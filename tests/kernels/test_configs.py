"""The tile table: legal rows, a pure choice, and what every row compiles to for the GPU it is meant for."""

import json
import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from fastattn.kernels.configs import ANCESTORS, MAX_HEAD_DIM, PASSES, TABLE, pick, target_of
from fastattn.spec import AttnInputs, AttnSpec

SHARED_LIMIT = {"sm80": 99 * 1024, "sm90": 227 * 1024, "sm100": 227 * 1024}
"""Bytes a program may have (CUDA C++ Programming Guide); for sm80 rows what 8.6, 8.9 and 12.x leave."""


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
@pytest.mark.parametrize("kernel", PASSES)
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


@pytest.fixture(scope="module")
def compiled():
    """Every row compiled in a process without the interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "fastattn.kernels.compile", "--json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_every_row_compiles_for_its_target(compiled):
    bare = [row for row in compiled if row["form"] == "none"]
    assert len(bare) == sum(row.target != "interpreter" for row in TABLE)
    for row in compiled:
        assert row["shared_bytes"] <= SHARED_LIMIT[row["target"]], row


def test_every_kernel_compiles_in_every_form(compiled):
    forms = {"none", "causal", "every-rule", "one-token", "tf32"}
    for kernel in ("fwd", "dq", "dkv"):
        assert {row["form"] for row in compiled if row["kernel"] == kernel} == forms


SPILLED = {"fwd": 0, "dq": 0, "dkv": 512}
"""Bytes of the stack a thread may use. dK and dV fill the registers, and compilers differ: Triton 3.6 spills a third of
what 3.9 does."""


def test_hopper_rows_use_its_tensor_cores_and_only_dkv_spills_a_little(compiled):
    for row in compiled:
        if (row["target"], row["dtype"]) != ("sm90", "bfloat16"):
            continue
        assert row["instructions"].get("HGMMA", 0) > 0, row
        if row["form"] in ("none", "causal"):
            assert row["spilled_bytes"] <= SPILLED[row["kernel"]], row
