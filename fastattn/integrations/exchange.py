"""An object given another class or attribute, and its own again.

The ways back are data, not closures: copied or pickled together with the objects that they are about, they are about
the copies.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


def exchange(thing: Any, ours: type) -> Callable[[], None]:
    """Give it the class `ours`, a subclass of its own; returns what takes that back.

    Others make subclasses of an object's class, too: parametrizations, torch's FSDP. What was made of `ours` meanwhile
    stays, and is then made of the object's own class.
    """
    own = type(thing)
    thing.__class__ = ours
    return Exchanged(thing, ours, own)


def assign(thing: Any, name: str, value: object) -> Callable[[], None]:
    """Set an attribute; returns what takes that back."""
    held = vars(thing)
    back = Assigned(thing, name, name in held, held.get(name))
    setattr(thing, name, value)
    return back


@dataclass(eq=False)
class Exchanged:
    """Takes back an exchange of `own` for `ours`."""

    thing: Any
    ours: type
    own: type

    def __call__(self) -> None:
        kind = type(self.thing)
        if self.ours in kind.__mro__:
            self.thing.__class__ = _based_on(kind, self.ours, self.own)

    def __getstate__(self) -> tuple[Any, ...]:
        return self.thing, _recipe(self.ours), _recipe(self.own)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.thing, ours, own = state
        self.ours, self.own = _made(*ours), _made(*own)


def _recipe(kind: type) -> tuple[Callable[..., Any] | None, Any]:
    """What makes a bare object of a class, and its arguments, as a class made here has no name to be pickled by."""
    try:
        made: Any = object.__new__(kind).__reduce_ex__(2)
    except Exception:  # it forbids pickling; so does the object that has it
        return None, kind
    return made[0], made[1]


def _made(make: Callable[..., Any] | None, args: Any) -> type:
    return args if make is None else type(make(*args))


@dataclass(eq=False)
class Assigned:
    """Takes back an assignment: the attribute is as it was before, or gone."""

    thing: Any
    name: str
    had: bool
    before: object

    def __call__(self) -> None:
        held = vars(self.thing)
        held.pop(self.name, None)
        if self.had:
            held[self.name] = self.before


@dataclass(eq=False)
class InTurn:
    """Takes back several changes, in the order given."""

    backs: list[Callable[[], None]]

    def __call__(self) -> None:
        for back in self.backs:
            back()


def _based_on(kind: type, ours: type, own: type) -> type:
    """`kind` with `own` where `ours` was."""
    if kind is ours:
        return own
    if ours not in kind.__mro__:
        return kind
    members = {name: each for name, each in vars(kind).items() if name not in ("__dict__", "__weakref__")}
    return type(kind.__name__, tuple(_based_on(base, ours, own) for base in kind.__bases__), members)
