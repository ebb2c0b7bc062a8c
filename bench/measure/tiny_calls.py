"""Two more clocks for calls so short that launching them costs as much as they do: a CUDA graph, and the host's."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

TINY_MS = 0.1
"""Calls below this median are timed by these clocks too."""

CALLS = 30
WARM_UP = 3


def host_ms(call: Callable[[], object]) -> float:
    """What a caller waits for: a call and its end on the GPU; the median in milliseconds."""
    times = []
    for _ in range(WARM_UP + CALLS):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times[WARM_UP:])


def graph_ms(call: Callable[[], object]) -> float | None:
    """The GPU's part alone: the call captured once and replayed, warm L2; None for what cannot be captured."""
    try:
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):  # what a first call allocates or builds is no part of the graph
            for _ in range(WARM_UP):
                call()
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        return _replay(graph)
    except Exception:
        torch.cuda.synchronize()
        return None


def _replay(graph: torch.cuda.CUDAGraph) -> float:
    times = []
    for _ in range(WARM_UP + CALLS):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times[WARM_UP:])
