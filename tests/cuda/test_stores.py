"""Whole sectors: what the forward kernels write of out, of lse and of splits' parts fills the 32-byte sectors in which
memory is written, each of them once. That nvcc keeps a store one instruction is tests/cuda/test_compiled.py's claim.
"""

import dataclasses

import pytest

from fastattn.masks import Causal
from fastattn.testing import Case, check_close, make_inputs, simulator

SECTOR = 32  # bytes
SHARED = Case("stores", 136, 130, 2, 4, 2, 64)
CASES = {
    "plain": SHARED,
    "masked": dataclasses.replace(SHARED, mask=lambda *_: Causal()),
    "everything": dataclasses.replace(SHARED, softcap=9.0),
    "packed-heads": dataclasses.replace(SHARED, num_heads=16, q_len=8),
}
SPLIT = {
    "split": dataclasses.replace(SHARED, batch=1, q_len=8, kv_len=900),
    "split, a width that is no multiple of 8": dataclasses.replace(SHARED, batch=1, q_len=8, kv_len=900, head_dim_v=39),
}
WHERE = (*((case, 64) for case in CASES), *(("plain", width) for width in (96, 128, 192, 256)))
OUT, PART, LSE = 16, 8, 4  # bytes that a lane stores at a time


def stored(backend, problem):
    handle = backend.library.handle
    for lane_bytes in (OUT, PART, LSE):
        simulator.stored(handle, lane_bytes)
    check_close(problem, backend.forward(problem))
    return {lane_bytes: simulator.stored(handle, lane_bytes) for lane_bytes in (OUT, PART, LSE)}


@pytest.mark.parametrize("case, width", WHERE)
def test_out_and_lse_are_written_in_whole_sectors(case, width, backend):
    problem = make_inputs(dataclasses.replace(CASES[case], head_dim=width, head_dim_v=width))
    assert backend.splits(problem) == 1
    rows = problem.spec.batch * problem.spec.num_heads * problem.spec.q_len
    found = stored(backend, problem)
    assert found[OUT] == (2 * rows * width, 2 * rows * width // SECTOR)
    assert found[LSE] == (4 * rows, 4 * rows // SECTOR)
    assert found[PART].bytes == 0


@pytest.mark.parametrize("case", SPLIT)
def test_parts_are_written_in_whole_sectors(case, backend):
    problem = make_inputs(SPLIT[case])
    splits = backend.splits(problem)
    assert splits > 1
    spec = problem.spec
    rows = splits * spec.batch * spec.num_heads * spec.q_len
    written = 4 * rows * ((spec.head_dim_v + 7) // 8 * 8)
    found = stored(backend, problem)
    assert found[PART] == (written, written // SECTOR)
    assert found[LSE] == (4 * rows, 4 * rows // SECTOR)
    assert found[OUT].bytes == 0
