"""Tuning without a GPU: the candidates, and every step on small problems with a clock that knows a favourite."""

import pytest

pytest.importorskip("triton", reason="triton is not installed")

import torch

from fastattn.kernels.host import tile_table, tune
from fastattn.kernels.host.tile_table import TABLE, shared_limit

ON_CPU = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for machines without a GPU")


@pytest.mark.parametrize("kernel", ["fwd", "dq", "dkv"])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_candidates_are_other_tiles_of_the_same_row_and_fit(kernel, head_dim):
    row = next(each for each in TABLE if each.target == "sm90" and each.kernel == kernel and not each.load)
    found = tune.candidates(row, head_dim)
    assert len(found) > 4 and row not in found and len(set(found)) == len(found)
    for each in found:
        assert (each.target, each.kernel, each.bits, each.descriptors) == ("sm90", kernel, row.bits, row.descriptors)
        own, walked = (each.block_n, each.block_m) if kernel == "dkv" else (each.block_m, each.block_n)
        assert 4 * head_dim * (own + each.num_stages * walked) <= shared_limit(row, "sm90")


def test_a_row_stands_in_and_leaves_no_trace():
    row = next(each for each in TABLE if each.target == "sm90" and each.kernel == "fwd" and not each.load)
    other = tune.candidates(row, 64)[0]
    with pytest.raises(KeyError), tune.standing_in(other):
        assert tile_table._row("fwd", "sm90", 64, 16, 0) == other
        raise KeyError
    assert tile_table.TABLE is TABLE and tile_table._row("fwd", "sm90", 64, 16, 0) != other


@ON_CPU
@pytest.mark.parametrize("kernel", ["fwd", "dq", "dkv"])
def test_candidates_are_run_compared_and_timed(kernel, monkeypatch):
    monkeypatch.setattr(tune, "candidates", lambda row, head_dim: [few(row, 32, 32), few(row, 16, 16)])
    lines = list(tune.tune(torch.device("cpu"), ((kernel, 64, "causal"),), lambda run, device: 1.0))
    assert [line["reason"] for line in lines] == [None] * 3
    assert all(line["ms"] == 1.0 and line["tflops"] > 0 for line in lines)
    assert len({line["row"] for line in lines}) == 3 and f'"interpreter", "{kernel}"' in lines[1]["row"]


@ON_CPU
def test_a_candidate_with_another_result_gets_no_time(monkeypatch):
    monkeypatch.setattr(tune, "candidates", lambda row, head_dim: [few(row, 32, 32)])
    monkeypatch.setattr(tune, "_close", lambda result, known: False)
    lines = list(tune.tune(torch.device("cpu"), (("fwd", 64, "full"),), lambda run, device: 1.0))
    assert lines[1]["ms"] is None and lines[1]["reason"] == "another result"


@ON_CPU
def test_what_does_not_compile_is_a_line_with_the_reason(monkeypatch):
    monkeypatch.setattr(tune, "candidates", lambda row, head_dim: [few(row, 24, 16)])
    lines = list(tune.tune(torch.device("cpu"), (("fwd", 64, "full"),), lambda run, device: 1.0))
    assert lines[1]["ms"] is None and "Error" in lines[1]["reason"]


def few(row, block_m, block_n):
    return tune.dataclasses.replace(row, block_m=block_m, block_n=block_n)
