"""The calls: attention, its weights, its explanation. torch's own functions on top of it are in torch_api/."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastattn import dispatch, ops, reference, sharding, tracing
from fastattn.cache import CacheView
from fastattn.cache.base import placed
from fastattn.dispatch import Verdict
from fastattn.dropout import dropout_mask, new_dropout_seed
from fastattn.masks import Mask
from fastattn.masks.base import holds_ints
from fastattn.spec import AttnInputs, AttnSpec

__all__ = ["attention", "attention_weights", "dropout_mask", "explain", "new_dropout_seed"]

MOST_WEIGHTS = 2**32
"""Bytes of weights that `attention_weights` gives out; assign another number to get more."""


def attention(
    query: Tensor,
    key: Tensor | CacheView,
    value: Tensor | CacheView,
    *,
    mask: Mask | Tensor | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    score: object = None,
    normalizer: object = None,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
    deterministic: bool = True,
    backend: str | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention as one fused call (Vaswani et al. 2017; computed by blocks as in Dao et al. 2022, FlashAttention).

    Args:
        query: [batch, num_heads, q_len, head_dim], float16, bfloat16, float32 or float64, any strides.
        key: [batch, num_kv_heads, kv_len, head_dim]; num_heads is a multiple of num_kv_heads (grouped or multi-query).
        value: [batch, num_kv_heads, kv_len, head_dim_v]; or `cache.key` and `cache.value` of a `fastattn.KVCache`.
        mask: a `fastattn.masks.Mask`, or a bool tensor (True = attend) broadcastable to
            [batch, num_heads, q_len, kv_len].
        bias: added to the scaled scores; float32 or the query's dtype, broadcastable like the mask; -inf hides.
            Differentiable, in its own shape and dtype.
        scale: of the scores; 1 / sqrt(head_dim) when None.
        softcap: scores become softcap * tanh(score / softcap) before the bias.
        sinks: [num_heads] floating, a logit per head added to the softmax's denominator. Differentiable.
        score, normalizer: reserved; only None or the defaults of `fastattn.scores`.
        dropout_p: probability of dropping a weight, 0 to 1 (1 gives zeros). Applied whenever it is above 0.
        dropout_seed: int64 [1] on the query's device; drawn from torch's generator when None. See `dropout_mask`.
        deterministic: False allows an unordered, possibly faster backward.
        backend: a backend by name, which then runs the call and its gradients or raises. None takes the first that
            can run the call and, for the gradients, the first of those that has a backward for it (see `explain`).
        return_lse: also return the log-sum-exp.

    Returns:
        out [batch, num_heads, q_len, head_dim_v] in the query's dtype; with `return_lse` also lse
        [batch, num_heads, q_len], float32 (float64 for float64), natural log, before dropout and without the sink.
        Both are differentiable. A row that sees no key gives out 0, lse -inf and zero gradients. A score that overflows
        to -inf hides its key; one that overflows to inf makes its row NaN and its lse inf.

    Raises:
        TypeError, ValueError: an argument that does not fit; nothing is computed.
        BackendUnavailable: the backend asked for cannot run this call, or its gradients where they are wanted.

    Second derivatives, forward-mode differentiation and functorch transforms use the plain formulation whatever the
    backend. Under autocast, inputs are cast as torch's scaled_dot_product_attention casts them.
    """
    if isinstance(key, CacheView) or isinstance(value, CacheView):
        key, value, mask = placed(query, key, value, mask)
    sharding.refuse_context_parallel()
    query, key, value, bias = _autocast(query, key, value, bias=bias)
    inputs = AttnInputs(query, key, value, bias, sinks, dropout_seed)  # type: ignore[arg-type]
    spec = AttnSpec.of(
        inputs,
        mask=mask,
        scale=scale,
        softcap=softcap,
        score=score,
        normalizer=normalizer,
        dropout_p=dropout_p,
        deterministic=deterministic,
    )
    if dropout_p > 0 and dropout_seed is None:
        inputs = inputs._replace(dropout_seed=new_dropout_seed(query.device))
    asked = dispatch.requested(backend)
    out, lse = reference.plain(spec, inputs) if tracing.transforms_active() else ops.attention(inputs, spec, asked)
    return (out, lse) if return_lse else out


def explain(
    query: Tensor,
    key: Tensor | CacheView,
    value: Tensor | CacheView,
    *,
    backend: str | None = None,
    **arguments: object,
) -> Verdict:
    """What `attention` with the same arguments would run on, forward and backward, and why not on the others.

    Works on meta tensors, computes nothing and builds nothing.

    Returns:
        Verdict with `.backend` of the forward, `.backward` (None where no gradients are wanted), `.kernel` of both,
        `.reasons` and `.backward_reasons` (backend -> None or a sentence), `.notes`; `str()` is a table.

    Raises:
        As `attention` does.
    """
    for name in arguments.keys() - inspect.signature(attention).parameters.keys():
        near = difflib.get_close_matches(name, inspect.signature(attention).parameters, 1)
        raise TypeError(f"explain: attention takes no {name}=" + (f" (nearest: {near[0]})" if near else ""))
    arguments.pop("return_lse", None)
    bias, sinks, seed = (arguments.pop(name, None) for name in ("bias", "sinks", "dropout_seed"))
    if isinstance(key, CacheView) or isinstance(value, CacheView):
        key, value, arguments["mask"] = placed(query, key, value, arguments.get("mask"))
    sharding.refuse_context_parallel()
    narrowed, key, value, bias = _autocast(query, key, value, bias=bias)
    inputs = AttnInputs(narrowed, key, value, bias, sinks, seed)  # type: ignore[arg-type]
    spec = AttnSpec.of(inputs, **arguments)  # type: ignore[arg-type]
    notes = ["second derivatives, forward-mode differentiation and functorch transforms run plain PyTorch"]
    if inputs.query.dtype != query.dtype:
        notes.append(f"autocast turns {query.dtype} into {inputs.query.dtype}")
    return dispatch.verdict(spec, inputs, backend, notes)


def attention_weights(
    query: Tensor,
    key: Tensor | CacheView,
    *,
    lse: Tensor | None = None,
    mask: Mask | Tensor | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    heads: str = "all",
    rows: Sequence[int] | Tensor | None = None,
) -> Tensor:
    """The exact weights that `attention` uses, before dropout, by a second pass. Differentiable.

    Args:
        query, key, mask, bias, scale, softcap, sinks: as given to `attention`.
        lse: what `attention(..., return_lse=True)` returned; saves the row sums.
        heads: "all" for every head, "mean" for their average.
        rows: the queries wanted, ints or an int tensor [n]; negative ones count from the end. All when None.

    Returns:
        [batch, num_heads, n or q_len, kv_len], or [batch, n or q_len, kv_len] for the mean; float32 (float64 for
        float64). Rows that see no key are 0; with sinks a row sums to less than 1.

    Raises:
        ValueError: arguments that do not fit, or weights of more than MOST_WEIGHTS bytes.
    """
    if isinstance(key, CacheView):
        key, _, mask = placed(query, key, key.cache.value, mask)
    return all_weights(
        query, key, lse=lse, mask=mask, bias=bias, scale=scale, softcap=softcap, sinks=sinks, heads=heads, rows=rows,
        most=MOST_WEIGHTS,
    )  # fmt: skip


def all_weights(
    query: Tensor,
    key: Tensor,
    *,
    lse: Tensor | None = None,
    mask: Mask | Tensor | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    heads: str = "all",
    rows: Sequence[int] | Tensor | None = None,
    most: int | None = None,
) -> Tensor:
    """`attention_weights` of as many bytes as there is memory for, or of `most`."""
    if heads not in ("all", "mean"):
        raise ValueError(f"heads: 'all' or 'mean' is needed, got {heads!r}")
    sharding.refuse_context_parallel()
    query, key, bias = _autocast(query, key, bias=bias)
    inputs = AttnInputs(query, key, key, bias, sinks)
    spec = AttnSpec.of(inputs, mask=mask, scale=scale, softcap=softcap)
    if lse is not None:
        _check_lse(lse, query)
    index = None if rows is None else _row_index(rows, spec)
    if most is not None:
        _check_weights(spec, spec.q_len if index is None else len(index), heads, most)
    return ops.attention_weights(inputs, spec, dispatch.requested(None), lse, index, mean=heads == "mean")


def _check_weights(spec: AttnSpec, count: int, heads: str, most: int) -> None:
    """No more bytes than `most`, and what else there is to ask for."""
    item = 8 if spec.dtype == torch.float64 else 4
    mean = spec.batch * count * spec.kv_len * item
    size = mean if heads == "mean" else mean * spec.num_heads
    if size <= most:
        return
    averaged = f"heads='mean' takes {say_bytes(mean)}; " if heads == "all" else ""
    fit = most * count // size
    few = f"rows=[...] of up to {fit} queries fit" if fit else "fewer keys or sequences at a time fit"
    raise ValueError(
        f"attention_weights: {count} queries by {spec.kv_len} keys would take {say_bytes(size)}, and {say_bytes(most)} "
        f"are allowed; {averaged}{few}; fastattn.functional.MOST_WEIGHTS = {size} allows it"
    )


def say_bytes(count: int) -> str:
    """1536 is 1,536 bytes; with GiB where there are any."""
    return f"{count:,} bytes" + (f" ({count / 2**30:.1f} GiB)" if count >= 2**30 else "")


def _check_lse(lse: Tensor, query: Tensor) -> None:
    if not isinstance(lse, Tensor):
        raise TypeError(f"lse: a tensor is needed, got {type(lse).__name__}")
    want = query.shape[:3]
    if lse.shape != want or lse.device != query.device or not lse.is_floating_point():
        raise ValueError(
            f"lse: floating [batch, num_heads, q_len] = {list(want)} on {query.device} is needed, as attention returns "
            f"it, got {lse.dtype} {list(lse.shape)} on {lse.device}"
        )


def _row_index(rows: Sequence[int] | Tensor, spec: AttnSpec) -> Tensor:
    needed = "rows: a list of ints or an int tensor [n] is needed"
    try:
        index = torch.as_tensor(rows, device=spec.device)
    except (TypeError, ValueError, RuntimeError) as failure:
        raise TypeError(f"{needed}, got {rows!r}") from failure
    if index.dim() != 1 or (not holds_ints(index) and (isinstance(rows, Tensor) or index.numel())):
        raise ValueError(f"{needed}, got {index.dtype} {list(index.shape)}")
    index = index.long()
    if (
        index.device.type == "cpu"
        and not tracing.being_transformed()
        and bool(((index < -spec.q_len) | (index >= spec.q_len)).any())
    ):
        raise ValueError(f"rows: queries from {-spec.q_len} to {spec.q_len - 1} are there, got {index.tolist()}")
    return torch.where(index < 0, index + spec.q_len, index).clamp(0, max(spec.q_len - 1, 0))


def _autocast(*tensors: Tensor, bias: Any) -> tuple[Any, ...]:
    """The tensors and the bias. Under autocast, floating tensors but float64 ones are in its dtype, as torch's SDPA is
    on the lower-precision list; a float32 bias stays.
    """
    if not torch._C._is_any_autocast_enabled():  # a short call's time
        return *tensors, bias
    kind = tensors[0].device.type if isinstance(tensors[0], Tensor) else "meta"
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return *tensors, bias
    dtype = torch.get_autocast_dtype(kind)

    def cast(tensor: Any, *kept: torch.dtype) -> Any:
        floats = isinstance(tensor, Tensor) and tensor.is_floating_point()
        return tensor.to(dtype) if floats and tensor.dtype not in (torch.float64, *kept) else tensor

    return *map(cast, tensors), cast(bias, torch.float32)
