"""patch.install(): torch's attention functions replaced everywhere, and put back."""

import copy
import pickle
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.functional import scaled_dot_product_attention as by_name
from torch.utils.checkpoint import checkpoint

from fastattn import patch
from fastattn.integrations.torch import patching

Q = torch.randn(1, 2, 9, 8, generator=torch.Generator().manual_seed(3))
OURS = ["reference"]
pytestmark = pytest.mark.usefixtures("nothing_patched")


def attend(q):
    return F.scaled_dot_product_attention(q, q, q, dropout_p=0.3)


def in_a_thread(function):
    found = []
    thread = threading.Thread(target=lambda: found.append(function()))
    thread.start(), thread.join()
    return found[0]


def test_installed_reaches_threads_hooks_and_operators(calls):
    @torch.library.custom_op("fastattn_tests::attend", mutates_args=())
    def attend_op(q: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, q, q).clone()

    want = F.scaled_dot_product_attention(Q, Q, Q)
    torchs = F.scaled_dot_product_attention, F.multi_head_attention_forward, by_name
    assert patch.install("reference") is None
    runs = {
        "here": lambda: F.scaled_dot_product_attention(Q, Q, Q),
        "by a name of its own": lambda: by_name(Q, Q, Q),
        "in a thread": lambda: in_a_thread(lambda: F.scaled_dot_product_attention(Q, Q, Q)),
        "in an operator": lambda: attend_op(Q),
        "under another mode": lambda: under_device(),
    }

    def under_device():
        with torch.device("cpu"):
            return F.scaled_dot_product_attention(Q, Q, Q)

    for name, run in runs.items():
        del calls[:]
        torch.testing.assert_close(run(), want)
        assert calls == OURS, name
    del calls[:]
    with patch():
        by_name(Q, Q, Q), F.scaled_dot_product_attention(Q, Q, Q), torch._C._nn.scaled_dot_product_attention(Q, Q, Q)
    assert calls == [None] * 3
    patch.install()  # another backend
    F.scaled_dot_product_attention(Q, Q, Q)
    assert calls[3:] == [None]
    held = F.scaled_dot_product_attention
    patch.uninstall(), patch.uninstall()
    assert (F.scaled_dot_product_attention, F.multi_head_attention_forward, by_name) == torchs
    del calls[:]
    assert all(torch.equal(run(), want) for run in runs.values())
    assert torch.equal(held(Q, Q, Q), want)  # what kept it has torch's own again
    assert not calls


@pytest.mark.parametrize("mode", ["train", "eval", "eval, no grad"])
def test_installed_reaches_the_modules(mode, calls):
    layer = nn.TransformerEncoderLayer(24, 4, 32, dropout=0.0, batch_first=True).train(mode == "train")
    x = torch.randn(2, 5, 24)
    before = torch.backends.mha.get_fastpath_enabled()
    with torch.set_grad_enabled(mode != "eval, no grad"):
        want = layer(x)
        patch.install()
        torch.testing.assert_close(layer(x), want, rtol=1e-4, atol=1e-5)
        assert calls == [None]
        with patch("reference"):
            layer(x)
        assert calls == [None, "reference"]
        q = layer(x).sum()
        patch.uninstall()
        assert torch.equal(layer(x), want) and len(calls) == 3 and q.ndim == 0
    assert torch.backends.mha.get_fastpath_enabled() == before


@pytest.mark.parametrize("meanwhile", [None, True, False])
@pytest.mark.parametrize("before", [True, False])
def test_uninstall_keeps_the_fast_path_that_was_asked_for(before, meanwhile):
    found = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(before)
        patch.install()
        assert not torch.backends.mha.get_fastpath_enabled()
        if meanwhile is not None:
            torch.backends.mha.set_fastpath_enabled(meanwhile)
        patch.uninstall()
        assert torch.backends.mha.get_fastpath_enabled() is (before or meanwhile is True)
    finally:
        torch.backends.mha.set_fastpath_enabled(found)


def test_torchs_modules_recorded_before_are_computed_again_by_torch(calls):
    module = nn.MultiheadAttention(24, 4, dropout=0.3)
    x = torch.randn(5, 2, 24)
    grads = []
    for wrap in (lambda f, x: f(x), lambda f, x: checkpoint(f, x, use_reentrant=False)):
        q = x.clone().requires_grad_()
        torch.manual_seed(0)
        out = wrap(lambda q: module(q, q, q)[0], q)
        patch.install()
        grads.append(torch.autograd.grad(out.pow(2).sum(), q)[0])
        patch.uninstall()
    assert torch.equal(*grads) and not calls


def test_installed_pickles_and_copies(calls):
    patch.install("reference")
    held = F.scaled_dot_product_attention
    assert pickle.loads(pickle.dumps(held)) is copy.deepcopy(held) is held
    kept = pickle.dumps([held, F.multi_head_attention_forward])
    patch.uninstall()
    assert pickle.loads(kept) == [F.scaled_dot_product_attention, F.multi_head_attention_forward]
    q = Q.clone().requires_grad_()
    with patch("reference"):
        module = nn.Linear(2, 2)
        module.act = checkpoint(attend, q, use_reentrant=False).detach()
        copied = pickle.loads(pickle.dumps(copy.deepcopy(module)))
    assert torch.equal(copied.act, module.act)


def test_installed_and_compiled(calls):
    want = by_name(Q, Q, Q)
    torch._dynamo.reset()
    compiled = torch.compile(lambda q: F.scaled_dot_product_attention(q, q, q), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(Q), want)
    assert not calls
    patch.install("reference")
    torch.testing.assert_close(compiled(Q), want)
    assert set(calls) == {"reference"}
    patch.uninstall()
    del calls[:]
    assert torch.equal(compiled(Q), want) and not calls
    torch._dynamo.reset()


def test_install_says_why_not(monkeypatch):
    with pytest.raises(ValueError, match="nearest: 'triton'"):
        patch.install("tritn")
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *args: None)
    with pytest.raises(RuntimeError, match=r"scaled_dot_product_attention is not torch's own any more but .*lambda"):
        patch.install()
    assert F.multi_head_attention_forward is patching.mha.TORCH_MHA


def test_other_names_of_torchs_private_parts_are_there():
    """What checkpoints are followed by; a torch that has others warns instead (recording.py)."""
    import torch.utils.checkpoint as module

    assert isinstance(module._CheckpointFrame, type) and isinstance(module._recomputation_hook, type)
    assert callable(torch.autograd.function.BackwardCFunction.apply)
