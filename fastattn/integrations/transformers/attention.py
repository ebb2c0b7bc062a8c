"""The functions that transformers' attention interface calls, and how they are registered."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastattn import functional
from fastattn.functional import attention, attention_weights
from fastattn.integrations.transformers import arguments
from fastattn.integrations.transformers.model_mask import ModelMask, padding
from fastattn.integrations.transformers.own_code import mask_as_bias
from fastattn.integrations.transformers.replacement import NAME, remember, replace
from fastattn.masks import Causal, Dense, Full, Mask, Window
from fastattn.masks.mask_mod import Call, Unreadable, read

__all__ = ["NAME", "TESTED", "attention_forward", "attention_mask", "register", "replace", "truncate"]

TESTED = ((5, 20), (5, 23))
"""The first and the last version of transformers that the tests have run with."""


def register() -> None:
    """Make "fastattn" an attention implementation of transformers. Importing this module does it already.

    Warns:
        UserWarning: the installed transformers lies outside of the range that was tested.

    Raises:
        ImportError: transformers is not installed, or is older than 5.
    """
    version, AttentionInterface, AttentionMaskInterface = _transformers()
    numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    first, last = TESTED
    if not first <= numbers <= last:
        warnings.warn(
            f"transformers {version} is outside of {first[0]}.{first[1]} to {last[0]}.{last[1]}, the versions that "
            "fastattn was tested with; compare a model's outputs with attn_implementation='eager' first",
            stacklevel=2,
        )
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, attention_mask)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: ModelMask | Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """transformers' attention interface.

    Args:
        module: who calls. Its `is_causal`, or `is_causal` where that is given, takes the causal mask away where it is
            False and torch's SDPA would have been left to it: without padding, windows, caches that hold tokens.
        query [batch, num_heads, q_len, head_dim], key [batch, num_kv_heads, kv_len, head_dim],
        value [batch, num_kv_heads, kv_len, head_dim_v]: grouped heads stay as they are.
        attention_mask: what `attention_mask` below made; a bool tensor (True = attend) or a float one (added), both
            broadcastable to [batch, num_heads, q_len, kv_len], differentiable where it is float; None: everything is
            visible, as in eager attention, but where the caller passes is_causal=True: then causal from the first key.
        dropout, scaling, softcap, s_aux (sinks [num_heads]), position_bias (added, differentiable): as their names say.
        sliding_window: not looked at, the mask holds it.
        kwargs: cu_seq_lens_q and cu_seq_lens_k, where packed sequences begin; sinks [batch, num_heads, q_len, 1], a
            logit for each query; what else changes the attention of the model at hand is refused.

    Returns:
        out [batch, q_len, num_heads, head_dim_v]; the exact weights before dropout
        [batch, num_heads, q_len, kv_len] in the query's dtype where somebody asked for attentions, else None.

    Raises:
        ValueError: arguments that do not fit, or that change the attention in a way that is not done here.
    """
    arguments.check(module, kwargs, KNOWN)
    mask, bias = _visibility(module, query, key, attention_mask, is_causal)
    mask = arguments.packed(mask, query, key, kwargs)
    own_sinks = arguments.sinks_of(module, query, kwargs)
    told = module.__dict__  # where `truncate` and `replace` leave word; a failing getattr of a module takes its time
    window = told.get("fastattn_window")
    if window is not None:
        mask = _truncated(module, query, key, mask, window)
    if position_bias is not None:
        bias = position_bias if bias is None else position_bias + bias
    if bias is not None and bias.dtype not in (torch.float32, query.dtype):
        bias = bias.to(query.dtype)
    shared: dict[str, Any] = {"mask": mask, "bias": bias, "scale": scaling, "softcap": softcap, "sinks": s_aux}
    wanted = _weights_wanted(module, kwargs)
    if wanted:
        _check_size(module, query, key)
    backend = told.get("fastattn_backend")
    with_lse = wanted or own_sinks is not None
    result: Any = attention(query, key, value, **shared, dropout_p=dropout, backend=backend, return_lse=with_lse)
    lse: Any
    out, lse = result if with_lse else (result, None)
    weights = attention_weights(query, key, lse=lse, **shared).to(query.dtype) if wanted else None
    if own_sinks is not None:
        out = arguments.absorbed(out, lse, own_sinks)
        weights = None if weights is None else arguments.absorbed(weights, lse, own_sinks)
    return out.transpose(1, 2).contiguous(), weights


KNOWN = frozenset(inspect.signature(attention_forward).parameters) | {"sinks"}


def attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int | Tensor = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    dtype: torch.dtype = torch.float32,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> ModelMask | Tensor | None:
    """transformers' mask interface: a mask object in place of a tensor; None where nothing is hidden.

    Args:
        q_offset, kv_offset: positions of the first query and of the first key.
        mask_function: (batch_idx, head_idx, q_idx, kv_idx) -> bool; causal when None.
        attention_mask: 2-D, [batch, tokens] from position 0, nonzero = real; missing columns are not real.
        local_size: the window or chunk of a function that has one.
        dtype: of eager attention's mask, which the model's own code gets.
        allow_is_causal_skip: the mask is causal alone but for local_size and padding.
        use_vmap: a part of the function is somebody's own. It, too, is read where it compares; else drawn as a table.
    """
    from transformers import masking_utils

    sdpa_mask: Any = masking_utils.sdpa_mask
    function = masking_utils.causal_mask_function if mask_function is None else mask_function
    device = torch.device(device)
    model = getattr(kwargs.get("config"), "model_type", None)
    dtype = torch.bool if model in TAKE_SDPAS else dtype
    call = Call(q_length, kv_length, q_offset, kv_offset, device)
    try:
        mask: Mask = read(function, call, packed=not use_vmap)
    except Unreadable:
        table = sdpa_mask(
            batch_size=batch_size, q_length=q_length, kv_length=kv_length, q_offset=q_offset, kv_offset=kv_offset,
            mask_function=function, attention_mask=attention_mask, use_vmap=use_vmap, device=device,
            allow_is_causal_skip=False, allow_is_bidirectional_skip=False,  # a rule is not None here
        )  # fmt: skip
        made = ModelMask(Dense(table), batch_size, q_length, kv_length, device, dtype)
        return made.tensor() if model in LOOK_AT_MASKS else made
    hidden = None if attention_mask is None else padding(_real(attention_mask, call), q_length)
    if hidden is not None:
        mask = hidden if isinstance(mask, Full) else mask & hidden
    if isinstance(mask, Full) and allow_is_bidirectional_skip:
        return None
    alone = allow_is_causal_skip and hidden is None and q_length == kv_length
    alone = alone and (local_size is None or kv_length < local_size)
    made = ModelMask(mask, batch_size, q_length, kv_length, device, dtype, causal_alone=alone)
    return made.tensor() if model in LOOK_AT_MASKS else made


LOOK_AT_MASKS = frozenset({"doge"})
"""Model types whose attention computes with the mask and takes any BlockMask, which a ModelMask is, for none."""
TAKE_SDPAS = frozenset({"nemotron_asr_streaming_encoder"})
"""Model types whose code takes what eager attention's mask shows for hidden: right with SDPA's bool masks alone."""


def truncate(model: nn.Module, left: int | None, right: int | None) -> Callable[[], None]:
    """Truncated self-attention for a model that has none, such as a speech encoder: each query sees `left` positions
    before it and `right` after it, both ends included, None unbounded. Heard by `attn_implementation="fastattn"` alone.

    Args:
        model: a transformers model, or the part of one whose attention is to be truncated.
        left, right: as `fastattn.masks.Window` takes them.

    Returns:
        A function that undoes it.

    Raises:
        ValueError: sizes that a window cannot have.
    """
    return remember(model, "fastattn_window", Window(left, right, align="top-left"))


def _real(attention_mask: Tensor, call: Call) -> Tensor:
    """Which keys of the call are real, bool [batch, kv_len]."""
    real = attention_mask.bool()
    missing = call.kv_len + call.kv_offset - real.shape[-1]
    if isinstance(missing, Tensor) or missing > 0:
        real = nn.functional.pad(real, (0, call.kv_len if isinstance(missing, Tensor) else missing))
    return call.columns(real, "kv")


def _visibility(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    attention_mask: ModelMask | Tensor | None,
    is_causal: bool | None,
) -> tuple[Mask | Tensor | None, Tensor | None]:
    """Mask and bias of one call."""
    q_len, kv_len = query.shape[2], key.shape[2]
    if attention_mask is None:
        # One query alone is decoding; otherwise the first key belongs to the first query, in an empty cache too.
        return (Causal(align="top-left") if is_causal and q_len > 1 else None), None
    if isinstance(attention_mask, ModelMask):
        if attention_mask.shape[2] == 1 < q_len and attention_mask.shape[3] == kv_len:
            return attention_mask.table(), None  # made for one query, meant for all: [batch, 1, 1, kv_len]
        if attention_mask.shape[2:] != (q_len, kv_len):
            raise ValueError(
                f"{type(module).__name__}: its mask was made for {attention_mask.shape[2]} queries and "
                f"{attention_mask.shape[3]} keys, and it attends with {q_len} and {kv_len}"
            )
        if attention_mask.causal_alone and not arguments.is_causal(module, is_causal):
            return None, None
        return attention_mask.mask, None
    if attention_mask.dtype == torch.bool:
        return attention_mask, None
    if attention_mask.is_floating_point():
        return None, mask_as_bias(attention_mask)
    raise ValueError(
        f"{type(module).__name__}: attention_mask must be bool (True = attend) or floating (added to the scores) "
        f"when it reaches the attention, got {attention_mask.dtype} {list(attention_mask.shape)}"
    )


def _truncated(module: nn.Module, query: Tensor, key: Tensor, mask: Mask | Tensor | None, window: Window) -> Mask:
    """The mask, and no farther than the window that `truncate` set."""
    if query.shape[2] != key.shape[2]:
        raise ValueError(
            f"{type(module).__name__}: truncate() is for self-attention over whole sequences, got {query.shape[2]} "
            f"queries and {key.shape[2]} keys; truncate the encoder alone"
        )
    if mask is None:
        return window
    return window & (Dense(mask) if isinstance(mask, Tensor) else mask)


def _weights_wanted(module: nn.Module, kwargs: dict[str, Any]) -> bool:
    """Whether somebody asked for attentions: by argument, by configuration, or by the hooks that collect them."""
    asked = kwargs.get("output_attentions")
    if asked is not None:
        return bool(asked) or _collecting()
    return _collecting() or bool(getattr(getattr(module, "config", None), "output_attentions", False))


def _check_size(module: nn.Module, query: Tensor, key: Tensor) -> None:
    batch, num_heads, q_len, _ = query.shape
    size, most = 4 * batch * num_heads * q_len * key.shape[2], functional.MOST_WEIGHTS
    if size > most:
        raise ValueError(
            f"{type(module).__name__}: output_attentions=True would take {functional.say_bytes(size)} in this layer "
            f"alone, and {functional.say_bytes(most)} are allowed; fastattn.attention_weights gives chosen queries "
            "(rows=) or the mean of the heads (heads='mean') of a layer's query and key; "
            f"fastattn.functional.MOST_WEIGHTS = {size} allows all"
        )


def _collecting() -> bool:
    try:
        from transformers.utils.output_capturing import _active_collector
    except ImportError:
        return False
    collected = _active_collector.get()
    return collected is not None and any("attentions" in name for name in collected)


def _transformers() -> tuple[str, Any, Any]:
    try:
        import transformers
        from transformers import AttentionInterface, AttentionMaskInterface
    except ImportError as failure:
        raise ImportError(
            f"fastattn.integrations.transformers needs transformers 5 (pip install 'fastattn[models]'): {failure}"
        ) from failure
    return transformers.__version__, AttentionInterface, AttentionMaskInterface


register()
