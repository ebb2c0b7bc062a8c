"""Timing: interleaved rounds over providers, so that a machine that slows down slows everybody down.

A sample is one call on a GPU (CUDA events, the L2 cache flushed before each call) and the mean of as many calls as fill
`SAMPLE_SECONDS` on a CPU. Medians and quartiles are taken over samples; every sample is kept.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

SAMPLE_SECONDS = 0.02
"""On a CPU short calls are repeated within a sample until it lasts this long, far above the clock's resolution."""

LEAST_SAMPLES = 3
CALLS_PER_CUDA_ROUND = 5

Call = Callable[[], object]


@dataclass(frozen=True)
class Budget:
    """How long to measure each call: at least `rounds` samples and `min_time` seconds, at most `max_time` seconds."""

    rounds: int = 7
    min_time: float = 0.3
    max_time: float = 3.0


@dataclass
class Timing:
    """Samples of one provider, in milliseconds a call: `inner` calls a sample, `per_round` samples a round."""

    samples_ms: list[float] = field(default_factory=list)
    inner: int = 1
    per_round: int = 1
    spent: float = 0.0
    failure: Exception | None = None

    @property
    def median_ms(self) -> float:
        return statistics.median(self.samples_ms)

    @property
    def quartiles_ms(self) -> tuple[float, float]:
        return quartiles(self.samples_ms)

    def enough(self, budget: Budget) -> bool:
        if self.failure is not None:
            return True
        count = len(self.samples_ms)
        if count >= LEAST_SAMPLES and self.spent >= budget.max_time:
            return True
        return count >= budget.rounds and self.spent >= budget.min_time


def quartiles(samples: list[float]) -> tuple[float, float]:
    """First and third quartile (linear interpolation, as numpy's default)."""
    if len(samples) < 2:
        return samples[0], samples[0]
    low, _, high = statistics.quantiles(samples, n=4, method="inclusive")
    return low, high


class CpuClock:
    """time.perf_counter around repeated calls."""

    name = "perf_counter"

    def warm_up(self, call: Call, timing: Timing) -> None:
        """One timed call, and a second one where that was short: how many calls make up a sample."""
        once = SAMPLE_SECONDS
        for _ in range(2):
            start = time.perf_counter()
            call()
            once = time.perf_counter() - start
            if once >= SAMPLE_SECONDS:
                break
        timing.inner = max(1, round(SAMPLE_SECONDS / max(once, 1e-9)))

    def sample(self, call: Call, timing: Timing) -> None:
        start = time.perf_counter()
        for _ in range(timing.inner):
            call()
        seconds = time.perf_counter() - start
        timing.spent += seconds
        timing.samples_ms.append(1e3 * seconds / timing.inner)


class CudaClock:
    """CUDA events around single calls; a buffer larger than the L2 cache is written before each."""

    name = "cuda events, cold L2"

    def __init__(self, device: torch.device):
        l2_bytes = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 64 << 20)
        self.flush = torch.empty(max(2 * l2_bytes, 64 << 20), dtype=torch.int8, device=device)

    def warm_up(self, call: Call, timing: Timing) -> None:
        timing.per_round = CALLS_PER_CUDA_ROUND
        for _ in range(3):
            call()
        torch.cuda.synchronize()

    def sample(self, call: Call, timing: Timing) -> None:
        # Several calls are queued before the host waits once, so that the launch cost hides behind the flush.
        start = time.perf_counter()
        pairs = []
        for _ in range(CALLS_PER_CUDA_ROUND):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            self.flush.zero_()
            begin.record()
            call()
            end.record()
            pairs.append((begin, end))
        torch.cuda.synchronize()
        timing.spent += time.perf_counter() - start
        timing.samples_ms += [begin.elapsed_time(end) for begin, end in pairs]


def clock_for(device: torch.device) -> CpuClock | CudaClock:
    return CudaClock(device) if device.type == "cuda" else CpuClock()


def measure(calls: dict[str, Call], clock: CpuClock | CudaClock, budget: Budget) -> dict[str, Timing]:
    """Time every call, round-robin; the order turns by one each round. A call that raises keeps its exception."""
    timings = {name: Timing() for name in calls}
    for name, call in calls.items():
        _guarded(lambda call=call, timing=timings[name]: clock.warm_up(call, timing), timings[name])
    names = list(calls)
    collecting = gc.isenabled()
    gc.disable()
    try:
        while names:
            for name in names:
                timing = timings[name]
                _guarded(lambda call=calls[name], timing=timing: clock.sample(call, timing), timing)
            names = [name for name in names[1:] + names[:1] if not timings[name].enough(budget)]
    finally:
        if collecting:
            gc.enable()
    return timings


def _guarded(step: Callable[[], None], timing: Timing) -> None:
    if timing.failure is not None:
        return
    try:
        step()
    except Exception as failure:
        timing.failure = failure
