"""Real architectures with random weights: fastattn's distance from the exact formula beside eager attention's own."""

import importlib.util

import pytest
import torch

from fastattn.models.compare import cases, compare
from fastattn.models.zoo import ZOO

ROWS = [
    pytest.param(model, case, id=f"{key}-{case.replace(', ', '-').replace(' ', '-')}")
    for key, model in ZOO.items()
    for case in cases(model)
]
DTYPES = (torch.float32, torch.bfloat16)


def needs(model):
    if importlib.util.find_spec(model.needs) is None:
        pytest.skip(f"needs {model.needs} (pip install 'fastattn[models]')")


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
@pytest.mark.parametrize("model, case", ROWS)
def test_a_model_is_as_exact_as_with_eager_attention(model, case, dtype):
    needs(model)
    found = compare(model, case, dtype)
    assert found.ok, found
    assert found.forward_eager > 0 and (found.gradient is None) == (found.gradient_eager is None)
    assert len(found.seen.masks) >= 1
    assert bool(found.seen.tables) == ("table" in model.masks)
    assert bool(found.seen.biases) == ("bias" in model.masks.replace("bias of one row", ""))


@pytest.mark.parametrize("key", ZOO)
def test_a_wrong_scale_is_noticed(key):
    """A hundredth off is far outside of the bound: the logits are no trivial ones."""
    needs(ZOO[key])
    assert not compare(ZOO[key], "eval", torch.float32, off=1.01).ok


@pytest.mark.parametrize("key", ZOO)
def test_two_runs_are_bit_equal(key):
    needs(ZOO[key])
    assert compare(ZOO[key], "train", torch.float32) == compare(ZOO[key], "train", torch.float32)
