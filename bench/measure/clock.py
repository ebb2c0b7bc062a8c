"""Timing: interleaved rounds over providers, so that a machine that slows down slows everybody down.

A sample is one call on a GPU (CUDA events, the L2 cache flushed before each call) and the mean of as many calls as fill
`SAMPLE_SECONDS` on a CPU. A GPU's calls are also timed under sustained load: several calls a sample, no flush. Medians
and quartiles are taken over samples; every sample is kept.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

SAMPLE_SECONDS = 0.02
"""On a CPU short calls are repeated within a sample until it lasts this long, far above the clock's resolution."""

LEAST_SAMPLES = 3
CALLS_PER_CUDA_ROUND = 5

SUSTAINED_MS = 10.0
"""A sample under sustained load holds as many calls as last about so long."""
MOST_SUSTAINED_CALLS = 64

Call = Callable[[], object]


@dataclass(frozen=True)
class Budget:
    """How long to measure each call: at least `rounds` samples and `min_time` seconds, at most `max_time` seconds."""

    rounds: int = 7
    min_time: float = 0.3
    max_time: float = 3.0


@dataclass
class Timing:
    """Samples of one provider, in milliseconds a call: `inner` calls a sample, `per_round` samples a round.

    `spans`: from when to when, in seconds since the epoch, its turns ran on a GPU.
    """

    samples_ms: list[float] = field(default_factory=list)
    inner: int = 1
    per_round: int = 1
    spent: float = 0.0
    spans: list[tuple[float, float]] = field(default_factory=list)
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


class Clock(Protocol):
    """Takes samples of calls. `sustained`: a second clock, for the same calls under lasting load; None without one."""

    name: str
    sustained: Clock | None

    def warm_up(self, call: Call, timing: Timing) -> None: ...
    def sample(self, call: Call, timing: Timing) -> None: ...
    def finish(self) -> None:
        """Wait for what `sample` has queued."""


class CpuClock:
    """time.perf_counter around repeated calls."""

    name = "perf_counter"
    sustained: Clock | None = None
    """Its samples follow each other without pauses as they are."""

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

    def finish(self) -> None:
        pass


class Device:
    """What a GPU's clocks ask of torch.cuda; a test plays it."""

    def event(self) -> Any:
        return torch.cuda.Event(enable_timing=True)

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def now(self) -> float:
        """The wall clock, seconds since the epoch: nvidia-smi stamps its readings with it."""
        return time.time()


Pair = tuple[Any, Any]
"""Events before and after what they time."""


class EventClock:
    """Samples between CUDA events. A turn is queued before the turn ahead of it is waited for: the GPU has no pause."""

    def __init__(self, device: Device):
        self.device = device
        self.queued: tuple[Timing, list[Pair]] | None = None
        self.since = 0.0

    def queue(self, call: Call, timing: Timing) -> list[Pair]:
        """Put one turn of a provider behind what the GPU is at; a pair of events a sample."""
        raise NotImplementedError

    def sample(self, call: Call, timing: Timing) -> None:
        if self.queued is None:
            self.since = self.device.now()
        pairs = self.queue(call, timing)
        self.finish()
        self.queued = timing, pairs

    def finish(self) -> None:
        if self.queued is None:
            return
        (timing, pairs), self.queued = self.queued, None
        try:
            pairs[-1][1].synchronize()
            timing.samples_ms += [begin.elapsed_time(end) / timing.inner for begin, end in pairs]
            timing.spent += pairs[0][0].elapsed_time(pairs[-1][1]) / 1e3
        except Exception as failure:  # of this turn, not of the one that was queued since
            timing.failure = failure
        until = self.device.now()
        timing.spans.append((self.since, until))
        self.since = until

    def _timed(self, call: Call, count: int) -> Pair:
        begin, end = self.device.event(), self.device.event()
        begin.record()
        for _ in range(count):
            call()
        end.record()
        return begin, end


class CudaClock(EventClock):
    """Single calls; a buffer larger than the L2 cache is written before each."""

    name = "cuda events, cold L2"

    def __init__(self, flush: Call, device: Device | None = None):
        super().__init__(device or Device())
        self.flush = flush
        self.sustained: Clock | None = SustainedClock(self.device)

    def warm_up(self, call: Call, timing: Timing) -> None:
        timing.per_round = CALLS_PER_CUDA_ROUND
        for _ in range(3):
            call()
        self.device.synchronize()

    def queue(self, call: Call, timing: Timing) -> list[Pair]:
        # The launch of a call hides behind the flush before it.
        pairs = []
        for _ in range(CALLS_PER_CUDA_ROUND):
            self.flush()
            pairs.append(self._timed(call, 1))
        return pairs


class SustainedClock(EventClock):
    """Several calls a sample, nothing between them and no flush: with turns that follow each other at once, the GPU
    comes to the clocks that its power limit leaves it.
    """

    name = "cuda events, sustained load"
    sustained: Clock | None = None

    def warm_up(self, call: Call, timing: Timing) -> None:
        """A call by itself, and a timed one: how many calls make up a sample."""
        call()
        begin, end = self._timed(call, 1)
        end.synchronize()
        once = begin.elapsed_time(end)
        timing.inner = min(MOST_SUSTAINED_CALLS, max(1, round(SUSTAINED_MS / max(once, 1e-6))))

    def queue(self, call: Call, timing: Timing) -> list[Pair]:
        return [self._timed(call, timing.inner)]


def clock_for(device: torch.device) -> Clock:
    if device.type == "cpu":
        return CpuClock()
    l2_bytes = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 64 << 20)
    return CudaClock(torch.empty(max(2 * l2_bytes, 64 << 20), dtype=torch.int8, device=device).zero_)


SUSTAINED = Budget(rounds=12, min_time=0.0, max_time=0.4)
"""As many rounds for everybody, but for those whose calls are so long that three samples take more."""


def measure(
    calls: dict[str, Call], clock: Clock, budget: Budget, turn: Callable[[str], object] = lambda name: None
) -> dict[str, Timing]:
    """Time every call, round-robin; the order turns by one each round. A call that raises keeps its exception.

    `turn` hears whose turn it is, before anything of it is called.
    """
    timings = {name: Timing() for name in calls}
    for name, call in calls.items():
        turn(name)
        _guarded(lambda call=call, timing=timings[name]: clock.warm_up(call, timing), timings[name])
    names = list(calls)
    collecting = gc.isenabled()
    gc.disable()
    try:
        while names:
            for name in names:
                timing = timings[name]
                turn(name)
                _guarded(lambda call=calls[name], timing=timing: clock.sample(call, timing), timing)
            names = [name for name in names[1:] + names[:1] if not timings[name].enough(budget)]
        clock.finish()
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
