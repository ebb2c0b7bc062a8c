"""The process that runs kernels on a GPU, tried with the simulator's library in the place of nvcc's: what it hands
back, and that a kernel that fails or never ends takes no other call with it.
"""

import math
import os
import signal
from pathlib import Path

import pytest
import torch

from fastattn.testing import simulator


@pytest.fixture
def runner(runner_on):
    refused = simulator.why_not()
    if refused is not None:
        pytest.skip(refused)
    return runner_on("cpu")


@pytest.fixture
def numbers():
    return simulator.build(Path(__file__).parent / "kernels" / "numbers.cu")


def exp2(runner, library, **how):
    x, out = torch.randn(64), torch.full((64,), math.nan)
    said, after = runner(library, "numbers", [0, x, out, 64], **how)
    return said, after, x.exp2()


def test_tensors_come_back_as_the_kernel_leaves_them(runner, numbers):
    said, after, want = exp2(runner, numbers)
    assert said is None
    torch.testing.assert_close(after[2], want)


def test_a_call_that_never_ends_is_named_and_the_next_one_runs(runner, numbers):
    assert exp2(runner, numbers)[0] is None
    os.kill(runner._process.pid, signal.SIGSTOP)
    said, _, _ = exp2(runner, numbers, within=0.5)
    assert said == "it hangs: no end within 0.5 s"
    assert exp2(runner, numbers)[0] is None


def test_a_call_that_fails_is_named_and_the_next_one_runs(runner, numbers):
    said, _ = runner(numbers, "nothing_of_that_name", [])
    assert "AttributeError" in said and "run_nothing_of_that_name" in said
    assert exp2(runner, numbers)[0] is None


def test_a_process_that_dies_is_named_and_the_next_call_runs(runner, numbers):
    assert exp2(runner, numbers)[0] is None
    os.kill(runner._process.pid, signal.SIGKILL)
    runner._process.wait()
    said, _, _ = exp2(runner, numbers)
    assert "ended with -9" in said
    assert exp2(runner, numbers)[0] is None
