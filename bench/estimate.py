"""What a row will take, before anything is allocated; and what there is."""

from __future__ import annotations

from pathlib import Path

import torch

from fastattn.bench.problem import SLICE_PAIRS
from fastattn.bench_cases import DTYPES, BenchCase

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
    queries = case.batch * case.num_heads * case.q_len * case.head_dim
    keys = case.batch * case.num_kv_heads * case.kv_len * case.head_dim
    return _item(case) * (COPIES[mode] * (queries + 2 * keys) + 2 * queries)


def plain_bytes(case: BenchCase, mode: str) -> int:
    """Bytes of the tables of an attention that is not fused, its mask's included."""
    pairs = case.batch * case.num_heads * case.q_len * case.kv_len
    return PLAIN_TABLES[mode] * _item(case) * pairs


def mask_bytes(case: BenchCase) -> int:
    """Bytes of the mask as a bool table."""
    many = case.batch if case.op == "masked" else 1
    return 0 if case.op in ("self", "cross", "decode") else many * case.q_len * case.kv_len


def check_bytes(case: BenchCase, device: torch.device) -> int:
    """Bytes of the float64 tables that a result is held against: of all heads, or of one group where those are many."""
    pairs = case.batch * case.num_heads * case.q_len * case.kv_len
    if pairs > SLICE_PAIRS.get(device.type, SLICE_PAIRS["cpu"]):
        pairs = case.num_heads // case.num_kv_heads * case.q_len * case.kv_len
    return 8 * TRUTH_TABLES * pairs


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
