"""Call overhead: the host's time for a call that does next to nothing, one query on one key."""

from __future__ import annotations

import statistics
import time
import warnings

import torch

from fastattn.bench.cases.module import workload_of
from fastattn.bench.cases.operations import BenchCase
from fastattn.bench.cases.workload import Workload, tiny
from fastattn.bench.measure.providers.base import Provider

ROUNDS = 7
CALLS = 50
"""In a row before a GPU is waited for: far fewer than its queue holds, so that only the host's part is seen."""


def overhead_us(who: Provider, case: BenchCase, mode: str, device: torch.device) -> float | None:
    """Microseconds a call, the median of rounds.

    None for who compiles for each size, and who refuses the tiny case or fails in it: no fault of the large one.
    """
    if who.compiles:
        return None
    workload = workload_of(tiny(case), device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the tiny case, which is not the row's
        try:
            return None if who.why_not(workload, mode) is not None else _time(who, workload, mode)
        except Exception:
            return None


def _time(who: Provider, workload: Workload, mode: str) -> float:
    device = workload.device
    call = workload.call(mode, who.make(workload, mode))
    times = []
    for _ in range(ROUNDS + 1):
        _wait(device)
        start = time.perf_counter()
        for _ in range(CALLS):
            call()
        times.append(1e6 * (time.perf_counter() - start) / CALLS)
    _wait(device)
    return statistics.median(times[1:])  # the first warms up


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
