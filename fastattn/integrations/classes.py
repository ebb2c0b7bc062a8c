"""An object given another class or attribute, and its own again."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any


def exchange(thing: Any, ours: type) -> Callable[[], None]:
    """Give it the class `ours`, a subclass of its own; returns what takes that back.

    Others make subclasses of an object's class, too: parametrizations, torch's FSDP. What was made of `ours` meanwhile
    stays, and is then made of the object's own class.
    """
    own = type(thing)
    thing.__class__ = ours
    return partial(_take_back, thing, ours, own)


def _take_back(thing: Any, ours: type, own: type) -> None:
    kind = type(thing)
    if ours in kind.__mro__:
        thing.__class__ = _based_on(kind, ours, own)


def _based_on(kind: type, ours: type, own: type) -> type:
    """`kind` with `own` where `ours` was."""
    if kind is ours:
        return own
    if ours not in kind.__mro__:
        return kind
    members = {name: each for name, each in vars(kind).items() if name not in ("__dict__", "__weakref__")}
    return type(kind.__name__, tuple(_based_on(base, ours, own) for base in kind.__bases__), members)


def assign(thing: Any, name: str, value: object) -> Callable[[], None]:
    """Set an attribute; returns what takes that back."""
    held = vars(thing)
    had, before = name in held, held.get(name)
    setattr(thing, name, value)

    def undo() -> None:
        held.pop(name, None)
        if had:
            held[name] = before

    return undo
