"""The CUDA backend's library for the simulator: the same translation units, compiled by the C++ compiler."""

import dataclasses
import os
import runpy
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from fastattn import dispatch, explain
from fastattn.backends import cuda, triton
from fastattn.building import compiler, cuda_library, nvcc
from fastattn.spec import AttnInputs, AttnSpec
from fastattn.testing import poison, simulator

ENDS_WITHIN = 180.0  # seconds, of a test on a GPU: the longest waits 140 for compute-sanitizer
watched = runpy.run_path(str(Path(__file__).parents[1] / "gpu_watch.py"))["watched"]
MULTIPROCESSORS = 4  # of the simulated GPU: small problems meet persistent blocks and splits
QUIET = ("-Wno-psabi", "-Wno-unused-parameter", "-Wno-unused-function", "-Wno-missing-field-initializers")


class Simulated(NamedTuple):
    """The simulator's library in place of the backend's. Its operator works on CPU tensors."""

    library: cuda_library.Operators

    def forward(self, problem, seed=0, fixed_order=False):
        """out and lse, on poisoned memory, under a schedule drawn from the seed."""
        spec = dataclasses.replace(problem.spec, needs_grad=False)
        refused = cuda.feature_reason(spec)
        if refused is not None:
            raise ValueError(refused)
        simulator.schedule(self.library.handle, seed=seed, fixed_order=fixed_order)
        with poison():
            out, lse = cuda.run(self.library, spec, problem.inputs)
        return {"out": out, "lse": lse}

    def splits(self, problem):
        """How many programs share a tile's keys."""
        known = cuda._launch(problem.spec)
        return self.library.tiles(known.sizes, known.variant, known.by_head, -1).splits


def take_cpu_tensors(put, library):
    """The CUDA backend takes tensors on the CPU, and its library is this one. `put` is setattr, or a patch's."""
    for name, answer in {"get": library, "available": library, "prepare": None, "why_not": None}.items():
        put(cuda_library.LIBRARY, name, lambda answer=answer, **asked: answer)
    put(cuda, "_spec_reason", cuda.feature_reason)
    put(cuda, "_device_reason", lambda device: None)


def choose_as_on_hopper(put):
    """A free choice of CPU tensors passes by the CPU backend, and does not mind Triton's interpreter."""
    put(dispatch, "BACKENDS", ("cuda", "triton", "reference"))
    put(triton, "needs_asking", lambda spec: None)


def pytest_benchmark_update_machine_info(config, machine_info):
    """The machine's own name is nobody's business."""
    machine_info.pop("node", None)


def operator(flavour):
    """Its name; a process may load several."""
    return f"simulated_{flavour}"


def build(flavour):
    """The library, of one flavour of the simulator."""
    told = (f'-DFASTATTN_CUDA_OPERATOR="{operator(flavour)}"', *QUIET)
    parts = [simulator.Part(source, (*flags, *told)) for source, flags in nvcc.parts().values()]
    link = ("-L" + str(compiler.torch_folder() / "lib"), "-ltorch_cpu")
    return simulator.build_library("cuda", parts, flavour, link)


def simulated(flavour):
    refused = simulator.why_not()
    if refused is not None:
        pytest.skip(refused)
    path = build(flavour)
    handle = simulator.load(path)
    handle.fastattn_cuda_simulate(MULTIPROCESSORS)
    return Simulated(cuda_library.Operators(getattr(torch.ops.fastattn, operator(flavour)).default, path, handle))


@pytest.fixture
def on_hopper(request):
    """Skips where the backend cannot run a plain call; builds its library first. A test that hangs, or leaves a CUDA
    context that no later test can use, ends the process and is named.
    """
    if not torch.cuda.is_available():
        pytest.skip("torch sees no GPU here")
    tensor = torch.empty(1, 1, 8, 64, dtype=torch.bfloat16, device="cuda")
    reason = explain(tensor, tensor, tensor).reasons["cuda"] or cuda_library.LIBRARY.prepare()
    if reason is not None:
        pytest.skip(reason)
    with watched(request.node, torch.cuda.synchronize, ENDS_WITHIN):
        yield


@pytest.fixture(scope="session")
def backend():
    """For results: the quickest, or the one that watches addresses where this process was started for that."""
    watched = simulator.usual_flavour() == "addresses"
    return simulated("addresses" if watched else "plain")


@pytest.fixture(scope="session")
def checked():
    """For races: every access to shared memory is held against the barriers."""
    return simulated("checked")


@pytest.fixture
def take(monkeypatch):
    """take(library): the CUDA backend takes CPU tensors."""
    return lambda library: take_cpu_tensors(monkeypatch.setattr, library)


@pytest.fixture
def ran(monkeypatch):
    """Which backend's forward and backward ran, in order, as ("cuda", "forward")."""
    found = []
    for name in dispatch.BACKENDS:
        module = dispatch.load(name)
        for part in ("forward", "backward"):
            if hasattr(module, part):
                real, what = getattr(module, part), (name, part)
                spy = lambda *args, real=real, what=what, **named: found.append(what) or real(*args, **named)
                monkeypatch.setattr(module, part, spy)
    return found


@pytest.fixture
def on_both_simulators(request, take, monkeypatch):
    """CPU tensors are chosen for as a Hopper GPU's: the CUDA forward in the simulator, Triton in its interpreter."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("Triton's interpreter is for machines without a GPU; tests/cuda/test_gpu.py has these calls")
    tensor = torch.empty(1, 1, 1, 64)
    refused = triton.why_not(AttnSpec.of(AttnInputs(tensor, tensor, tensor)))
    if refused is not None:
        pytest.skip(refused)
    take(request.getfixturevalue("backend").library)
    choose_as_on_hopper(monkeypatch.setattr)
    monkeypatch.delenv("FASTATTN_BACKEND", raising=False)
