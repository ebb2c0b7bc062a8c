"""diffusers' attention processors, exchanged by `fastattn.replace_attention`.

Those of newer models (Flux, SD3, Wan) call diffusers' dispatcher, and are sent to its backend "fastattn"
(dispatcher.py); those of older ones (the UNets) call torch's SDPA, and keep their code (sdpa_redirect.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from fastattn.integrations import sdpa_redirect
from fastattn.integrations.diffusers.dispatcher import register
from fastattn.integrations.exchange import assign, exchange
from fastattn.integrations.report import ALREADY, Replacement

DISPATCHER = "dispatch_attention_fn"


def is_known(module: nn.Module) -> bool:
    """Whether a module is diffusers' attention: one that leaves the computing to its `processor`."""
    return type(module).__module__.startswith("diffusers.") and callable(getattr(module, "processor", None))


def replace(
    path: str, module: nn.Module, request: sdpa_redirect.Request
) -> tuple[Replacement, Callable[[], None] | None]:
    """The row for one of diffusers' attention modules, exchanged where it can be, and what takes it back. Several
    modules may share a processor.
    """
    processor: Any = module.processor
    kind: Any = type(processor)
    where = (path, type(module).__name__)
    if any(processor is other for other in request.done):
        return Replacement(*where, True, f"{kind.__name__}, the same as another module's"), None
    row, undo = _replace_processor(where, processor, kind, request)
    if row.changed:
        request.done.append(processor)
    return row, undo


def _replace_processor(
    where: tuple[str, str], processor: Any, kind: Any, request: sdpa_redirect.Request
) -> tuple[Replacement, Callable[[], None] | None]:
    if isinstance(processor, sdpa_redirect.Redirected):
        return sdpa_redirect.already(where, processor, request.backend)
    if not kind.__module__.startswith("diffusers."):
        what = (
            f"its processor {kind.__module__}.{kind.__qualname__} is not diffusers' own; fastattn.patch() may reach it"
        )
        return Replacement(*where, False, what), None
    names = sdpa_redirect.names_in(kind.__call__)
    if DISPATCHER in names and hasattr(processor, "_attention_backend"):
        member = register(request.backend)
        if vars(processor).get("_attention_backend") is member:
            return Replacement(*where, False, ALREADY), None
        row = Replacement(*where, True, f"{kind.__name__} sends it to the backend {member.value!r}")
        return row, assign(processor, "_attention_backend", member)
    if names & sdpa_redirect.CALLS and not names & sdpa_redirect.OWN_WAY:
        back = exchange(processor, sdpa_redirect.redirected(kind, "__call__", request.mode, request.backend))
        return Replacement(*where, True, f"{kind.__name__} calls F.scaled_dot_product_attention: on fastattn"), back
    what = (
        f"its processor {kind.__name__} computes the weights itself; give it one that calls torch's SDPA first, "
        "such as AttnProcessor2_0"
    )
    return Replacement(*where, False, what), None
