"""diffusers: fastattn as an attention backend of its dispatcher, and its attention processors.

Newer models (Flux, SD3, Wan) send every attention through `dispatch_attention_fn`, whose backends have names:
`register()` adds "fastattn", for `model.set_attention_backend("fastattn")` and `with attention_backend("fastattn")`.
Older ones (the UNets) hold processors that call torch's SDPA; `fastattn.replace_attention` exchanges both kinds.
Tested with diffusers 0.42; its registry is marked experimental there.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn

from fastattn import dispatch
from fastattn.integrations import sdpa_redirect
from fastattn.integrations.exchange import assign, exchange
from fastattn.integrations.report import ALREADY, Replacement
from fastattn.torch_api import sdpa

NAME = "fastattn"
DISPATCHER = "dispatch_attention_fn"


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    _parallel_config: Any | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """What the dispatcher calls; its "native" backend's meaning, on fastattn.

    Args:
        query: [batch, q_len, num_heads, head_dim].
        key, value: [batch, kv_len, num_heads or fewer, head_dim].
        attn_mask: [batch, kv_len], or broadcastable to [batch, num_heads, q_len, kv_len]; bool, True = attend, or
            floating, added.
        is_causal: query i sees keys 0 to i (top-left).

    Returns:
        [batch, q_len, num_heads, head_dim].

    Raises:
        ValueError: return_lse or context parallelism, which this backend does not offer.
    """
    if return_lse or _parallel_config is not None:
        asked = "return_lse=True" if return_lse else "context parallelism"
        raise ValueError(f"{asked}: diffusers' backend 'fastattn' does not offer it; its backend 'native' may")
    if attn_mask is not None and attn_mask.dim() == 2 and attn_mask.shape == (query.shape[0], key.shape[1]):
        attn_mask = attn_mask[:, None, None]
    query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
    out = sdpa.route(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa, backend=backend
    )
    return out.transpose(1, 2)


def register(backend: str | None = None) -> Any:
    """Make fastattn a backend of diffusers' dispatcher, by the name "fastattn"; with a room, "fastattn_<room>".

    Args:
        backend: the room that computes, by name; None takes the first that can.

    Returns:
        The member of diffusers' AttentionBackendName. A second call returns the same.

    Raises:
        ImportError: no diffusers, or one without the dispatcher.
        ValueError: an unknown room.
    """
    from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

    dispatch.requested(backend)
    value = NAME if backend is None else f"{NAME}_{backend}"
    if value in AttentionBackendName._value2member_map_:
        return AttentionBackendName(value)
    # The enumeration is closed, and the registry's keys are its members: one more, as its own machinery makes them.
    member: Any = str.__new__(AttentionBackendName, value)
    member._name_, member._value_, member.__objclass__ = value.upper(), value, AttentionBackendName
    member._sort_order_ = len(AttentionBackendName._member_names_)
    AttentionBackendName._member_names_.append(member._name_)
    AttentionBackendName._member_map_[member._name_] = member
    AttentionBackendName._value2member_map_[value] = member
    _AttentionBackendRegistry.register(member)(partial(attention, backend=backend))
    return member


def is_holder(module: nn.Module) -> bool:
    """Whether a module is diffusers' attention: one that leaves the computing to its `processor`."""
    return type(module).__module__.startswith("diffusers.") and callable(getattr(module, "processor", None))


def replace(
    path: str, module: nn.Module, mode: sdpa_redirect.Mode, backend: str | None, done: list[Any]
) -> tuple[Replacement, Callable[[], None] | None]:
    """The row for one of diffusers' attention modules, exchanged where it can be, and what takes it back.

    Args:
        done: processors that were exchanged with modules before it; several may share one. Grows.
    """
    processor: Any = module.processor
    kind: Any = type(processor)
    where = (path, type(module).__name__)
    if any(processor is other for other in done):
        return Replacement(*where, True, f"{kind.__name__}, the same as another module's"), None
    row, undo = _replace_processor(where, processor, kind, mode, backend)
    if row.changed:
        done.append(processor)
    return row, undo


def _replace_processor(
    where: tuple[str, str], processor: Any, kind: Any, mode: sdpa_redirect.Mode, backend: str | None
) -> tuple[Replacement, Callable[[], None] | None]:
    if isinstance(processor, sdpa_redirect.Caught):
        return sdpa_redirect.already(where, processor, backend)
    if not kind.__module__.startswith("diffusers."):
        what = (
            f"its processor {kind.__module__}.{kind.__qualname__} is not diffusers' own; fastattn.patch() may reach it"
        )
        return Replacement(*where, False, what), None
    names = sdpa_redirect.names_in(kind.__call__)
    if DISPATCHER in names and hasattr(processor, "_attention_backend"):
        member = register(backend)
        if vars(processor).get("_attention_backend") is member:
            return Replacement(*where, False, ALREADY), None
        row = Replacement(*where, True, f"{kind.__name__} sends it to the backend {member.value!r}")
        return row, assign(processor, "_attention_backend", member)
    if names & sdpa_redirect.CALLS and not names & sdpa_redirect.OWN_WAY:
        back = exchange(processor, sdpa_redirect.caught(kind, "__call__", mode, backend))
        return Replacement(*where, True, f"{kind.__name__} calls F.scaled_dot_product_attention: on fastattn"), back
    what = (
        f"its processor {kind.__name__} computes the weights itself; give it one that calls torch's SDPA first, "
        "such as AttnProcessor2_0"
    )
    return Replacement(*where, False, what), None
