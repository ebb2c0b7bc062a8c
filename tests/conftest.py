"""Every test: NaN in fresh memory, one thread a process, the same random draws each time; `gpu` where there is one."""

import os

# Processes compute in parallel (make test), not threads; inductor would start a compiler process per core besides.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():  # Triton runs in its interpreter then, and asks for it once, when it is imported
    os.environ.setdefault("TRITON_INTERPRET", "1")

from hypothesis import HealthCheck, settings

settings.register_profile("new", deadline=None, max_examples=25, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("same", settings.get_profile("new"), derandomize=True, print_blob=True)
settings.load_profile("same")  # --hypothesis-profile=new draws others each time

# `python -m pytest` puts the checkout on the path, where transformers finds our kernels/ for the package it asks for.
ROOT = Path(__file__).resolve().parent.parent
sys.path[:] = [entry for entry in sys.path if entry and Path(entry).resolve() != ROOT]

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

TORCHVISION = find_spec("torchvision")
if TORCHVISION and torch.version.cuda is None:
    # PyPI's torchvision is linked to CUDA; beside a CPU torch its operators never register, and importing it fails for
    # want of these two, that of timm, open_clip and transformers too.
    libraries = Path(TORCHVISION.origin or "").parent.glob("_C*.so")
    if any(b"libtorch_cuda" in library.read_bytes() for library in libraries):
        for name in ("nms", "qnms"):
            schema = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            torch.library.define(f"torchvision::{name}", schema)

SEED = 0
torch.manual_seed(SEED)  # processes that share the tests must draw the same names for them
NO_GPU = "needs a CUDA device, and torch sees none"


def pytest_collection_modifyitems(items):
    """Tests marked gpu run by themselves where a CUDA device is."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason=NO_GPU))


def pytest_runtest_setup(item):
    """A test draws the same numbers whichever came before it."""
    torch.manual_seed(SEED)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    """Each device in turn: the CPU, and the GPU where there is one."""
    return torch.device(request.param)


def poisoned(allocate):
    """`allocate` with NaN in what it returns, when fastattn is the caller; the same while torch traces."""

    def allocate_poisoned(*args, **kwargs):
        tensor = allocate(*args, **kwargs)
        if torch.compiler.is_compiling():
            return tensor
        caller = sys._getframe(1).f_globals.get("__name__", "")
        floats = tensor.is_floating_point() or tensor.is_complex()
        if caller.startswith("fastattn") and floats and tensor.device.type != "meta":
            with torch.no_grad():
                tensor.fill_(float("nan"))
        return tensor

    allocate_poisoned.__wrapped__ = allocate
    return allocate_poisoned


ALLOCATORS = [
    (torch, "empty"),
    (torch, "empty_like"),
    (torch, "empty_strided"),
    (torch.Tensor, "new_empty"),
    (torch.Tensor, "new_empty_strided"),
]


@pytest.fixture(scope="session", autouse=True)
def poison_fresh_memory():
    """What fastattn allocates without filling holds NaN, so that an element it forgets to write shows in its result.

    Once for all tests: a compiled function remembers the allocator that it saw.
    """
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in ALLOCATORS:
            patch.setattr(owner, name, poisoned(getattr(owner, name)))
        yield


@pytest.fixture
def unfilled_memory(monkeypatch):
    """Fresh memory as it comes, for who times a call: to fill it takes longer than a small one."""
    for owner, name in ALLOCATORS:
        monkeypatch.setattr(owner, name, getattr(owner, name).__wrapped__)
