"""Small kernels of tests/sim/kernels, compiled for the simulator once and kept in the cache folder."""

import ctypes
import functools
from pathlib import Path

import pytest

from fastattn import simulator

KERNELS = Path(__file__).parent / "kernels"


@functools.cache
def library(name, flavour):
    return simulator.load(simulator.build(KERNELS / f"{name}.cu", flavour))


@pytest.fixture(scope="session")
def simulate():
    """A kernel file's function, called under a schedule: None, or what the simulator says is wrong."""
    refused = simulator.why_not()
    if refused is not None:
        pytest.skip(refused)

    def call(name, *arguments, flavour="checked", seed=0, fixed_order=False, resident=2):
        loaded = library(name, flavour)
        simulator.schedule(loaded, seed=seed, fixed_order=fixed_order, resident=resident)
        function = getattr(loaded, f"run_{name}")
        function.restype = ctypes.c_char_p
        said = function(*(ctypes.c_void_p(each) if each > 1 << 31 else each for each in arguments))
        return None if said is None else said.decode()

    return call
