"""patch() and the backward: which backend computes in hooks, checkpoints and what else torch runs there."""

import threading
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.functional import scaled_dot_product_attention as by_name
from torch.utils.checkpoint import checkpoint, checkpoint_sequential, create_selective_checkpoint_contexts

from fastattn import patch

Q = torch.randn(1, 2, 9, 8, generator=torch.Generator().manual_seed(3))
OURS, TORCHS = ["reference"], []
pytestmark = pytest.mark.usefixtures("nothing_patched")


def attend(q):
    return F.scaled_dot_product_attention(q, q, q, dropout_p=0.3)


class Again(torch.autograd.Function):
    """A checkpoint of one's own: computes attention anew in its backward."""

    @staticmethod
    def forward(ctx, q):
        ctx.save_for_backward(q)
        ctx.state = torch.get_rng_state()
        return attend(q.detach())

    @staticmethod
    def backward(ctx, grad):
        (q,) = ctx.saved_tensors
        after = torch.get_rng_state()
        torch.set_rng_state(ctx.state)
        with torch.enable_grad():
            q = q.detach().requires_grad_()
            out = attend(q)
        torch.set_rng_state(after)
        return torch.autograd.grad(out, q, grad)


class AgainVjp(torch.autograd.Function):
    """The same, with setup_context and vjp."""

    @staticmethod
    def forward(q):
        state = torch.get_rng_state()
        return attend(q.detach()), state

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs, output[1])
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def vjp(ctx, grad, _):
        q, state = ctx.saved_tensors
        after = torch.get_rng_state()
        torch.set_rng_state(state)
        with torch.enable_grad():
            q = q.detach().requires_grad_()
            out = attend(q)
        torch.set_rng_state(after)
        return torch.autograd.grad(out, q, grad)[0]


def selective():
    return create_selective_checkpoint_contexts([torch.ops.aten.mm.default])


class Block(nn.Module):
    def forward(self, q):
        return attend(q)


WRAPS = {
    "not again": attend,
    "checkpoint, reentrant": lambda q: checkpoint(attend, q, use_reentrant=True),
    "checkpoint": lambda q: checkpoint(attend, q, use_reentrant=False),
    "checkpoint, no early stop": lambda q: checkpoint(attend, q, use_reentrant=False, early_stop=False),
    "checkpoint, selective": lambda q: checkpoint(attend, q, use_reentrant=False, context_fn=selective),
    "checkpoint in checkpoint": lambda q: checkpoint(
        lambda q: checkpoint(attend, q, use_reentrant=False), q, use_reentrant=False
    ),
    "reentrant in checkpoint": lambda q: checkpoint(
        lambda q: checkpoint(attend, q, use_reentrant=True), q, use_reentrant=False
    ),
    "sequential, reentrant": lambda q: checkpoint_sequential([Block(), nn.Identity()], 2, q, use_reentrant=True),
    "sequential": lambda q: checkpoint_sequential([Block(), nn.Identity()], 2, q, use_reentrant=False),
    "autograd.Function": Again.apply,
    "autograd.Function, vjp": lambda q: AgainVjp.apply(q)[0],
}


def backward(how, out, q):
    loss = out.pow(2).sum()
    if how == "loss.backward":
        loss.backward()
    elif how == "autograd.backward":
        torch.autograd.backward([loss])
    else:
        return torch.autograd.grad(loss, q)[0]
    return q.grad


def expected(ours):
    """The gradient where nothing is computed again, by fastattn or by torch."""
    q = Q.clone().requires_grad_()
    torch.manual_seed(0)
    if ours:
        with patch("reference"):
            out = attend(q)
    else:
        out = attend(q)
    return torch.autograd.grad(out.pow(2).sum(), q)[0]


HOW = ["loss.backward", "autograd.backward", "autograd.grad"]
# torch's reentrant checkpoint does not go with torch.autograd.grad
CALLS = [(name, how) for name in WRAPS for how in HOW if "reentrant" not in name or how != "autograd.grad"]


@pytest.mark.parametrize("where", ["inside", "outside", "under another", "installed since"])
@pytest.mark.parametrize("ours", [True, False], ids=["recorded inside", "recorded outside"])
@pytest.mark.parametrize(("name", "how"), CALLS)
def test_what_was_recorded_is_computed_again_alike(name, ours, where, how, calls):
    want = expected(ours)
    assert not torch.allclose(want, expected(not ours))
    del calls[:]
    q = Q.clone().requires_grad_()
    torch.manual_seed(0)
    first = patch("reference")
    if ours:
        with first:
            out = WRAPS[name](q)
            grad = backward(how, out, q) if where == "inside" else None
    else:
        out, grad = WRAPS[name](q), None
    if where == "inside" and not ours:
        with first:
            grad = backward(how, out, q)
    elif where == "outside":
        grad = backward(how, out, q)
    elif where == "under another":
        with patch():
            grad = backward(how, out, q)
    elif where == "installed since":
        patch.install()
        grad = backward(how, out, q)
    assert torch.equal(grad, want)
    assert set(calls) == ({"reference"} if ours else set())
    assert len(calls) >= (1 if name == "not again" else 2) * ours


@pytest.mark.parametrize("name", WRAPS)
def test_what_was_recorded_while_installed_is_computed_again_alike(name, calls):
    want = expected(True)
    q = Q.clone().requires_grad_()
    patch.install("reference")
    del calls[:]
    torch.manual_seed(0)
    out = WRAPS[name](q)
    patch.uninstall()
    assert torch.equal(backward("loss.backward", out, q), want)
    assert set(calls) == {"reference"}


KINDS = ["tensor", "tensor, accumulated", "node", "node, before", "module"]


# torch.autograd.grad accumulates nothing
@pytest.mark.parametrize(
    ("kind", "how"), [(kind, how) for kind in KINDS for how in HOW if "accumulated" not in kind or how != HOW[2]]
)
def test_hooks_of_a_backward_within(kind, how, calls):
    q, fired = Q.clone().requires_grad_(), []

    def hook(*_):
        fired.append(by_name(Q, Q, Q))

    module = nn.Identity()
    middle = module(q) * 2
    if kind == "tensor":
        middle.register_hook(hook)
    elif kind == "tensor, accumulated":
        q.register_post_accumulate_grad_hook(hook)
    elif kind == "node":
        middle.grad_fn.register_hook(hook)
    elif kind == "node, before":
        middle.grad_fn.register_prehook(hook)
    else:
        module.register_full_backward_hook(hook)
        middle = module(q.clone()) * 2
    with patch("reference"):
        backward(how, middle, q)
    assert len(fired) == 1 and calls == OURS
    del calls[:]


class Plain(torch.Tensor):
    """A subclass that overrides nothing."""


class Own(torch.Tensor):
    """One with a __torch_function__ of its own, whose business its backward is."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize(("kind", "want"), [(Plain, OURS), (type("Below", (Plain,), {}), OURS), (Own, TORCHS)],
                         ids=["plain", "of a plain one", "with its own"])  # fmt: skip
def test_hooks_where_the_loss_is_of_a_subclass(kind, want, how, calls):
    def run():
        q = Q.clone().requires_grad_()
        middle = q * 2
        middle.register_hook(lambda _: (fired.append(by_name(Q, Q, Q)), None)[1])
        return backward(how, middle.as_subclass(kind), q)

    fired = []
    torchs = run()
    with patch("reference"):
        ours = run()
    assert len(fired) == 2 and calls == want
    assert type(ours) is type(torchs) and torch.equal(ours, torchs)


def test_a_distance_function_runs_within_for_a_subclass(calls):
    one, other, third = (torch.randn(2, 3).as_subclass(Plain) for _ in range(3))

    def distance(one, other):
        by_name(Q, Q, Q)
        return (one - other).norm(dim=-1)

    def run():
        return F.triplet_margin_with_distance_loss(one, other, third, distance_function=distance)

    want = run()
    with patch("reference"):
        have = run()
    assert set(calls) == {"reference"} and type(have) is type(want) is Plain and torch.equal(have, want)


def test_saved_tensors_hooks(calls):
    """What docs/torch.md says: packing runs where torch records, within the handling of a call; unpacking does not."""
    seen = []

    def hook(name):
        def run(tensor):
            before = len(calls)
            by_name(Q, Q, Q)
            seen.append((name, len(calls) - before))
            return tensor

        return run

    q = Q.clone().requires_grad_()
    with patch("reference"), torch.autograd.graph.saved_tensors_hooks(hook("pack"), hook("unpack")):
        q.exp().sum().backward()
    assert seen == [("pack", 0), ("unpack", 1)]


def test_a_distance_function_runs_within(calls):
    def distance(one, other):
        by_name(Q, Q, Q)
        return (one - other).norm(dim=-1)

    with patch("reference"):
        F.triplet_margin_with_distance_loss(torch.randn(2, 3), torch.randn(2, 3), torch.randn(2, 3),
                                            distance_function=distance)  # fmt: skip
    assert set(calls) == {"reference"}


def test_second_derivatives_and_many_gradients(calls):
    q = Q.double().requires_grad_()
    plain_sdpa = partial(torch._scaled_dot_product_attention_math, dropout_p=0.0)

    def plain_of(q):
        return plain_sdpa(q, q, q)[0]

    with patch("reference"):
        out = checkpoint(lambda q: by_name(q, q, q), q, use_reentrant=False).sum()
        (first,) = torch.autograd.grad(out, q, create_graph=True)
        (second,) = torch.autograd.grad(first.pow(2).sum(), q)
        rows = torch.autograd.functional.jacobian(lambda q: by_name(q, q, q).sum((0, 1, 3)), q, vectorize=True)
    plain = torch.autograd.grad(plain_of(q).sum(), q, create_graph=True)[0]
    torch.testing.assert_close(first, plain)
    torch.testing.assert_close(second, torch.autograd.grad(plain.pow(2).sum(), q)[0])
    torch.testing.assert_close(rows, torch.autograd.functional.jacobian(lambda q: plain_of(q).sum((0, 1, 3)), q))
    assert set(calls) == {"reference"}


def test_functorch(calls):
    def loss(q):
        return by_name(q, q, q).pow(2).sum()

    want = torch.autograd.grad(loss(q := Q.clone().requires_grad_()), q)[0]
    with patch("reference"):
        torch.testing.assert_close(torch.func.grad(loss)(Q), want)
        many = torch.func.vmap(torch.func.grad(loss))(torch.stack([Q, 2 * Q]))
    torch.testing.assert_close(many[0], want)
    assert calls == OURS * 2


@pytest.mark.parametrize("where", ["inside", "outside"])
@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
@pytest.mark.parametrize("name", ["not again", "checkpoint", "checkpoint, reentrant"])
def test_compiled(name, compiler, where, calls):
    """Without dropout: compilers draw random numbers in an order of their own."""
    wrap = {"not again": lambda f, q: f(q), "checkpoint": lambda f, q: checkpoint(f, q, use_reentrant=False),
            "checkpoint, reentrant": lambda f, q: checkpoint(f, q, use_reentrant=True)}[name]  # fmt: skip

    def block(q):
        return F.scaled_dot_product_attention(q, q, q)

    q = Q.clone().requires_grad_()
    (want,) = torch.autograd.grad(block(q).pow(2).sum(), q)
    torch._dynamo.reset()
    compiled = torch.compile(lambda q: wrap(block, q), backend=compiler)
    with patch("reference"):
        out = compiled(q)
        if where == "inside":
            out.pow(2).sum().backward()
    if where == "outside":
        out.pow(2).sum().backward()
    torch.testing.assert_close(q.grad, want)
    assert set(calls) == {"reference"}
    torch._dynamo.reset()


def test_a_patch_inside_what_is_compiled(calls):
    @torch.compile(backend="eager", fullgraph=True)
    def run(q):
        with patch("reference"):
            return F.scaled_dot_product_attention(q, q, q)

    torch.testing.assert_close(run(Q), by_name(Q, Q, Q))
    assert set(calls) == {"reference"}
    torch._dynamo.reset()


@pytest.mark.parametrize("name", WRAPS)
def test_a_backward_on_another_thread(name, calls):
    want = expected(True)
    q = Q.clone().requires_grad_()
    del calls[:]
    torch.manual_seed(0)
    with patch("reference"):
        out = WRAPS[name](q)
    thread = threading.Thread(target=backward, args=("loss.backward", out, q))
    thread.start(), thread.join()
    assert torch.equal(q.grad, want) and set(calls) == {"reference"}


@pytest.mark.parametrize("name", WRAPS)
def test_the_innermost_counts_again(name, calls):
    q = Q.clone().requires_grad_()
    with patch("cpu"):
        with patch("reference"):
            out = WRAPS[name](q)
        out.pow(2).sum().backward()
    assert set(calls) == {"reference"}
