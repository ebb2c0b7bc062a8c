"""The clocks for tiny calls on a stand-in for CUDA."""

import contextlib
from types import SimpleNamespace

import pytest
import torch

from fastattn.bench.cases.operations import BenchCase
from fastattn.bench.measure import run, tiny_calls
from fastattn.bench.measure.provider_warnings import Notices
from fastattn.bench.measure.rows import Row
from fastattn.bench.measure.run import CaseRunner


class Cuda:
    """Stands for torch.cuda: time goes on by what is done, a millisecond a launch and a tenth of one a replay."""

    def __init__(self, captures=True):
        self.now, self.captures, self.capturing = 0.0, captures, False

    def launch(self):
        self.now += 0.0 if self.capturing else 1.0

    def install(self, monkeypatch):
        cuda = self

        class Event:
            def __init__(self, enable_timing):
                pass

            def record(self):
                self.at = cuda.now

            def elapsed_time(self, other):
                return other.at - self.at

        class Graph:
            def replay(self):
                cuda.now += 0.1

        @contextlib.contextmanager
        def graph(of):
            if not cuda.captures:
                raise RuntimeError("operation not permitted when stream is capturing")
            cuda.capturing = True
            yield
            cuda.capturing = False

        stream = SimpleNamespace(wait_stream=lambda other: None)
        for name, stand_in in {
            "Event": Event, "CUDAGraph": Graph, "graph": graph, "Stream": lambda: stream,
            "current_stream": lambda: stream, "synchronize": lambda *device: None, "empty_cache": lambda: None,
            "stream": lambda of: contextlib.nullcontext(),
        }.items():  # fmt: skip
            monkeypatch.setattr(torch.cuda, name, stand_in)
        monkeypatch.setattr(tiny_calls.time, "perf_counter", lambda: cuda.now / 1e3)


def test_a_graph_is_the_gpus_part_and_the_host_waits_for_all(monkeypatch):
    cuda = Cuda()
    cuda.install(monkeypatch)
    assert tiny_calls.host_ms(cuda.launch) == pytest.approx(1.0)
    assert tiny_calls.graph_ms(cuda.launch) == pytest.approx(0.1)


def test_what_cannot_be_captured_has_no_graph_time(monkeypatch):
    cuda = Cuda(captures=False)
    cuda.install(monkeypatch)
    assert tiny_calls.graph_ms(cuda.launch) is None


@pytest.mark.parametrize("milliseconds, looked", [(0.05, True), (0.5, False)])
def test_only_tiny_calls_get_more_clocks(monkeypatch, milliseconds, looked):
    cuda = Cuda()
    cuda.install(monkeypatch)
    monkeypatch.setattr(run.nvidia_smi, "sampler", lambda: None)
    case = BenchCase("self", "bf16", 1, 1, 1, 8, 8, 8)
    row = Row(case, "fwd", "sdpa", "cuda", samples_ms=[milliseconds] * 3)
    runner = CaseRunner(case, torch.device("cuda"), None, None, False, run.Progress(1))
    runner._look_closer([row], {"sdpa": cuda.launch}, Notices({"sdpa": row.warnings}))
    assert (row.host_ms is not None, row.graph_ms is not None) == (looked, looked)
