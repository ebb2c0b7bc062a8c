"""For the tests of the CPU backend: the library, built once, and every instruction set that the machine has."""

import os
import tempfile
from pathlib import Path

import pytest
import torch

from fastattn import process
from fastattn.building import compiler
from fastattn.building.cpu_library import LIBRARY

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


FAKE = """#!/bin/sh
case "$*" in *--version*) echo "{version}"; exit 0;; esac
echo "$*" >> "{log}"
sleep {seconds}
for last; do :; done
echo half > "$last"
case "$*" in *{fails}*) echo "In file included from x.h:"; echo "x.cpp:3:1: error: no such thing"; exit 1;; esac
exit 0
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Put a made-up compiler in CXX and an empty cache beside it; the log has a line a command."""

    def make(version="made-up 1.0", fails="nothing-at-all", seconds=0):
        script = tmp_path / "c++"
        script.write_text(FAKE.format(version=version, log=tmp_path / "log", fails=fails, seconds=seconds))
        script.chmod(0o755)
        compiler._find_compiler.cache_clear()
        return lambda: (tmp_path / "log").read_text().splitlines() if (tmp_path / "log").exists() else []

    monkeypatch.setenv("CXX", str(tmp_path / "c++"))
    monkeypatch.setenv("FASTATTN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("FASTATTN_BUILD", raising=False)
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    for name in ("unusable", "damaged"):
        monkeypatch.setattr(LIBRARY, name, {})
    yield make
    compiler._find_compiler.cache_clear()


@pytest.fixture(params=["ninja", "by itself"])
def way(request, monkeypatch):
    """With ninja, and with the compiler called directly."""
    real = compiler.shutil.which
    if request.param == "ninja" and real("ninja") is None:
        pytest.skip("needs ninja")
    if request.param == "by itself":
        monkeypatch.setattr(
            compiler.shutil, "which", lambda name, **named: None if name == "ninja" else real(name, **named)
        )
    return request.param


@pytest.fixture
def unloaded(monkeypatch):
    """As if nothing had been loaded in this process."""
    for name, value in (("loaded", None), ("failure", None), ("retry_at", float("inf")), ("warned", False)):
        monkeypatch.setattr(LIBRARY, name, value)
    monkeypatch.setattr(process, "kept", lambda name: None)
    monkeypatch.setattr(process, "keep", lambda name, value: None)
