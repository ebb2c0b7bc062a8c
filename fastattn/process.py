"""What a process can have once, however often fastattn is imported: operators under its names, loaded libraries, and
what stands in torch's place.

torch keeps the namespace of a library's operators for as long as the process lives; what is kept, is kept there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

Made = TypeVar("Made", bound=Callable[..., Any])


def _all() -> dict[str, Any]:
    return vars(torch.ops.fastattn).setdefault("_kept", {})


def kept(name: str) -> Any:
    """What was kept under a name; None where nothing was."""
    return _all().get(name)


def keep(name: str, value: Any) -> None:
    """Keep something."""
    _all()[name] = value


def once(made: Made) -> Made:
    """A class or function as the process's first import made it, by its module and name; also a decorator.

    For what torch holds on to, so that every import knows it as its own.
    """
    found: Made = _all().setdefault(f"{made.__module__}.{made.__qualname__}", made)
    return found
