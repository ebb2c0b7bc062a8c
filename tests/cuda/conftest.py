"""The CUDA room's library for the simulator: the same translation units, compiled by the C++ compiler."""

import pytest
import torch

from fastattn import compiler, native_cuda, nvcc, simulator

MULTIPROCESSORS = 4  # of the simulated GPU: small problems meet persistent blocks and splits
QUIET = ("-Wno-psabi", "-Wno-unused-parameter", "-Wno-unused-function", "-Wno-missing-field-initializers")


def simulated(flavour):
    """The library, loaded. Its operator works on CPU tensors."""
    parts = [simulator.Part(source, (*flags, *QUIET)) for source, flags in nvcc.parts().values()]
    link = ("-L" + str(compiler.torch_folder() / "lib"), "-ltorch_cpu")
    path = simulator.build_library("cuda", parts, flavour, link)
    handle = simulator.load(path)
    handle.fastattn_cuda_simulate(MULTIPROCESSORS)
    return native_cuda.Library(torch.ops.fastattn.simulated_forward.default, path, handle)


@pytest.fixture(scope="session")
def room():
    """The simulator's library in place of the room's."""
    refused = simulator.why_not()
    if refused is not None:
        pytest.skip(refused)
    return simulated("plain")
