"""Scores beyond float32's range, in the CUDA forward: in the simulator, and on a Hopper GPU where there is one."""

import runpy
from pathlib import Path

import pytest
import torch

from fastattn import attention

rows = runpy.run_path(str(Path(__file__).parents[1] / "overflow.py"))
each_row = pytest.mark.parametrize("row", rows["ROWS"], ids=lambda row: row.id)
each_shape = pytest.mark.parametrize("shape", rows["SHAPES"])


def forward(*tensors, **named):
    with torch.no_grad():
        return attention(*tensors, backend="cuda", return_lse=True, **named)


@each_shape
@each_row
def test_one_answer_in_the_simulator(row, shape, backend, take):
    take(backend.library)
    rows["check"](row, forward, *rows["SHAPES"][shape], torch.bfloat16, gradients=False)


@pytest.mark.gpu
@pytest.mark.usefixtures("on_hopper")
@each_shape
@each_row
def test_one_answer_on_a_gpu(row, shape):
    rows["check"](row, forward, *rows["SHAPES"][shape], torch.bfloat16, "cuda", gradients=False)
