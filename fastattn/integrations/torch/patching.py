"""`fastattn.patch`: torch's attention functions computed by fastattn, within a block or everywhere."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from contextlib import ContextDecorator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fastattn import dispatch, process
from fastattn.integrations.torch.generators import decorated
from fastattn.integrations.torch.recording import Choice, Everywhere, follow, unchecked
from fastattn.torch_api import mha, sdpa

__all__ = ["patch"]

# Under the same name an earlier import may have put ours in its place, before this one looked.
mha.TORCH_MHA = process.once(mha.TORCH_MHA)

RUNS_YOURS = frozenset(
    {Tensor.backward, torch.autograd.backward, torch.autograd.grad, F.triplet_margin_with_distance_loss}
)
"""Torch functions that a mode sees and that run their caller's Python code: hooks, a distance."""


class patch(ContextDecorator, Choice):
    """`with fastattn.patch():` runs torch's attention functions on fastattn, in code that need not know of it.

    `F.scaled_dot_product_attention` and `F.multi_head_attention_forward` called within, by whatever name they were
    imported, are computed by fastattn; so are `nn.MultiheadAttention` and the Transformer layers, whose C++ paths torch
    switches off under such a mode. Of nested patches the innermost counts. What `torch.compile` made takes the mode in
    when it is called within.

    A backward called within runs its hooks within. What a checkpoint or a custom `autograd.Function` computes in its
    backward is computed as its forward was recorded: under this patch, with its backend, also after the block has
    ended, and by torch where it was recorded outside of any.

    Also a decorator, of functions, generators, `async def` and asynchronous generators; of the latter three each step
    runs within, and what comes between does not. A `with` block that yields or awaits stays on in between, as it is the
    thread's: decorate those. Other threads, custom operators written in Python, and what `torch.cond` and its kin call
    are not affected; `patch.install()` reaches them.

    Args:
        backend: the backend that runs them, by name; None takes the first that can.

    Raises:
        ValueError: an unknown backend.
    """

    def __init__(self, backend: str | None = None) -> None:
        super().__init__()
        dispatch.requested(backend)
        follow(Torchs)
        self.backend = backend

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is sdpa.TORCH_SDPA or func is scaled_dot_product_attention:
            return sdpa.route(*args, **kwargs, backend=self.backend)
        if func is mha.TORCH_MHA or func is multi_head_attention_forward:
            return mha.forward(*args, **kwargs, backend=self.backend)
        return _called(self, func, types, args, kwargs)

    def __call__(self, function: Any) -> Any:
        """The function, with everything in it within the patch.

        Raises:
            TypeError: a class, a static or class method, or what cannot be called.
        """
        if isinstance(function, (type, staticmethod, classmethod)) or not callable(function):
            what = f"the class {function.__qualname__}" if isinstance(function, type) else f"{type(function).__name__}"
            raise TypeError(
                f"patch: as a decorator it takes functions, as what it gives back is one, got {what}; decorate the "
                "methods that compute attention (below @staticmethod and @classmethod), or use `with fastattn.patch():`"
            )
        return decorated(self, function) or super().__call__(function)

    @staticmethod
    def install(backend: str | None = None) -> None:
        """Let fastattn compute torch's attention functions everywhere: in every thread, hook and custom operator.

        `F.scaled_dot_product_attention` and `F.multi_head_attention_forward` are replaced, in `torch.nn.functional` and
        wherever a loaded module holds them by a name of its own; torch's C++ path of `nn.MultiheadAttention` and the
        Transformer layers is switched off. A torch function kept elsewhere (in a default argument, a closure, an
        object's attribute) stays torch's: a `with patch():` around reaches it. Within a `with patch(...)` that one
        counts. Other torch calls do not see it. A second call changes the backend; from another import of fastattn in
        this process it takes over, and that import's code computes.

        Args:
            backend: the backend that runs them, by name; None takes the first that can.

        Raises:
            ValueError: an unknown backend.
            RuntimeError: somebody else has replaced torch's functions.
        """
        choice = patch(backend)
        if Everywhere.choice is None:
            for name, torchs in (("scaled_dot_product_attention", sdpa.TORCH_SDPA),
                                 ("multi_head_attention_forward", mha.TORCH_MHA)):  # fmt: skip
                found = getattr(F, name)
                if found is not torchs:
                    raise RuntimeError(
                        f"patch.install: torch.nn.functional.{name} is not torch's own any more but "
                        f"{getattr(found, '__module__', '')}.{getattr(found, '__qualname__', found)}; install before "
                        "it is replaced, or use `with fastattn.patch():`, which needs no replacing"
                    )
            _rename(sdpa.TORCH_SDPA, scaled_dot_product_attention)
            _rename(mha.TORCH_MHA, multi_head_attention_forward)
            Everywhere.fastpath = torch.backends.mha.get_fastpath_enabled()
            torch.backends.mha.set_fastpath_enabled(False)
        Everywhere.choice = choice

    @staticmethod
    def uninstall() -> None:
        """Undo `install`, whichever import of fastattn called it. A second call does nothing.

        What was recorded meanwhile is computed again with fastattn. torch's C++ path is as it was before, or stays on
        where `torch.backends.mha.set_fastpath_enabled(True)` was called meanwhile.
        """
        if Everywhere.choice is None:
            return
        Everywhere.choice = None
        _rename(scaled_dot_product_attention, sdpa.TORCH_SDPA)
        _rename(multi_head_attention_forward, mha.TORCH_MHA)
        if not torch.backends.mha.get_fastpath_enabled():  # as `install` left it
            torch.backends.mha.set_fastpath_enabled(Everywhere.fastpath)

    def _sdpa(self, *args: Any, **kwargs: Any) -> Tensor:
        return sdpa.route(*args, **kwargs, backend=self.backend, name=scaled_dot_product_attention)

    def _mha(self, *args: Any, **kwargs: Any) -> Any:
        given = (*args, *kwargs.values())
        if torch.overrides.has_torch_function(given):
            return sdpa.overridden(multi_head_attention_forward, mha.TORCH_MHA, given, args, kwargs)
        return mha.forward(*args, **kwargs, backend=self.backend)


class Torchs(Choice):
    """Attention as torch computes it, also where `patch.install` has replaced it."""

    def decides(self) -> None:
        return None

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is scaled_dot_product_attention:
            return sdpa.TORCH_SDPA(*args, **kwargs)
        if func is multi_head_attention_forward or func is mha.TORCH_MHA:
            with self:  # it calls the other one, by its replaced name
                return unchecked(mha.TORCH_MHA)(*args, **kwargs)
        return _called(self, func, types, args, kwargs)


def _called(mode: Choice, func: Any, kinds: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A torch function that is not attention, with its caller's code under the mode."""
    if func in RUNS_YOURS and not any(map(_overrides, kinds)) and not torch.compiler.is_compiling():
        subclasses = [kind for kind in kinds if kind is not Tensor]
        with mode:
            if subclasses:  # torch's rule for subclasses that override nothing
                return subclasses[0].__torch_function__(unchecked(func), kinds, args, kwargs)
            return unchecked(func)(*args, **kwargs)
    if func is checkpoint:  # compilers take it for a torch function

        def within(*given: Any, **named: Any) -> Any:
            with mode:
                return args[0](*given, **named)

        return func(within, *args[1:], **kwargs)
    return func(*args, **kwargs)


def _overrides(kind: type) -> bool:
    """Whether a class has a __torch_function__ of its own."""
    return not issubclass(kind, Tensor) or sdpa._overrides_itself(kind)


@process.once
def scaled_dot_product_attention(*args: Any, **kwargs: Any) -> Any:
    """What stands in torch's place while `patch.install` holds; torch's own once it does not."""
    choice = Everywhere.choice
    if choice is None:
        return sdpa.TORCH_SDPA(*args, **kwargs)
    return choice._sdpa(*args, **kwargs)


@process.once
def multi_head_attention_forward(*args: Any, **kwargs: Any) -> Any:
    """What stands in torch's place while `patch.install` holds; torch's own once it does not."""
    choice = Everywhere.choice
    if choice is None:
        return mha.TORCH_MHA(*args, **kwargs)
    return choice._mha(*args, **kwargs)


for _ours in (scaled_dot_product_attention, multi_head_attention_forward):
    _ours.__module__ = F.__name__  # where pickle finds it, or torch's own


def _rename(held: Any, instead: Any) -> None:
    """Exchange a function in `torch.nn.functional` and under the names that other libraries have imported it by."""
    for module in list(sys.modules.values()):
        if not isinstance(module, types.ModuleType):
            continue
        if module is not F and module.__name__.split(".")[0] in ("torch", "fastattn"):
            continue
        for name, value in list(vars(module).items()):
            if value is held:
                setattr(module, name, instead)
