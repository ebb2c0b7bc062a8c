"""The SDPA redirect: other libraries' code runs as it is, with its calls of torch's attention functions on fastattn.

Nothing of such a module is written anew: its class becomes a subclass that runs the same method under
`fastattn.patch`, so that its formula stays that of the library's installed version.
"""

from __future__ import annotations

import copy
import functools
import types
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn
from torch.overrides import TorchFunctionMode

from fastattn.integrations.exchange import exchange
from fastattn.integrations.report import ALREADY, Replacement

CALLS = frozenset({"scaled_dot_product_attention", "multi_head_attention_forward"})
"""What `patch` answers."""
OWN_WAY = frozenset({"softmax", "softmax_", "_softmax"})
"""What a formula of the module's own would call."""

Mode = Callable[[str | None], TorchFunctionMode]


class Request(NamedTuple):
    """What one call of `replace_attention` asks for: the mode that the modules' own code is to run under, the backend
    by name or None, and a list that grows: objects that were exchanged, which several modules may share.
    """

    mode: Mode
    backend: str | None
    done: list[Any]


def names_in(function: Callable[..., Any]) -> frozenset[str]:
    """Every name that a function's code, and the functions written inside it, load or call."""
    code = getattr(function, "__code__", None)
    found: set[str] = set()
    waiting = [code] if isinstance(code, types.CodeType) else []
    while waiting:
        one = waiting.pop()
        found.update(one.co_names)
        waiting += [const for const in one.co_consts if isinstance(const, types.CodeType)]
    return frozenset(found)


def names_reached(kind: type, method: str = "forward") -> frozenset[str]:
    """`names_in` of a method and of the methods of its class that are named in it, and so on."""
    found: set[str] = set()
    waiting = {method}
    while waiting:
        names = names_in(getattr(kind, waiting.pop()))
        waiting |= {name for name in names - found if isinstance(getattr(kind, name, None), types.FunctionType)}
        found |= names
    return frozenset(found)


class Redirected:
    """Base of the subclasses that `redirected` makes: copied, pickled and scripted as what they came from."""

    redirected_from: tuple[type, str, Mode, str | None]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        made: Any = super().__reduce_ex__(max(int(protocol), 2))
        return (_blank, self.redirected_from, *made[2:])

    def __prepare_scriptable__(self) -> Any:
        kind, _, _, backend = self.redirected_from
        if backend is not None:
            raise RuntimeError(
                f"{kind.__name__}: torch.jit.script is left to the library's own module, which has no backend= "
                f"(here {backend!r}); restore the model first, or use torch.jit.trace, torch.compile or torch.export"
            )
        original = copy.copy(self)
        original.__class__ = kind
        if isinstance(original, nn.Module):
            original.__dict__["_modules"] = dict(original._modules)
        return original


@functools.cache
def redirected(kind: Any, method: str, mode: Mode, backend: str | None) -> type:
    """The class whose `method` runs under `mode(backend)`; else `kind`, its name included."""
    original = getattr(kind, method)

    @functools.wraps(original)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        with mode(backend):
            return original(self, *args, **kwargs)

    members = {
        method: run,
        "redirected_from": (kind, method, mode, backend),
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
        "__doc__": kind.__doc__,
    }
    return type(kind.__name__, (Redirected, kind), members)


def already(
    where: tuple[str, str], thing: Redirected, backend: str | None
) -> tuple[Replacement, Callable[[], None] | None]:
    """The row for what is redirected already; it changes the backend where another one is asked for."""
    kind, method, mode, current = thing.redirected_from
    if backend is None or backend == current:
        return Replacement(*where, False, ALREADY), None
    back = exchange(thing, redirected(kind, method, mode, backend))
    return Replacement(*where, True, f"{ALREADY}, now on the backend {backend!r}"), back


def _blank(kind: type, method: str, mode: Mode, backend: str | None) -> Any:
    return object.__new__(redirected(kind, method, mode, backend))
