"""Which attention of a transformers model goes through transformers' interface; that put on fastattn, and the rest
named.
"""

from __future__ import annotations

import functools
import inspect
import sys
import types
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from fastattn import dispatch
from fastattn.integrations import left_alone, sdpa_redirect
from fastattn.integrations.exchange import InTurn, assign, exchange
from fastattn.integrations.report import ALREADY, Replacement
from fastattn.integrations.transformers.own_code import own_class

__all__ = ["NAME", "attending", "remember", "replace", "uses_interface"]

NAME = "fastattn"
"""What `attn_implementation` calls it."""

INTERFACE = "ALL_ATTENTION_FUNCTIONS"
"""transformers' table of attention functions: code that does not name it computes attention itself."""
OWN_CODE = (
    "its attention is code of its own, not behind transformers' interface: it keeps that, and eager attention's mask"
)


def replace(model: nn.Module, *, backend: str | None = None) -> tuple[list[Replacement], list[Callable[[], None]]]:
    """Let every transformers model in `model` compute its attention with fastattn, in place.

    A model with attention that goes through transformers' interface gets `set_attn_implementation("fastattn")`;
    attention modules with code of their own, where it is known here, get a subclass. Parameters, state_dict and hooks
    stay. Other attention with code of its own stays as it is, with the mask that it gets from eager attention.

    Args:
        model: any module with transformers models inside.
        backend: which runs them, by name; None takes the first that can.

    Returns:
        A row for each model, for each module of code that is known here, and for each whose attention is left to its
        own code; and functions that undo it, to be called last first.

    Raises:
        ValueError: an unknown backend.
    """
    from transformers import PreTrainedModel

    dispatch.requested(backend)
    rows: list[Replacement] = []
    undo: list[Callable[[], None]] = []
    outer: str | None = None
    for path, module in model.named_modules():
        if isinstance(module, PreTrainedModel) and (outer is None or not f"{path}.".startswith(outer)):
            outer = f"{path}." if path else ""
            rows.append(_set_implementation(path, module, backend, undo))
        kind = own_class(module)
        if kind is type(module):
            rows.append(_already(path, kind.__name__, module, backend))
        elif kind is not None:
            what = f"{kind.__name__}, the same around fastattn.attention"
            rows.append(Replacement(path, type(module).__name__, True, what))
            undo.append(exchange(module, kind))
    told = {row.path for row in rows if row.path}
    rows += [row for row in _left_alone(model) if row.path not in told]
    if backend is not None and any(row.changed for row in rows):
        undo.append(remember(model, "fastattn_backend", backend))
    return rows, undo


def remember(model: nn.Module, name: str, value: object) -> Callable[[], None]:
    """Set an attribute on every module, for the attention among them to read; returns what takes it away again."""
    return InTurn([assign(module, name, value) for module in model.modules()])


def attending(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The modules whose attention goes through transformers' interface, by path."""
    return [(path, module) for path, module in model.named_modules() if uses_interface(type(module))]


def uses_interface(kind: Any) -> bool:
    """Whether a class's forward, with the methods and functions of its file that it calls, asks transformers for the
    attention function.
    """
    names = _reached(kind)
    # Kosmos 2.5 takes attributes of the table, which has none, and so always eager attention.
    return INTERFACE in names and ("get_interface" in names or "getattr" not in names)


@functools.cache
def _reached(kind: Any) -> frozenset[str]:
    """Every name in a class's forward, in the methods that it names, and in the functions of its file that it names;
    not in the eager attention that it would hand to the interface.
    """
    found: set[str] = set()
    functions: set[Any] = set()
    waiting: list[Any] = [getattr(kind, "forward", None)]
    while waiting:
        function = inspect.unwrap(waiting.pop())
        if not isinstance(function, types.FunctionType) or function in functions:
            continue
        functions.add(function)
        names = sdpa_redirect.names_in(function)
        found |= names
        beside = vars(sys.modules.get(function.__module__, types))
        for name in names:
            waiting += [each for each in (getattr(kind, name, None),) if isinstance(each, types.FunctionType)]
            other = beside.get(name)
            if (
                isinstance(other, types.FunctionType)
                and other.__module__ == function.__module__
                and "eager" not in name
            ):
                waiting.append(other)
    return frozenset(found)


def _left_alone(model: nn.Module) -> list[Replacement]:
    """A row for each module of transformers' that computes attention and does not go through the interface."""
    rows: list[Replacement] = []
    inside = [
        path
        for path, module in model.named_modules()
        if uses_interface(type(module)) or own_class(module) or isinstance(module, nn.MultiheadAttention)
    ]
    for path, module in reversed(list(model.named_modules())):  # what lies inside comes first
        kind: Any = type(module)
        if not kind.__module__.startswith("transformers.") or any(each.startswith(f"{path}.") for each in inside):
            continue
        if path in inside or not path or not left_alone.seems_to_attend(module, _reached(kind)):
            continue
        inside.append(path)
        called = sorted(_reached(kind) & sdpa_redirect.CALLS)
        reached_by = f"; it calls {called[0]}, which fastattn.patch() catches" if called else ""
        rows.append(Replacement(path, kind.__name__, False, OWN_CODE + reached_by))
    return rows[::-1]


def _already(path: str, name: str, module: Any, backend: str | None) -> Replacement:
    """The row for what is on fastattn; changed where another backend is asked for."""
    moved = backend is not None and module.__dict__.get("fastattn_backend") != backend
    return Replacement(path, name, moved, f"{ALREADY}, now on the backend {backend!r}" if moved else ALREADY)


def _set_implementation(path: str, model: Any, backend: str | None, undo: list[Callable[[], None]]) -> Replacement:
    name, through = type(model).__name__, attending(model)
    if not through:
        return Replacement(path, name, False, "no attention in it goes through transformers' interface")
    if not model._can_set_attn_implementation():
        return Replacement(path, name, False, "transformers does not let the attention of this class be set")
    before, others = model.config._attn_implementation, _implementations(model)
    if before == NAME:
        return _already(path, name, model, backend)
    model.set_attn_implementation(NAME)
    undo.append(partial(_set_back, others))
    on = sum(getattr(getattr(each, "config", None), "_attn_implementation", None) == NAME for _, each in through)
    many = f"{on} of {len(through)}" if on < len(through) else str(on)
    what = f"attn_implementation {NAME!r} in place of {before!r}, which {many} modules inside compute with"
    return Replacement(path, name, True, what)


def _implementations(model: nn.Module) -> list[tuple[Any, str | None]]:
    """Each configuration inside a model, and the attention implementation that it names."""
    waiting: list[Any] = [module.config for module in model.modules() if hasattr(module, "config")]
    found: dict[int, tuple[Any, str | None]] = {}
    while waiting:
        config = waiting.pop()
        if id(config) in found or not hasattr(config, "_attn_implementation_internal"):
            continue
        found[id(config)] = config, config._attn_implementation_internal
        waiting += [getattr(config, name, None) for name in getattr(config, "sub_configs", ())]
    return list(found.values())


def _set_back(implementations: list[tuple[Any, str | None]]) -> None:
    for config, name in implementations:
        config._attn_implementation_internal = name
