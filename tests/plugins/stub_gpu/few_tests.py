"""A dry run's tests, in the place of a GPU's; one may hang."""

import pytest
import sitecustomize
import torch

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def logged(request):
    sitecustomize.begins(f"test {request.node.name}")


@pytest.mark.parametrize("number", range(3))
def test_right(number):
    assert torch.ones(2, device="cuda").sum() == 2


def test_that_may_hang():
    assert torch.cuda.get_device_capability() == (9, 0)


@pytest.mark.skip(reason="needs two GPUs")
def test_skipped():
    pass
