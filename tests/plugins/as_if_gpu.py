"""A pytest plugin (`-p as_if_gpu`, with this folder on the path) under which tests marked gpu run where no GPU is: the
simulator is in the place of what nvcc makes, and tensors stay on the CPU. It tries their Python, which nothing else
runs here.
"""

import torch

torch.cuda.is_available = lambda: True
torch.cuda.get_device_capability = lambda *_: (9, 0)
torch.cuda.device_count = lambda: 1
torch.cuda.synchronize = lambda *_: None


def pytest_collection_finish(session):
    for plugin in session.config.pluginmanager.get_plugins():
        if hasattr(plugin, "ON_GPU"):
            of_wrappers(plugin)
        if hasattr(plugin, "simulated") and hasattr(plugin, "take_cpu_tensors"):
            of_the_backend(plugin)
    for item in session.items:
        item.module.DEVICE = "cpu"


def of_wrappers(conftest):
    """tests/sim: the process that runs kernels gets the simulator's libraries."""
    from fastattn.testing import simulator

    class Runner(conftest.ON_GPU["Runner"]):
        def __init__(self, device):
            super().__init__("cpu")

    conftest.ON_GPU["Runner"] = Runner
    conftest.compiled = lambda name: (simulator.build(conftest.KERNELS / f"{name}.cu"), "")


def of_the_backend(conftest):
    """tests/cuda: the backend takes tensors on the CPU, and its library is the simulator's. Triton's backward is its
    interpreter's, which TRITON_INTERPRET=1 must have asked for.
    """
    conftest.take_cpu_tensors(setattr, conftest.simulated("plain").library)
    conftest.choose_as_on_hopper(setattr)
    empty = torch.empty

    def on_cpu(*shape, device=None, **how):
        return empty(*shape, device="cpu" if device == "cuda" else device, **how)

    torch.empty = on_cpu
