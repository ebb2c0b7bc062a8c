"""The machine's ceilings, measured: a large matrix product and a large copy, by the clock that times the rows."""

from __future__ import annotations

from typing import Any

import torch

from fastattn.bench.cases.operations import DTYPES
from fastattn.bench.measure.clock import Budget, clock_for, measure
from fastattn.bench.measure.rows import Row

PRODUCT = {"cpu": 1536, "cuda": 8192}
"""Rows and columns of the square matrices."""
COPY_BYTES = {"cpu": 1 << 28, "cuda": 1 << 31}
BUDGET = Budget(rounds=5, min_time=0.05, max_time=0.5)


def ceilings(dtypes: list[str], device: torch.device) -> dict[str, Any]:
    """{"tflops": {dtype: TFLOP/s of a matrix product}, "gb_per_s": GB/s of a copy}: the best samples."""
    size, clock = PRODUCT[device.type], clock_for(device)
    found: dict[str, float] = {}
    for name in dtypes:
        # Random numbers: zeros take less power, and so reach higher clocks.
        left, right = (torch.randn(size, size, device=device).to(getattr(torch, DTYPES[name])) for _ in range(2))
        out = torch.empty_like(left)
        best = _best_ms(lambda left=left, right=right, out=out: torch.mm(left, right, out=out), clock)
        found[name] = 2 * size**3 / (best * 1e9)
    source = torch.ones(COPY_BYTES[device.type] // 8, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    best = _best_ms(lambda: target.copy_(source), clock)
    return {"tflops": found, "gb_per_s": 2 * source.numel() * source.itemsize / (best * 1e6)}


def attainable(row: Row, measured: dict[str, Any]) -> float | None:
    """TFLOP/s that a row could reach: its useful operations at the product's rate, or its bytes at the copy's."""
    peak = measured["tflops"].get(row.case.dtype)
    if peak is None or not row.useful_flops or not row.least_bytes:
        return None
    return min(peak, row.useful_flops / row.least_bytes * measured["gb_per_s"] / 1e3)


def _best_ms(call: Any, clock: Any) -> float:
    timing = measure({"it": call}, clock, BUDGET)["it"]
    if timing.failure is not None:
        raise timing.failure
    return min(timing.samples_ms)
