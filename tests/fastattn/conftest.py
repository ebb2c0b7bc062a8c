"""What the tests of the integrations share: who computed attention, and whether two runs of a model agree."""

import socket

import pytest
import torch

from fastattn.integrations.vision import swin
from fastattn.torch_api import mha, sdpa


@pytest.fixture
def calls(monkeypatch):
    """The room asked for in each attention that fastattn computes through torch's functions or in Swin."""
    found = []
    for module in (mha, sdpa, torchvision):
        attention = module.attention

        def noted(*args, attention=attention, **kwargs):
            found.append(kwargs["backend"])
            return attention(*args, **kwargs)

        monkeypatch.setattr(module, "attention", noted)
    return found


@pytest.fixture
def same():
    """Hold outputs and gradients, some of which may be None, against others."""

    def check(one, other):
        for a, b in zip(one, other, strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * max(1.0, b.abs().max().item()))

    return check


@pytest.fixture
def free_port():
    """A port of this machine that nobody listens on."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]
