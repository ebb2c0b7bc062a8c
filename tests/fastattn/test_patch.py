"""patch(): which backend computes, wherever torch runs Python code inside itself, and what is computed again there."""

import asyncio
import copy
import inspect
import pickle
import threading
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.functional import scaled_dot_product_attention as by_name
from torch.overrides import _get_current_function_mode_stack as modes
from torch.utils.checkpoint import checkpoint, checkpoint_sequential, create_selective_checkpoint_contexts

from fastattn import patch
from fastattn.integrations.torch import patching

Q = torch.randn(1, 2, 9, 8, generator=torch.Generator().manual_seed(3))
OURS, TORCHS = ["reference"], []


@pytest.fixture(autouse=True)
def clean():
    yield
    patch.uninstall()
    assert not modes()


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


# --- the decorator


def noted(calls):
    by_name(Q, Q, Q)
    return len(calls)


def test_a_decorated_generator(calls):
    done = []

    @patch("reference")
    def steps(first):
        """Steps."""
        try:
            got = yield noted(calls), first
            try:
                yield noted(calls), got
            except KeyError:
                yield noted(calls), "caught"
            return "end"
        finally:
            by_name(Q, Q, Q)
            done.append(len(calls))

    assert inspect.isgeneratorfunction(steps) and steps.__doc__ == "Steps." and steps.__name__ == "steps"
    run = steps(7)
    assert not calls and next(run) == (1, 7)
    by_name(Q, Q, Q)
    assert calls == OURS and not modes()
    assert run.send("sent") == (2, "sent")
    assert run.throw(KeyError()) == (3, "caught")
    with pytest.raises(StopIteration) as end:
        next(run)
    assert end.value.value == "end" and done == [4] and not modes()

    run = steps(0)
    next(run)
    run.close()
    assert done == [4, 6]
    run = steps(0)
    next(run)
    with pytest.raises(ValueError, match="mine"):
        run.throw(ValueError("mine"))
    assert done == [4, 6, 8] and not modes() and set(calls) == {"reference"}


def test_decorated_coroutines_of_one_loop(calls):
    """Two with other backends and one without, turn by turn."""

    async def steps():
        for _ in range(3):
            before = len(calls)
            by_name(Q, Q, Q)
            seen.append((asyncio.current_task().get_name(), calls[before:]))
            await asyncio.sleep(0)
        return "end"

    async def main():
        runs = {"none": steps(), "a": patch("reference")(steps)(), "b": patch()(steps)()}
        return await asyncio.gather(*(asyncio.create_task(run, name=name) for name, run in runs.items()))

    seen = []
    assert inspect.iscoroutinefunction(patch()(steps))
    assert asyncio.run(main()) == ["end"] * 3
    want = {"none": [], "a": ["reference"], "b": [None]}
    assert len(seen) == 9 and all(found == want[name] for name, found in seen)
    assert len({name for name, _ in seen[:3]}) == 3


def test_a_decorated_coroutine_that_fails_or_is_cancelled(calls):
    ended = []

    @patch("reference")
    async def waits():
        try:
            await asyncio.sleep(10)
        finally:
            by_name(Q, Q, Q)
            ended.append(len(calls))

    @patch("reference")
    async def fails():
        raise KeyError("mine")

    async def main():
        task = asyncio.create_task(waits())
        await asyncio.sleep(0)
        assert not modes()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        with pytest.raises(KeyError, match="mine"):
            await fails()

    asyncio.run(main())
    assert ended == [1] and calls == OURS and not modes()


def test_a_decorated_asynchronous_generator(calls):
    done = []

    @patch("reference")
    async def steps():
        try:
            got = yield noted(calls)
            await asyncio.sleep(0)
            try:
                yield noted(calls), got
            except KeyError:
                yield noted(calls), "caught"
        finally:
            by_name(Q, Q, Q)
            done.append(len(calls))

    async def main():
        run = steps()
        assert await run.__anext__() == 1
        by_name(Q, Q, Q)
        assert calls == OURS and not modes()
        assert await run.asend("sent") == (2, "sent")
        assert await run.athrow(KeyError()) == (3, "caught")
        with pytest.raises(StopAsyncIteration):
            await run.__anext__()
        assert done == [4]
        run = steps()
        await run.__anext__()
        await run.aclose()
        assert done == [4, 6]
        assert [found async for found in steps()] == [7, (8, None)]
        run = steps()
        await run.__anext__()
        with pytest.raises(ValueError, match="mine"):
            await run.athrow(ValueError("mine"))

    assert inspect.isasyncgenfunction(steps)
    asyncio.run(main())
    assert set(calls) == {"reference"} and not modes()


def test_what_cannot_be_decorated_is_refused():
    with pytest.raises(TypeError, match=r"takes functions, .* got the class Block; decorate the methods"):
        patch()(Block)
    for given, name in ((staticmethod(attend), "staticmethod"), (classmethod(attend), "classmethod"), (3, "int"),
                        (None, "NoneType")):  # fmt: skip
        with pytest.raises(TypeError, match=f"takes functions, .* got {name}; decorate the methods"):
            patch()(given)


def test_decorated_methods(calls):
    """What the sentence says would work."""

    class Model(nn.Module):
        @patch("reference")
        def forward(self, q):
            return self.static(q) + self.whole(q)

        @staticmethod
        @patch("reference")
        def static(q):
            return by_name(q, q, q)

        @classmethod
        @patch("reference")
        def whole(cls, q):
            return by_name(q, q, q)

    want = 2 * by_name(Q, Q, Q)
    torch.testing.assert_close(Model()(Q), want)
    torch.testing.assert_close(Model.static(Q) + Model.whole(Q), want)
    torch.testing.assert_close(patch("reference")(Block())(Q).shape, Q.shape)  # an object that is called
    assert calls == OURS * 5


def test_failures_leave_nothing_behind(calls):
    q = Q.clone().requires_grad_()

    def fails(*_):
        raise KeyError("mine")

    with patch("reference"):
        for wrap in (lambda q: q * 2, lambda q: checkpoint(attend, q, use_reentrant=False)):
            out = wrap(q)
            out.register_hook(fails)
            with pytest.raises(KeyError, match="mine"):
                out.sum().backward()
            assert len(modes()) == 1

        class Fails(torch.autograd.Function):
            forward = staticmethod(lambda ctx, q: q.clone())
            backward = staticmethod(fails)

        out = Fails.apply(q)
    for around in (patch(), torch.device("cpu")):
        with around, pytest.raises(KeyError, match="mine"):
            before = modes()
            try:
                out.sum().backward()
            finally:
                assert modes() == before


# --- everywhere


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
        twin = pickle.loads(pickle.dumps(copy.deepcopy(module)))
    assert torch.equal(twin.act, module.act)


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
