"""A machine that says it has an H200, for a dry run of `make gpu` where no GPU is: the whole pipeline, in its own
processes, with the device "cuda". Nothing that it measures means anything.

    PYTHONPATH=$PWD/tests/plugins/stub_gpu PATH=$PWD/tests/plugins/stub_gpu:$PATH make gpu OUT=dry-run

Every Python with this folder on its path puts on the CPU what is asked for on "cuda"; the backends cuda and triton are
stood in for by the definition, and the benchmark's cells are small. Tests of this very machinery say more:

    STUB_GPU_FEW=1              a few checks, cells, and the tests of few_tests.py instead of the real ones
    STUB_GPU_LOG=file           a line for each call, check, cell and test that begins
    STUB_GPU_HANGS=a,b          those of them never end the first time, whose line has one of these words
"""

import dataclasses
import importlib.machinery
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace

FEW, LOG, HANGS = (os.environ.get(f"STUB_GPU_{name}") for name in ("FEW", "LOG", "HANGS"))
HERE = Path(__file__).resolve().parent
GIB = 2**30
SHORTER = 256
"""Times that a cell's lengths are divided by."""

CHECKS = ("one-by-one", "odd", "gqa")
SOON = 10.0
"""Seconds of silence that are waited for where something is meant to hang."""

os.environ.setdefault("TRITON_INTERPRET", "1")


def begins(what):
    """Into the log; for ever where it is to hang, and is there for the first time."""
    if not LOG:
        return
    known = Path(LOG).read_text().splitlines() if Path(LOG).exists() else []
    with open(LOG, "a") as file:
        file.write(f"{what}\n")
    if what not in known and any(word in what for word in (HANGS or "").split(",") if word):
        time.sleep(3600)


def of_torch(torch):
    from torch.overrides import TorchFunctionMode

    def here(device):
        asked = isinstance(device, (str, torch.device)) and str(device).startswith("cuda")
        return torch.device("cpu") if asked else device

    class OnCpu(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            if function is torch.device:  # the name stays
                return function(*args, **(kwargs or {}))
            if function is torch.Tensor.cuda:
                return args[0]
            kwargs = {name: here(value) if name == "device" else value for name, value in (kwargs or {}).items()}
            if function is torch.empty and kwargs.get("dtype") == torch.int8:
                args = (1,)  # what flushes a GPU's L2 cache takes its time here
            return function(*map(here, args), **kwargs)

    class Event:
        def __init__(self, **_):
            self.time = 0.0

        def record(self, *_):
            self.time = time.perf_counter()

        def synchronize(self):
            """All that was asked for is done."""

        def elapsed_time(self, end):
            return 1e3 * (end.time - self.time)

    gpu = SimpleNamespace(
        name="NVIDIA H200 stub", total_memory=141 * GIB, major=9, minor=0, multi_processor_count=132, L2_cache_size=1
    )
    answers = {
        "is_available": True, "device_count": 1, "current_device": 0, "get_device_capability": (9, 0),
        "get_device_properties": gpu, "mem_get_info": (130 * GIB, 141 * GIB), "memory_reserved": 0,
        "memory_allocated": 0, "max_memory_allocated": GIB, "reset_peak_memory_stats": None, "synchronize": None,
        "empty_cache": None, "is_initialized": False,
    }  # fmt: skip
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)
    torch.cuda.Event = Event
    OnCpu().__enter__()


def of_a_backend(module):
    """The definition stands in for kernels that need a GPU."""
    from fastattn import reference

    begun = []

    def forward(spec, inputs):
        if Path(sys.argv[0]).name == "smoke.py" and not begun:  # of its calls the first
            begun.append(True)
            begins(f"smoke {module.__name__}")
        return reference.forward(spec, inputs)

    def why_not(spec, *, by_name=False):
        return None if module.HAS_BACKWARD or not spec.needs_grad else "its backward does not exist yet"

    module.why_not = module.prepare = why_not
    module.forward = forward
    if module.HAS_BACKWARD:
        module.backward = reference.backward


def of_the_suite(module):
    whole = module.suite

    def shorter(length):
        return max(1, length // SHORTER)

    def suite(device):
        cells = {}
        for cell in whole(device):
            case, group = cell.case, cell.case.num_heads // cell.case.num_kv_heads
            window = None if case.window is None else shorter(case.window)
            small = dataclasses.replace(
                case, batch=1, num_heads=2 * group, num_kv_heads=2, q_len=shorter(case.q_len),
                kv_len=shorter(case.kv_len), window=window,
            )  # fmt: skip
            cells[dataclasses.replace(cell, case=small)] = None
        return list(cells)[: 3 if FEW else None]

    module.suite = suite


def of_the_cells(module):
    time_them = module.CaseRunner.run

    def run(self, rows):
        step = "flex" if any(row.provider == "flex" for row in rows) else "cell"
        begins(f"{step} {rows[0].name.rpartition('/')[0]}")
        time_them(self, rows)

    module.CaseRunner.run = run


def of_the_checks(module):
    make = module.make_inputs
    if FEW:
        for name in set(module.CASES) - set(CHECKS):
            del module.CASES[name]

    def make_inputs(case, *arguments, **more):
        if "check" in sys.argv:
            begins(f"check {case.id} by {sys.argv[sys.argv.index('--backends') + 1]}")
        return make(case, *arguments, **more)

    module.make_inputs = make_inputs


def of_the_tests(module):
    if FEW:
        few = (module.Selection((str(HERE / "few_tests.py"),), silence=SOON),)
        module.SELECTIONS["cuda"] = {"instructions": (), "tests": few, "sanitizers": ()}


def of_the_steps(module):
    if FEW:
        module.SILENCE = module.SMOKE_SILENCE = SOON


def of_the_times(module):
    module.headline = lambda device: module.suite(device)[: 2 if FEW else 6]
    if FEW:
        module.FLEX_CELLS["cuda"] = 1
        module.SILENCE = dict.fromkeys(module.SILENCE, SOON)


def of_nvcc(module):
    """A build of the CUDA library takes minutes."""
    if FEW:
        module.find_nvcc = lambda: module._find_nvcc(None, None, "")
        module.shutil = SimpleNamespace(which=lambda *_, **__: None)


def of_flex(module):
    if FEW:  # its compiler takes half a minute
        module.Flex.why_not = lambda self, workload, mode: "the stub does not compile"


AFTER = {
    "torch": of_torch,
    "fastattn.backends.cuda": of_a_backend,
    "fastattn.backends.triton": of_a_backend,
    "fastattn.building.nvcc": of_nvcc,
    "fastattn.testing": of_the_checks,
    "fastattn.bench.cases.suites": of_the_suite,
    "fastattn.bench.measure.run": of_the_cells,
    "fastattn.bench.measure.providers.flex": of_flex,
    "fastattn.bench.gpu.run_tests": of_the_tests,
    "fastattn.bench.gpu.cells": of_the_times,
    "fastattn.bench.gpu.steps": of_the_steps,
}


class Finder:
    """Finds what the others find, and has it changed once it is imported."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name not in AFTER:
            return None
        others = (finder.find_spec(name, path, target) for finder in sys.meta_path if finder is not Finder)
        spec = next(found for found in others if found is not None)
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            AFTER[name](module)

        if isinstance(spec.loader, importlib.machinery.SourceFileLoader):
            spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, Finder)
