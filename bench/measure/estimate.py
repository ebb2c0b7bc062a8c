"""What a row will take, before anything is allocated; and what there is."""

from __future__ import annotations

from pathlib import Path

import torch

from fastattn.bench.cases.operations import DTYPES, OPS, BenchCase
from fastattn.bench.cases.workload import part_groups, slices

COPIES = {"fwd": 2, "bwd": 3, "fwd+bwd": 3}
"""Of the inputs: as drawn, as leaves, and their gradients. The output comes with the gradient that arrives."""

TRUTH_TABLES = 6
"""Tables of float64 that the definition and its gradient hold at a time."""

PLAIN_TABLES = {"fwd": 5, "bwd": 10, "fwd+bwd": 10}
"""Tables of scores, in the input's dtype, that an attention in plain PyTorch holds at a time (read off its peak)."""

CGROUP_LIMIT, CGROUP_USED = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
MEMINFO = Path("/proc/meminfo")


def tensor_bytes(case: BenchCase, mode: str) -> int:
    """Bytes of inputs, outputs and gradients of one row."""
    queries = case.batch * case.num_heads * case.q_len
    keys = case.batch * case.num_kv_heads * case.kv_len
    inputs = queries * case.head_dim + keys * (case.head_dim + case.value_dim)
    bias = case.num_heads * case.q_len * case.kv_len if OPS[case.op].bias else 0
    return _item(case) * (COPIES[mode] * (inputs + bias) + 2 * queries * case.value_dim)


def plain_bytes(case: BenchCase, mode: str) -> int:
    """Bytes of the tables of an attention that is not fused, its mask's included."""
    pairs = case.batch * case.num_heads * case.q_len * case.kv_len
    return PLAIN_TABLES[mode] * _item(case) * pairs


def mask_bytes(case: BenchCase) -> int:
    """Bytes of the mask as a bool table."""
    tables = {"bare": 0, "one": 1, "batch": case.batch, "heads": case.num_heads}[OPS[case.op].tables]
    return tables * case.q_len * case.kv_len


def check_bytes(case: BenchCase, mode: str, device: torch.device) -> int:
    """Bytes of the float64 tables that a result is held against, whole or a part at a time."""
    pairs = case.batch * case.num_heads * case.q_len * case.kv_len
    plan = slices(case, device.type, mode == "fwd")
    if plan is None:
        return 8 * TRUTH_TABLES * pairs
    of_part = pairs * plan.kv_heads // part_groups(case) * plan.queries // case.q_len
    return 8 * TRUTH_TABLES * of_part + mask_bytes(case)


def free_bytes(device: torch.device) -> int | None:
    """What could be allocated now; None where the system does not tell."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    found = [each for each in (_available(), _cgroup_left()) if each is not None]
    return min(found, default=None)


def _available() -> int | None:
    try:
        lines = MEMINFO.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def _cgroup_left() -> int | None:
    """A container's own limit, which /proc/meminfo does not know."""
    try:
        return max(0, int(CGROUP_LIMIT.read_text()) - int(CGROUP_USED.read_text()))
    except (OSError, ValueError):
        return None


def _item(case: BenchCase) -> int:
    return getattr(torch, DTYPES[case.dtype]).itemsize
