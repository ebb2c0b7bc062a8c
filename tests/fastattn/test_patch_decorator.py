"""patch() as a decorator: of generators, coroutines and methods; and what a failure within leaves behind."""

import asyncio
import inspect

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.functional import scaled_dot_product_attention as by_name
from torch.overrides import _get_current_function_mode_stack as modes
from torch.utils.checkpoint import checkpoint

from fastattn import patch

Q = torch.randn(1, 2, 9, 8, generator=torch.Generator().manual_seed(3))
OURS = ["reference"]
pytestmark = pytest.mark.usefixtures("nothing_patched")


def attend(q):
    return F.scaled_dot_product_attention(q, q, q, dropout_p=0.3)


class Block(nn.Module):
    def forward(self, q):
        return attend(q)


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
