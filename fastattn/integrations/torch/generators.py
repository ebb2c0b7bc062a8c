"""Generators and coroutines decorated with a mode: on while they run, and off while others do."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

Mode = AbstractContextManager[Any]


def decorated(mode: Mode, function: Any) -> Any:
    """A function that is run step by step, each step under the mode; None for one that is called once."""
    if inspect.isasyncgenfunction(function):

        @functools.wraps(function)
        async def each(*args: Any, **kwargs: Any) -> Any:
            run = function(*args, **kwargs)
            send: Any = run.asend(None)
            try:
                while True:
                    try:
                        found = await _awaited(mode, send)
                    except StopAsyncIteration:
                        return
                    try:
                        send = run.asend((yield found))
                    except GeneratorExit:
                        raise
                    except BaseException as failure:
                        send = run.athrow(failure)
            finally:
                await _awaited(mode, run.aclose())

        return each
    if inspect.iscoroutinefunction(function):

        @functools.wraps(function)
        async def whole(*args: Any, **kwargs: Any) -> Any:
            return await _awaited(mode, function(*args, **kwargs))

        return whole
    if inspect.isgeneratorfunction(function):

        @functools.wraps(function)
        def some(*args: Any, **kwargs: Any) -> Any:
            return (yield from _steps(mode, function(*args, **kwargs)))

        return some
    return None


def _steps(mode: Mode, run: Any) -> Iterator[Any]:
    """`yield from run`, with `run` under the mode and whoever waits for it outside (PEP 380 says what that is)."""
    step: Any = run.send
    given: tuple[Any, ...] = (None,)
    while True:
        try:
            with mode:
                found = step(*given)
        except StopIteration as end:
            return end.value
        try:
            step, given = run.send, ((yield found),)
        except GeneratorExit:
            with mode:
                run.close()
            raise
        except BaseException as failure:
            step, given = run.throw, (failure,)


_awaited: Any = types.coroutine(_steps)
