"""Small runs of the benchmark, in this process."""

import json
import time

import pytest
import torch

from fastattn.bench.cases.operations import BenchCase, bench_cases
from fastattn.bench.measure import run
from fastattn.bench.measure.clock import Budget, CpuClock, CudaClock
from fastattn.bench.measure.progress import Progress
from fastattn.cli import main

SMALL = ["-N", "32", "-H", "2", "-D", "16", "-B", "2", "--device", "cpu"]
SHORT = ["--rounds", "3", "--min-time", "0.001", "--max-time", "0.05"]


@pytest.fixture
def cpu():
    return torch.device("cpu")


@pytest.fixture
def timed(cpu):
    """Runs one cell on the CPU, an operation at small sizes or a case: a row for each provider."""

    def cell(case, mode, names, clock=None, check=True):
        if not isinstance(case, BenchCase):
            [case] = bench_cases("cpu", ops=[case], q_len=[40], num_heads=[4], head_dim=[16])
        rows = run.cell_rows(run.Cell(case, mode), names, cpu)
        run.CaseRunner(case, cpu, clock or CpuClock(), Budget(3, 0.001, 0.01), check, Progress(1)).run(rows)
        return rows

    return cell


class Host:
    """Plays a GPU on calls that the CPU does: an event is a time."""

    def event(self):
        return HostEvent()

    def synchronize(self):
        pass

    now = staticmethod(time.time)


class HostEvent:
    def record(self):
        self.at = time.perf_counter()

    def synchronize(self):
        pass

    def elapsed_time(self, other):
        return 1e3 * (other.at - self.at)


@pytest.fixture
def gpu_clock():
    """A GPU's clock that times a CPU's calls."""
    return CudaClock(lambda: None, Host())


@pytest.fixture
def bench(tmp_path, monkeypatch, capsys):
    """Runs `fastattn bench` on small sizes: exit code, terminal text, and the JSON (None if none was written)."""
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.chdir(tmp_path)

    def run(*flags, plot=False):
        monkeypatch.setattr("fastattn.bench.command.ceilings", lambda dtypes, device: {"tflops": {}, "gb_per_s": 1.0})
        if not plot:
            # matplotlib takes a second; the tests that look at pictures ask for them.
            monkeypatch.setattr("fastattn.bench.report.plot.draw", lambda paths, rows, environment: None)
        code = main(["bench", *SMALL, *SHORT, "--out", "out", *flags])
        path = tmp_path / "out" / "bench.json"
        return code, capsys.readouterr(), json.loads(path.read_text()) if path.is_file() else None

    return run
