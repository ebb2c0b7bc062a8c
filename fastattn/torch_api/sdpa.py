"""torch.nn.functional.scaled_dot_product_attention on fastattn: its signature, its meaning, its errors.

Torch's own conventions hold here: a bool mask is True where a key takes part, is_causal=True is aligned top-left,
dropout applies whenever dropout_p > 0. What differs is listed in docs/torch.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from fastattn.functional import attention
from fastattn.masks import Causal, Mask, flex

__all__ = ["scaled_dot_product_attention"]

TORCH_SDPA = torch._C._nn.scaled_dot_product_attention
"""Torch's own, whatever a patch has put in its place."""

_C_NAMES = {
    torch.float16: "c10::Half",
    torch.bfloat16: "c10::BFloat16",
    torch.float32: "float",
    torch.float64: "double",
    torch.bool: "bool",
    torch.uint8: "unsigned char",
    torch.int8: "signed char",
    torch.int16: "short int",
    torch.int32: "int",
    torch.int64: "long int",
}
_FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Drop-in for `torch.nn.functional.scaled_dot_product_attention`.

    Args:
        query: [..., num_heads, q_len, head_dim], rank 2 or more, any strides.
        key: [..., num_kv_heads, kv_len, head_dim]; leading dimensions broadcast against the query's, a single head too.
        value: [..., num_kv_heads, kv_len, head_dim_v].
        attn_mask: bool, True = the key takes part; or float32 or the query's dtype, added to the scaled scores and
            differentiable; broadcastable to [..., num_heads, q_len, kv_len], rank 2 or more. A CausalBias of
            torch.nn.attention.bias stays what it is: nothing is built from it.
        dropout_p: probability of dropping a weight, applied whenever it is above 0.
        is_causal: query i sees keys 0 to i (top-left), also where the lengths differ. Not together with attn_mask.
        scale: of the scores, a number or a 0-d tensor; 1 / sqrt(head_dim) when None.
        enable_gqa: num_heads may be a multiple of the heads of key and of value.

    Returns:
        [..., num_heads, q_len, head_dim_v]; a row that sees no key is 0. Ranks other than 4 are computed as 4-D views;
        only leading dimensions that broadcast in part (rank 5 and more) and key and value with unequal head counts
        take a copy.

    Raises:
        RuntimeError, TypeError, IndexError: as torch does; also where torch does not look: a mask together with
            is_causal=True, a key and a value of different lengths.
        ValueError: a scale that is NaN or infinite, for which torch gives what its kernels make of it.

    `torch.nn.attention.sdpa_kernel` is heard outside of `torch.compile`: MATH alone means the reference backend. Nested
    tensors are torch's own format and stay with torch.
    """
    return route(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)


def route(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    backend: str | None = None,
    name: Callable[..., Tensor] | None = None,
) -> Tensor:
    """`scaled_dot_product_attention` on a backend of choice: past the overrides, then computed.

    Args:
        name: the function that overrides are told of, and call to go on; one that knows the backend by itself.
    """
    if backend is not None and any(isinstance(each, Tensor) and each.is_nested for each in (query, key, value)):
        raise RuntimeError(
            "scaled_dot_product_attention: a nested tensor is left to torch's own function, which has no backend= "
            f"(here {backend!r}); leave the backend open, or pack the tokens for fastattn.varlen_attention"
        )
    if has_torch_function((query, key, value, attn_mask)):
        bias = flex.is_causal_bias(attn_mask)
        if not bias or has_torch_function((query, key, value)):
            return overridden(
                name or (partial(route, backend=backend) if backend else scaled_dot_product_attention),
                F.scaled_dot_product_attention if bias else TORCH_SDPA,
                (query, key, value, attn_mask),
                (query, key, value, attn_mask, dropout_p, is_causal),
                {"scale": scale, "enable_gqa": enable_gqa},
            )
    return attend(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, backend)


def overridden(
    ours: Callable[..., Any],
    torchs: Callable[..., Any],
    tensors: tuple[Any, ...],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Hand a call to the modes and tensor subclasses that override it.

    A subclass with a __torch_function__ of its own knows torch's function, not ours; everybody else gets ours, so that
    what is finally computed is fastattn's.
    """
    function = torchs if any(_overrides_itself(type(tensor)) for tensor in tensors) else ours
    return handle_torch_function(function, tensors, *args, **kwargs)


def _overrides_itself(kind: type) -> bool:
    if kind is Tensor or not issubclass(kind, Tensor):
        return False
    method = kind.__torch_function__
    plain = getattr(method, "__func__", None) is Tensor.__torch_function__.__func__  # type: ignore[attr-defined]
    return not plain and method is not torch._C._disabled_torch_function_impl


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    backend: str | None,
) -> Tensor:
    """The function behind overrides: shapes, masks and dtypes into the terms of `fastattn.attention`."""
    mask: Mask | Tensor | None = None
    if flex.is_causal_bias(attn_mask):
        mask = _causal_of(attn_mask, query, key, is_causal)
        attn_mask, is_causal = None, False
    _check_kinds(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    if query.is_nested or key.is_nested or value.is_nested:
        return TORCH_SDPA(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    query, key, value, attn_mask = _autocast(query, key, value, attn_mask)
    _check_tensors(query, key, value, attn_mask)
    _check_arguments(query, key, value, attn_mask, dropout_p, is_causal)
    backend = _selected_backend(query.device, backend)
    head_dim, head_dim_v = query.shape[-1], value.shape[-1]
    if scale is not None:
        scale = float(scale)
    if head_dim == 0 or head_dim_v == 0:  # every score is 0; nothing comes out: one column of zeros stands in
        query, key = (F.pad(tensor, (0, 1)) if head_dim == 0 else tensor for tensor in (query, key))
        value = F.pad(value, (0, 1)) if head_dim_v == 0 else value
    query, key, value, lead = _four_dimensions(query, key, value, enable_gqa)
    bias = None
    if is_causal:
        mask = Causal(align="top-left")
    elif attn_mask is not None:
        table = _mask_of(attn_mask, (*lead, query.shape[2], key.shape[2]))
        mask, bias = (table, None) if attn_mask.dtype == torch.bool else (None, table)
    out: Tensor = attention(  # type: ignore[assignment]
        query, key, value, mask=mask, bias=bias, scale=scale, dropout_p=dropout_p, backend=backend
    )
    if head_dim_v == 0:
        out = out[..., :0]
    return out if len(lead) == 2 else out.reshape(*lead, *out.shape[2:])


def _causal_of(bias: Any, query: Tensor, key: Tensor, is_causal: bool) -> Mask:
    if is_causal:
        raise ValueError("CausalBias should not be used with causal=True")
    try:
        return flex.of_causal_bias(bias, query.shape[-2], key.shape[-2])
    except ValueError as failure:
        raise RuntimeError(str(failure)) from None


def _check_kinds(
    query: Any, key: Any, value: Any, attn_mask: Any, dropout_p: Any, is_causal: Any, scale: Any, enable_gqa: Any
) -> None:
    if (
        isinstance(query, Tensor)
        and isinstance(key, Tensor)
        and isinstance(value, Tensor)
        and (attn_mask is None or isinstance(attn_mask, Tensor))
        and type(dropout_p) is float
        and type(is_causal) is type(enable_gqa) is bool
        and (scale is None or type(scale) is float)
    ):
        return  # nearly every call; what follows is for the others
    tensors = (("query", query), ("key", key), ("value", value), ("attn_mask", attn_mask))
    for position, (name, tensor) in enumerate(tensors, 1):
        if not isinstance(tensor, Tensor) and not (tensor is None and name == "attn_mask"):
            raise TypeError(
                f"scaled_dot_product_attention(): argument '{name}' (position {position}) must be Tensor, "
                f"not {type(tensor).__name__}"
            )
    for name, flag in (("is_causal", is_causal), ("enable_gqa", enable_gqa)):
        if not isinstance(flag, (bool, torch.SymBool)):
            raise TypeError(
                f"scaled_dot_product_attention(): argument '{name}' must be bool, not {type(flag).__name__}"
            )
    for name, number in (("dropout_p", dropout_p), ("scale", 1.0 if scale is None else scale)):
        held = isinstance(number, Tensor) and (number.dim() > 0 or number.requires_grad)  # no derivative would reach it
        if number is None or isinstance(number, str) or held:
            raise TypeError(
                f"scaled_dot_product_attention(): argument '{name}' must be float, not {type(number).__name__}"
            )


def _check_tensors(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None) -> None:
    """Kinds of numbers, devices and ranks, in torch's order and words."""
    if not query.dtype == key.dtype == value.dtype:
        raise RuntimeError(
            f"Expected query, key, and value to have the same dtype, but got query.dtype: {_c_name(query.dtype)} "
            f"key.dtype: {_c_name(key.dtype)} and value.dtype: {_c_name(value.dtype)} instead."
        )
    if not query.device == key.device == value.device:
        raise RuntimeError(
            f"Expected query, key, and value to have the same device type, but got query.device: {query.device} "
            f"key.device: {key.device} and value.device: {value.device} instead."
        )
    if query.dim() < 2 or key.dim() < 2 or value.dim() < 2:
        raise RuntimeError(
            f"Expected query, key, and value to all be  at least 2 dimensional, but got query.dim: {query.dim()} "
            f"key.dim: {key.dim()} and value.dim: {value.dim()} instead."
        )
    if query.dtype not in _FLOATING:
        kind = NotImplementedError if query.is_complex() or query.is_floating_point() else RuntimeError
        raise kind(f"query, key, value: float16, bfloat16, float32 or float64 is needed, got {query.dtype}")
    if attn_mask is None:
        return
    if attn_mask.dtype not in (torch.bool, torch.float32, query.dtype):
        raise RuntimeError(
            "Expected attn_mask dtype to be bool or float or to match query dtype, but got attn_mask.dtype: "
            f"{_c_name(attn_mask.dtype)} and  query.dtype: {_c_name(query.dtype)} instead."
        )
    if attn_mask.device != query.device:
        raise RuntimeError(f"attn_mask: it must be on the query's device {query.device}, got {attn_mask.device}")


def _check_arguments(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, dropout_p: float, is_causal: bool
) -> None:
    if attn_mask is not None and is_causal:
        raise RuntimeError("_scaled_dot_product_attention: Explicit attn_mask should not be set when is_causal=True")
    if not 0.0 <= dropout_p <= 1.0:
        raise RuntimeError(f"dropout probability has to be between 0 and 1, but got {dropout_p}")
    if query.shape[-1] != key.shape[-1]:
        raise RuntimeError(
            f"query, key: the last dimensions must be equal, got {query.shape[-1]} and {key.shape[-1]} "
            f"(shapes {list(query.shape)} and {list(key.shape)})"
        )
    if key.shape[-2] != value.shape[-2]:
        raise RuntimeError(
            f"key, value: the lengths must be equal, got {key.shape[-2]} and {value.shape[-2]} "
            f"(shapes {list(key.shape)} and {list(value.shape)})"
        )


def _c_name(dtype: torch.dtype) -> str:
    return _C_NAMES.get(dtype, str(dtype))


def _selected_backend(device: torch.device, asked: str | None) -> str | None:
    """The backend after torch's switches (sdpa_kernel, torch.backends.cuda.enable_*_sdp) have been heard.

    Flash, memory-efficient and cuDNN stand for any fused backend; on a CPU torch itself knows only flash. Compilers
    cannot trace the switches, so a compiled call does not read them.
    """
    if torch.compiler.is_compiling():
        return asked
    flags = torch._C
    if flags._get_flash_sdp_enabled():
        return asked
    if device.type != "cpu" and (flags._get_mem_efficient_sdp_enabled() or flags._get_cudnn_sdp_enabled()):
        return asked
    if flags._get_math_sdp_enabled():
        return "reference"
    raise RuntimeError(
        "No viable backend for scaled_dot_product_attention was found. "
        "This is likely due to turning off both the math kernel and the fused kernels."
    )


def _autocast(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None) -> list[Any]:
    """Torch's SDPA is on autocast's lower-precision list: floating tensors, the mask too, but float64 ones."""
    tensors = [query, key, value, attn_mask]
    if not torch._C._is_any_autocast_enabled():
        return tensors
    kind = query.device.type
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return [
        tensor.to(dtype)
        if tensor is not None and tensor.is_floating_point() and tensor.dtype != torch.float64
        else tensor
        for tensor in tensors
    ]


def _four_dimensions(
    query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool
) -> tuple[Tensor, Tensor, Tensor, tuple[int, ...]]:
    """query, key, value as [batch, heads, length, dim], and the output's dimensions before its last two."""
    rank = max(query.dim(), key.dim(), value.dim())
    if rank == query.dim() == key.dim() == value.dim() == 4 and query.shape[0] == key.shape[0] == value.shape[0]:
        heads, heads_k, heads_v = query.shape[1], key.shape[1], value.shape[1]
        if heads_k == heads_v and (heads == heads_k or (heads_k == 1 and heads)):
            return query, key, value, (query.shape[0], heads)
    if enable_gqa and min(query.dim(), key.dim(), value.dim()) < 3:
        raise IndexError("Dimension out of range (expected to be in range of [-2, 1], but got -3)")
    tensors = [tensor[(None,) * (max(rank, 3) - tensor.dim())] for tensor in (query, key, value)]
    *outer, heads = _broadcast(tensors, enable_gqa)
    if enable_gqa:
        tensors[1:] = _equal_heads(*tensors)
    else:
        shared = tensors[1].shape[-3] == tensors[2].shape[-3] == 1 and heads > 0
        tensors = [tensor.expand(*tensor.shape[:-3], heads, -1, -1) for tensor in tensors[: 1 if shared else 3]] + (
            tensors[1:] if shared else []
        )
    batch = math.prod(outer)
    tensors = [tensor.expand(*outer, -1, -1, -1).reshape(batch, *tensor.shape[-3:]) for tensor in tensors]
    return *tensors, (*outer, heads)[-(rank - 2) :] if rank > 2 else ()  # type: ignore[return-value]


def _broadcast(tensors: list[Tensor], enable_gqa: bool) -> list[int]:
    """The common leading dimensions, heads last; with enable_gqa the heads are the query's."""
    shapes = [tensor.shape[:-3] if enable_gqa else tensor.shape[:-2] for tensor in tensors]
    common = []
    for place, sizes in enumerate(zip(*shapes, strict=True), 1):
        wanted = {size for size in sizes if size != 1}
        if len(wanted) > 1:
            heads = not enable_gqa and place == len(shapes[0])
            hint = "; enable_gqa=True repeats the heads of key and value" if heads else ""
            raise RuntimeError(
                "query, key, value: the dimensions before the last two must broadcast, got shapes "
                f"{', '.join(str(list(tensor.shape)) for tensor in tensors)}{hint}"
            )
        common.append(wanted.pop() if wanted else 1)
    return [*common, tensors[0].shape[-3]] if enable_gqa else common


def _equal_heads(query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
    """key and value with one number of heads that divides the query's."""
    heads, heads_k, heads_v = (tensor.shape[-3] for tensor in (query, key, value))
    if not heads_k or not heads_v or heads % heads_k or heads % heads_v:
        raise RuntimeError("Number of heads in key and value must divide the number of heads in ")
    common = math.lcm(heads_k, heads_v)
    return [
        tensor if count == common else tensor.repeat_interleave(common // count, dim=-3)
        for tensor, count in ((key, heads_k), (value, heads_v))
    ]


def _mask_of(mask: Tensor, target: tuple[int, ...]) -> Tensor:
    """attn_mask as [batch or 1, num_heads or 1, q_len or 1, kv_len or 1]; target is the shape of all scores."""
    if mask.dim() < 2:
        raise IndexError(
            "Dimension specified as -2 but tensor has no dimensions"
            if mask.dim() == 0
            else "Dimension out of range (expected to be in range of [-1, 0], but got -2)"
        )
    padded = (1,) * (len(target) - mask.dim()) + tuple(mask.shape)
    if len(padded) > len(target) or any(have not in (1, size) for have, size in zip(padded, target, strict=True)):
        raise RuntimeError(
            f"attn_mask: shape {list(mask.shape)} does not broadcast to "
            f"[..., num_heads, q_len, kv_len] = {list(target)}"
        )
    if len(target) <= 4:
        return mask.reshape((1,) * (4 - mask.dim()) + tuple(mask.shape))
    outer = target[:-3] if any(size != 1 for size in padded[:-3]) else (1,) * (len(target) - 3)
    return mask.reshape(padded).expand(*outer, *padded[-3:]).reshape(math.prod(outer), *padded[-3:])
