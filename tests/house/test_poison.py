"""The poison itself: what fastattn allocates holds NaN while the tests run, and nothing else does."""

import pytest
import torch

ALLOCATIONS = {
    "empty": "torch.empty(3, 2, device=like.device)",
    "empty_like": "torch.empty_like(like)",
    "empty_strided": "torch.empty_strided((3, 2), (1, 3), device=like.device)",
    "new_empty": "like.new_empty(3, 2)",
    "new_empty_strided": "like.new_empty_strided((3, 2), (1, 3))",
}


def allocated(expression, module, like):
    """What a function of that module gets."""
    scope = {"__name__": module, "torch": torch}
    exec(f"def allocate(like):\n    return {expression}", scope)
    return scope["allocate"](like)


@pytest.mark.parametrize("name", ALLOCATIONS)
def test_memory_that_fastattn_asks_for_is_poisoned(name, device):
    like = torch.zeros(3, 2, device=device)
    assert allocated(ALLOCATIONS[name], "fastattn.kernels.some", like).isnan().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.complex64], ids=str)
def test_every_floating_dtype_is_poisoned(dtype):
    assert allocated("torch.empty_like(like)", "fastattn.some", torch.zeros(5, dtype=dtype)).isnan().all()


def test_integers_are_allocated_as_ever():
    assert allocated("torch.empty_like(like)", "fastattn.some", torch.zeros(5, dtype=torch.int32)).dtype == torch.int32


def test_memory_that_others_ask_for_is_left_alone(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "fill_", None)
    assert allocated("torch.empty_like(like)", "somebody.elses", torch.zeros(5)).shape == (5,)
