"""x-transformers: its `Attend`, where it calls torch's SDPA (`attn_flash=True`), keeps its code and calls fastattn.

Tested with x-transformers 2.31.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from fastattn.integrations import sdpa_redirect
from fastattn.integrations.exchange import exchange
from fastattn.integrations.report import Replacement

KIND = "x_transformers.attend.Attend"


def is_known(module: nn.Module) -> bool:
    """Whether a module is x-transformers' own Attend, redirected or not."""
    kind = type(module)
    return f"{kind.__module__}.{kind.__qualname__}" == KIND


def replace(
    path: str, module: nn.Module, request: sdpa_redirect.Request
) -> tuple[Replacement, Callable[[], None] | None]:
    """The row for an Attend, exchanged where it can be, and what takes it back."""
    attend: Any = module
    kind: Any = type(module)
    if isinstance(attend, sdpa_redirect.Redirected):
        return sdpa_redirect.already((path, kind.__name__), attend, request.backend)
    reason = _why_not(attend)
    if reason is not None:
        return Replacement(path, kind.__name__, False, reason), None
    back = exchange(module, sdpa_redirect.redirected(kind, "forward", request.mode, request.backend))
    what = "its own code, whose scaled_dot_product_attention runs on fastattn"
    return Replacement(path, kind.__name__, True, what), back


def _why_not(attend: Any) -> str | None:
    if "forward" in vars(attend):
        return "its forward was replaced on the instance; fastattn.patch() reaches it"
    if not sdpa_redirect.names_in(getattr(type(attend), "flash_attn", attend.forward)) & sdpa_redirect.CALLS:
        return "this version's flash_attn calls none of torch's attention functions"
    if getattr(attend, "flash_pack_seq", False):
        return "with flash_pack_seq=True it calls flash-attn's own kernel"
    if not getattr(attend, "flash", False):
        return "it computes the weights itself; attn_flash=True lets it call torch's SDPA, which can be exchanged"
    return None
