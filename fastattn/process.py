"""What a process can have once, however often fastattn is imported: operators under its names, and loaded libraries.

torch keeps the namespace of a library's operators for as long as the process lives; what is kept, is kept there.
"""

from __future__ import annotations

from typing import Any

import torch


def _all() -> dict[str, Any]:
    return vars(torch.ops.fastattn).setdefault("_kept", {})


def kept(name: str) -> Any:
    """What was kept under a name; None where nothing was."""
    return _all().get(name)


def keep(name: str, value: Any) -> None:
    """Keep something."""
    _all()[name] = value
