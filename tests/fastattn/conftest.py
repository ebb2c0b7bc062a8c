"""What tests share: who computed attention, whether two runs of a model agree, a library that is built."""

import socket

import pytest
import torch
from torch.overrides import _get_current_function_mode_stack

from fastattn import patch
from fastattn.building.cpu_library import LIBRARY
from fastattn.integrations.vision import swin
from fastattn.torch_api import mha, sdpa


@pytest.fixture
def calls(monkeypatch):
    """The backend asked for in each attention that fastattn computes through torch's functions or in Swin."""
    found = []
    for module in (mha, sdpa, swin):
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


@pytest.fixture
def library():
    """Loaded here, so that a new process has nothing to build."""
    reason = LIBRARY.prepare()
    if reason is not None:
        pytest.skip(reason)


@pytest.fixture
def nothing_patched():
    """Takes a patch that was installed away afterwards; the test has left every other one."""
    yield
    patch.uninstall()
    assert not _get_current_function_mode_stack()
