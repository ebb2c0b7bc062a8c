"""Scores beyond float32's range: one answer from the reference, the CPU backend and Triton."""

import runpy
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from fastattn import attention, attention_weights
from fastattn.building.cpu_library import LIBRARY

rows = runpy.run_path(str(Path(__file__).parents[1] / "overflow.py"))
BACKENDS = ("reference", "cpu-generic", "cpu-avx2", "cpu-avx512", "cpu-amx", "triton")


@pytest.fixture(params=BACKENDS)
def backend(request, monkeypatch):
    """Each backend by name, the CPU's with each instruction set."""
    name, _, isa = request.param.partition("-")
    if name == "triton" and find_spec("triton") is None:
        pytest.skip("triton is not installed")
    if isa:
        refused = LIBRARY.prepare()
        if refused is not None:
            pytest.skip(refused)
        if isa not in LIBRARY.get().isas():
            pytest.skip(f"this machine has no {isa}")
        monkeypatch.setenv("FASTATTN_CPU_ISA", isa)
    return name


@pytest.mark.parametrize("dtype", rows["DTYPES"], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("shape", rows["SHAPES"])
@pytest.mark.parametrize("row", rows["ROWS"], ids=lambda row: row.id)
def test_one_answer(row, shape, dtype, backend):
    device = "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"

    def call(*tensors, **named):
        return attention(*tensors, backend=backend, return_lse=True, **named)

    q_len, kv_len = rows["SHAPES"][shape]
    if shape == "split-keys" and backend == "cpu":
        kv_len = 2100  # two parts of 16 tiles at least
    rows["check"](row, call, q_len, kv_len, dtype, device)


@pytest.mark.parametrize("given", ["lse", "no-lse"])
@pytest.mark.parametrize("row", rows["ROWS"], ids=lambda row: row.id)
@pytest.mark.parametrize("backend", BACKENDS[:-1], indirect=True)
def test_weights(row, given, backend, monkeypatch):
    """Of the keys that a row sees they are what its out says; those of a row without weights are NaN."""
    (query, key, _), named, mask = rows["problem"](row, 70, 70, torch.float32)
    monkeypatch.setenv("FASTATTN_BACKEND", backend)
    lse = None
    if given == "lse":
        lse = attention(query, key, key, backend="reference", return_lse=True, **named)[1].detach()
    weights = attention_weights(query.detach(), key.detach(), lse=lse, **named)
    total = {"hidden": 0.0, "visible": 1.0, "mean": 1.0, "nan": torch.nan}[row.answer]
    torch.testing.assert_close(weights[:, :, 0].sum(-1), torch.full((1, rows["HEADS"]), total), equal_nan=True)
    if row.answer == "visible":
        assert bool((weights[:, :, 0, ~mask.table[0]] == 0).all())
    torch.testing.assert_close(weights[:, :, 1:].sum(-1), torch.ones(1, rows["HEADS"], query.shape[2] - 1))
