"""Small kernels of tests/sim/kernels: compiled for the simulator, and by nvcc for a GPU; kept in the cache folder."""

import ctypes
import functools
import hashlib
import subprocess
from pathlib import Path

import pytest
import torch

from fastattn import native, nvcc, simulator
from fastattn.compiler import BuildError

KERNELS = Path(__file__).parent / "kernels"
HOPPER = "arch=compute_90a,code=sm_90a"


@functools.cache
def simulated(name, flavour):
    return simulator.load(simulator.build(KERNELS / f"{name}.cu", flavour))


@functools.cache
def compiled(name, architecture=HOPPER):
    """A file's library for the GPU, and what ptxas says of its kernels."""
    try:
        found = nvcc.find_nvcc()
    except BuildError as refusal:
        pytest.skip(str(refusal))
    source = KERNELS / f"{name}.cu"
    flags = ("-std=c++17", "-O3", "-gencode", architecture, "-Xptxas", "-v", "-shared", "-Xcompiler", "-fPIC")
    digest = hashlib.sha256("\0".join((found.version, *flags)).encode())
    for path in simulator.included([source]):
        digest.update(path.read_bytes())
    folder = native.cache_folder() / "simulator"
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / f"{name}_{digest.hexdigest()[:24]}_gpu.so"
    said = library.with_suffix(".txt")
    if not said.exists():
        command = [*found.command, *flags, str(source), "-o", str(library)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        said.write_text(done.stdout + done.stderr)
    return library, said.read_text()


def passed(value):
    """A tensor as a pointer; numbers and bytes as they are."""
    return ctypes.c_void_p(value.data_ptr()) if isinstance(value, torch.Tensor) else value


def call(library, name, arguments):
    function = getattr(library, f"run_{name}")
    function.restype = ctypes.c_char_p
    said = function(*map(passed, arguments))
    return None if said is None else said.decode()


@pytest.fixture(scope="session")
def simulate():
    """A kernel file's function under a schedule: None, or what the simulator says is wrong."""
    refused = simulator.why_not()
    if refused is not None:
        pytest.skip(refused)

    def run(name, *arguments, flavour=None, seed=0, fixed_order=False, resident=2):
        library = simulated(name, flavour or simulator.usual_flavour())
        simulator.schedule(library, seed=seed, fixed_order=fixed_order, resident=resident)
        return call(library, name, arguments)

    return run


@pytest.fixture(scope="session")
def compile_for_gpu():
    """A kernel file's library for the GPU, and what ptxas says of its kernels; skips where there is no nvcc."""
    return compiled


@pytest.fixture
def execute(device, simulate):
    """A kernel file's function in the simulator, under a few schedules; and on a GPU, where the test's device is one:
    the tensors named in `outputs` must come out as the simulator leaves them.
    """

    def run(name, *arguments, outputs, atol=0.0, rtol=0.0):
        originals = [each.clone() for each in outputs]
        for seed in range(3):
            for output, original in zip(outputs, originals, strict=True):
                output.copy_(original)
            said = simulate(name, *arguments, seed=seed)
            if said is not None:
                return said
        if device.type == "cuda":
            moved = {id(each): each.to(device) for each in arguments if isinstance(each, torch.Tensor)}
            for output, original in zip(outputs, originals, strict=True):
                moved[id(output)].copy_(original)
            said = call(ctypes.CDLL(str(compiled(name)[0])), name, [moved.get(id(each), each) for each in arguments])
            assert said is None, said
            for output in outputs:
                torch.testing.assert_close(moved[id(output)].cpu(), output, atol=atol, rtol=rtol, equal_nan=True)
        return None

    return run
