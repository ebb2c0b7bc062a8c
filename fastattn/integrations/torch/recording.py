"""Which attention a graph was recorded with, so that what the backward computes again is computed the same way.

A checkpoint and a custom autograd function compute in their backward, which torch may run on a thread of its own, after
a `patch` has ended or within one that came later. So each keeps what was in force when it was recorded: a `patch`, or
None for torch's own attention. What was recorded before there was any patch holds nothing, which says the same.

Where fastattn is imported again, the first import's classes and hooks serve every import.
"""

from __future__ import annotations

import functools
import types
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.utils.checkpoint
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack, _pop_mode, _push_mode

from fastattn import process

HELD = "_fastattn_recorded_with"
"""The attribute of an autograd function's context or a checkpoint's frame: what was in force."""
_modes = torch._C._len_torch_function_stack


@process.once
class Choice(TorchFunctionMode):
    """A mode that decides who computes attention; the innermost one counts."""

    def decides(self) -> Choice | None:
        """What is in force within: itself, or None for torch's own."""
        return self

    def _sdpa(self, *args: Any, **kwargs: Any) -> Any:
        """torch's scaled_dot_product_attention as this choice computes it, where it holds everywhere."""
        raise NotImplementedError

    def _mha(self, *args: Any, **kwargs: Any) -> Any:
        """torch's multi_head_attention_forward, likewise."""
        raise NotImplementedError


@process.once
class Everywhere:
    """What is so in every thread, and for every import of fastattn."""

    choice: Choice | None = None
    """What is in force where no mode decides."""
    fastpath: bool = True
    """Whether torch's C++ path of its attention modules was on before there was a choice."""
    followed: bool = False
    """Whether `follow` has been called."""


def in_force() -> Choice | None:
    """What computes attention in this thread now, or None for torch's own."""
    if _modes():
        for mode in reversed(_get_current_function_mode_stack()):
            if isinstance(mode, Choice):
                return mode.decides()
    return Everywhere.choice


@contextmanager
def under(held: Choice | None, otherwise: Callable[[], Choice]) -> Iterator[None]:
    """Put what was recorded in force; `otherwise` makes the mode that stands for torch's own. Other modes stay."""
    before = _get_current_function_mode_stack()
    now = [mode for mode in before if not isinstance(mode, Choice)]
    now.append(otherwise() if held is None else held)
    _exchange(now)
    try:
        yield
    finally:
        _exchange(before)


def _exchange(modes: list[Any]) -> None:
    while _modes():
        _pop_mode()
    for mode in modes:
        _push_mode(mode)


def unchecked(function: Any) -> Callable[..., Any]:
    """A Python function of torch's that does not hand its call to a mode, but runs its own lines under it.

    Torch switches a mode off while the mode handles a call, and everything that the call runs with it: hooks, too.
    """
    names = dict.fromkeys(
        ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic"), lambda *_: False
    )
    copy = types.FunctionType(
        function.__code__, {**function.__globals__, **names}, function.__name__, function.__defaults__,
        function.__closure__,
    )  # fmt: skip
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def follow(otherwise: Callable[[], Choice]) -> None:
    """Let autograd functions and checkpoints keep what is in force. Once a process; it stays."""
    if Everywhere.followed:
        return
    Everywhere.followed = True
    nodes = torch.autograd.function.BackwardCFunction

    def begin(self: Any, *args: Any, **kwargs: Any) -> None:  # torch makes a function's context where it is recorded
        super(nodes, self).__init__(*args, **kwargs)
        held = in_force()
        if held is not None:
            setattr(self, HELD, held)

    nodes.__init__ = begin  # type: ignore[method-assign]
    for name in ("apply", "apply_boxed"):  # what the engine calls
        if hasattr(nodes, name):
            setattr(nodes, name, _as_recorded(getattr(nodes, name), otherwise))
    _follow_checkpoints(otherwise)


# A compiler that comes across it runs it, and traces none of it; see tracing.functorch_active.
follow._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _as_recorded(backward: Callable[..., Any], otherwise: Callable[[], Choice]) -> Callable[..., Any]:
    @functools.wraps(backward)
    def run(self: Any, *args: Any) -> Any:
        held = getattr(self, HELD, None)
        if held is in_force():
            return backward(self, *args)
        with under(held, otherwise):
            return backward(self, *args)

    return run


def _follow_checkpoints(otherwise: Callable[[], Choice]) -> None:
    """torch.utils.checkpoint without reentrant autograd, which computes again where a saved tensor is unpacked."""
    frame, again = (getattr(torch.utils.checkpoint, name, None) for name in ("_CheckpointFrame", "_recomputation_hook"))
    if frame is None or again is None:
        warnings.warn(
            f"torch {torch.__version__} checkpoints in a way that fastattn does not know: with use_reentrant=False, "
            "call .backward() under the same fastattn.patch() as the forward, or under none as the forward",
            stacklevel=2,
        )
        return
    begin, enter, leave = frame.__init__, again.__enter__, again.__exit__
    start = again.__init__

    @functools.wraps(begin)
    def recorded(self: Any, *args: Any, **kwargs: Any) -> None:
        begin(self, *args, **kwargs)
        setattr(self, HELD, in_force())

    @functools.wraps(start)
    def about(self: Any, frame_reference: Any, *args: Any, **kwargs: Any) -> None:
        start(self, frame_reference, *args, **kwargs)
        setattr(self, HELD, getattr(frame_reference(), HELD, None))

    @functools.wraps(enter)
    def entered(self: Any) -> Any:
        self._fastattn_under = under(getattr(self, HELD), otherwise)
        self._fastattn_under.__enter__()
        return enter(self)

    @functools.wraps(leave)
    def left(self: Any, *failure: Any) -> Any:
        try:
            return leave(self, *failure)
        finally:
            self._fastattn_under.__exit__(None, None, None)

    frame.__init__, again.__init__, again.__enter__, again.__exit__ = recorded, about, entered, left
