"""Small kernels of tests/sim/kernels: compiled for the simulator, and by nvcc for a GPU; kept in the cache folder."""

import functools
import hashlib
import runpy
import subprocess
from pathlib import Path

import pytest
import torch

from fastattn.backends import cuda
from fastattn.building import nvcc
from fastattn.building.compiler import BuildError
from fastattn.testing import simulator

KERNELS = Path(__file__).parent / "kernels"
ON_GPU = runpy.run_path(str(Path(__file__).parent / "on_gpu.py"))
call = ON_GPU["call"]
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
    library = simulator.cache_folder() / f"{name}_{digest.hexdigest()[:24]}_nvcc.so"
    said = library.with_suffix(".txt")

    def make(folder):
        made = folder / "library.so"
        done = subprocess.run(
            [*found.command, *flags, str(source), "-o", str(made)], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        said.write_text(done.stdout + done.stderr)
        return made

    return simulator.once(library, make), said.read_text()


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
def stored():
    """What a kernel file's simulated kernels have stored since this was last asked; see simulator.stored."""
    return lambda name, lane_bytes: simulator.stored(simulated(name, simulator.usual_flavour()), lane_bytes)


@pytest.fixture(scope="session")
def compile_for_gpu():
    """A kernel file's library for the GPU, and what ptxas says of its kernels; skips where there is no nvcc."""
    return compiled


@pytest.fixture(scope="session")
def runner_on():
    """A process that runs kernels on a device; see on_gpu.py."""
    runners = {}

    def start(device):
        return runners.setdefault(device, ON_GPU["Runner"](device))

    yield start
    for runner in runners.values():
        runner.stop()


@pytest.fixture
def execute(device, simulate, runner_on):
    """A kernel file's function in the simulator, under a few schedules; and on a GPU, where the test's device is one:
    the tensors named in `outputs` must come out as the simulator leaves them. Returns what the simulator says is wrong,
    or None; `refusal` is what both say of a mistake, which on a GPU spoils the process that runs the kernels, and no
    other.
    """

    if device.type == "cuda" and torch.cuda.get_device_capability() != cuda.CAPABILITY:
        pytest.skip("the PTX halves are compiled for Hopper, sm_90a, and this GPU is another")

    def run(name, *arguments, outputs, atol=0.0, rtol=0.0, refusal=None):
        originals = [each.clone() for each in outputs]
        for seed in range(3):
            for output, original in zip(outputs, originals, strict=True):
                output.copy_(original)
            said = simulate(name, *arguments, seed=seed)
            if said is not None and refusal is None:
                return said
            assert refusal is None or (said is not None and refusal in said), f"the simulator, run_{name}: {said}"
        if device.type == "cuda":
            places = [next(at for at, each in enumerate(arguments) if each is output) for output in outputs]
            given = list(arguments)
            for place, original in zip(places, originals, strict=True):
                given[place] = original
            there, after = runner_on("cuda")(compiled(name)[0], name, given)
            if refusal is not None:
                assert there is not None and refusal in there, f"the PTX half, run_{name}: {there}"
                return said
            assert there is None, f"the PTX half, run_{name}: {there}"
            for place, output in zip(places, outputs, strict=True):
                torch.testing.assert_close(
                    after[place], output, atol=atol, rtol=rtol, equal_nan=True,
                    msg=lambda words: f"the PTX half and the simulator differ, run_{name}: {words}",
                )  # fmt: skip
        return said

    return run
