"""Attention modules of timm, torchvision, open_clip and clip that call torch's attention functions themselves.

Their code is kept (see sdpa_redirect.py); what is decided here is whether all of it goes through those functions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from fastattn.integrations import sdpa_redirect
from fastattn.integrations.exchange import InTurn, assign, exchange
from fastattn.integrations.report import Replacement

PACKAGES = ("timm", "torchvision", "open_clip", "clip")


def is_known(module: nn.Module) -> bool:
    """Whether a module is one of these libraries' own and computes attention through torch's functions."""
    kind = type(module)
    if isinstance(module, sdpa_redirect.Redirected):
        kind = kind.__mro__[2]  # what it was made from
    return kind.__module__.split(".")[0] in PACKAGES and bool(
        sdpa_redirect.names_in(kind.forward) & sdpa_redirect.CALLS
    )


def replace(
    path: str, module: nn.Module, request: sdpa_redirect.Request
) -> tuple[Replacement, Callable[[], None] | None]:
    """The row for such a module, exchanged where it can be, and what takes it back."""
    kind: Any = type(module)
    if isinstance(module, sdpa_redirect.Redirected):
        return sdpa_redirect.already((path, kind.__name__), module, request.backend)
    if "forward" in vars(module):
        what = "its forward was replaced on the instance; fastattn.patch() reaches it"
        return Replacement(path, kind.__name__, False, what), None
    names = sdpa_redirect.names_in(kind.forward)
    switched = False
    if names & sdpa_redirect.OWN_WAY:
        reason, switched = _own_way(module, names)
        if reason is not None:
            return Replacement(path, kind.__name__, False, reason), None
    backs = [exchange(module, sdpa_redirect.redirected(kind, "forward", request.mode, request.backend))]
    if switched:
        backs.append(assign(module, "fused_attn", True))
    function = next(iter(sorted(names & sdpa_redirect.CALLS)))
    also = ", fused_attn switched on" if switched else ""
    return Replacement(path, kind.__name__, True, f"its own code, whose {function} runs on fastattn{also}"), InTurn(
        backs
    )


def _own_way(module: Any, names: frozenset[str]) -> tuple[str | None, bool]:
    """A module that can also compute the weights itself: why it would, or whether timm's switch must be set."""
    if "fused_attn" in names and isinstance(vars(module).get("fused_attn"), bool):
        return None, not module.fused_attn
    if "use_fsdpa" in names:  # open_clip's Attention
        if getattr(module, "logit_scale", None) is not None:
            return "with scaled_cosine=True it computes the weights itself", False
        if module.use_fsdpa:
            return None, False
    return "it computes the weights itself in some of its ways, and which one it takes is not known here", False
