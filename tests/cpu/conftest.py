"""For the tests of the CPU room: the library, built once, and every instruction set that the machine has."""

import pytest
import torch

from fastattn import native

ISAS = ("generic", "avx2", "avx512")


@pytest.fixture(scope="session")
def library():
    """The library, built where it is missing."""
    reason = native.prepare()
    if reason is not None:
        pytest.skip(reason)
    return native.library()


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
