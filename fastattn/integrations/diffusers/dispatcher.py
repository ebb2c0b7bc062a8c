"""fastattn as a backend of diffusers' dispatcher."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from fastattn import dispatch
from fastattn.torch_api import sdpa

NAME = "fastattn"


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
    """Make fastattn a backend of diffusers' dispatcher, by the name "fastattn"; with `backend`, "fastattn_<backend>".

    Args:
        backend: the backend of fastattn that computes, by name; None takes the first that can.

    Returns:
        The member of diffusers' AttentionBackendName. A second call returns the same.

    Raises:
        ImportError: no diffusers, or one without the dispatcher.
        ValueError: an unknown backend.
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
