"""Small runs of the benchmark, in this process."""

import json

import pytest
import torch

from fastattn.cli import main

SMALL = ["-N", "32", "-H", "2", "-D", "16", "-B", "2", "--device", "cpu"]
SHORT = ["--rounds", "3", "--min-time", "0.001", "--max-time", "0.05"]


@pytest.fixture
def cpu():
    return torch.device("cpu")


@pytest.fixture
def bench(tmp_path, monkeypatch, capsys):
    """Runs `fastattn bench` on small sizes: exit code, terminal text, and the JSON (None if none was written)."""
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.chdir(tmp_path)

    def run(*flags, plot=False):
        monkeypatch.setattr("fastattn.bench.command.ceilings", lambda dtypes, device: {"tflops": {}, "gb_per_s": 1.0})
        if not plot:
            # matplotlib takes a second; the tests that look at pictures ask for them.
            monkeypatch.setattr("fastattn.bench.plot.draw", lambda paths, rows, environment: None)
        code = main(["bench", *SMALL, *SHORT, "--out", "out", *flags])
        path = tmp_path / "out" / "bench.json"
        return code, capsys.readouterr(), json.loads(path.read_text()) if path.is_file() else None

    return run
