"""For the tests of the CPU room: the library, built once, and every instruction set that the machine has."""

import os
from pathlib import Path

import pytest
import torch

from fastattn.native_cpu import LIBRARY

TILES = "-DFASTATTN_EMULATE_AMX" in os.environ.get("CXXFLAGS", "") or (
    Path("/proc/cpuinfo").exists() and " amx_bf16" in Path("/proc/cpuinfo").read_text()
)
ISAS = ("generic", "avx2", "avx512", *(["amx"] if TILES else []))
"""`amx` where the processor has it, or the library emulates it as the one that test_amx.py builds."""


@pytest.fixture(scope="session")
def library():
    """The library, built where it is missing."""
    reason = LIBRARY.prepare()
    if reason is not None:
        pytest.skip(reason)
    return LIBRARY.get()


@pytest.fixture(params=ISAS)
def isa(request, library, monkeypatch):
    """Each instruction set in turn, forced."""
    if request.param not in library.isas():
        pytest.skip(f"this machine has no {request.param}")
    monkeypatch.setenv("FASTATTN_CPU_ISA", request.param)
    if library.isa() != request.param:
        raise RuntimeError(f"{library.isa()} runs where {request.param} was asked for")
    return request.param


@pytest.fixture
def threads():
    """Set torch's number of threads for one test: `threads(2)`."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
