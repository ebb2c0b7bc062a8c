"""fastattn in torch's own registry of flash-attention implementations.

    import torch
    from fastattn.integrations.torch import registry

    registry.register()                                         # offers it, and changes nothing
    torch.nn.attention.activate_flash_attention_impl("fastattn")
    ...                                                         # F.scaled_dot_product_attention, varlen_attn
    torch.nn.attention.restore_flash_attention_impl()

While it is active, the operators that torch's selector sends flash attention to are computed by fastattn, on CPU and
CUDA, for every library, thread and compiled graph; `torch.nn.attention.varlen.varlen_attn` then runs on a CPU too. What
the selector sends elsewhere (its math, memory-efficient and cuDNN ways) stays torch's. Importing this registers
nothing.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from fastattn import ops
from fastattn.dropout import new_dropout_seed
from fastattn.integrations.flash_attn import cache as flash_cache
from fastattn.masks import Causal, Full, Mask, Packed, Window
from fastattn.masks.base import check_ints
from fastattn.spec import AttnInputs, AttnSpec

NAME = "fastattn"


def register() -> str:
    """Offer fastattn to `torch.nn.attention.activate_flash_attention_impl`, by the name this returns.

    Raises:
        RuntimeError: this torch has no such registry.
    """
    import torch.nn.attention

    offer = getattr(torch.nn.attention, "register_flash_attention_impl", None)
    if offer is None:
        raise RuntimeError(
            f"torch {torch.__version__} has no registry of flash-attention implementations; fastattn.patch() reaches "
            "every F.scaled_dot_product_attention without one"
        )
    offer(NAME, register_fn=_activate)
    return NAME


class _Handle:
    """What keeps the operators' exchange alive; torch's registry removes it."""

    def __init__(self, libraries: list[torch.library.Library]) -> None:
        self.libraries = libraries

    def remove(self) -> None:
        while self.libraries:
            self.libraries.pop()._destroy()


def _activate() -> _Handle:
    places: dict[str, dict[str, Any]] = {
        "CPU": {
            "_scaled_dot_product_flash_attention_for_cpu": _for_cpu,
            "_scaled_dot_product_flash_attention_for_cpu_backward": _for_cpu_backward,
        },
        "CUDA": {
            "_scaled_dot_product_flash_attention": _for_cuda,
            "_scaled_dot_product_flash_attention_backward": _for_cuda_backward,
        },
    }
    libraries = []
    for key, functions in places.items():
        library = torch.library.Library("aten", "IMPL", key)
        packed = {"_flash_attention_forward": _packed, "_flash_attention_backward": _packed_backward}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Warning only once for all operators|Overriding a previously registered")
            for name, function in (functions | packed).items():
                library.impl(name, function, key, allow_override=True)
        libraries.append(library)
    return _Handle(libraries)


def _forward(
    query: Tensor, key: Tensor, value: Tensor, mask: Mask, bias: Tensor | None, dropout_p: float, scale: float | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """out, lse and the dropout's seed; below autograd, which is torch's affair."""
    seed = new_dropout_seed(query.device) if dropout_p > 0 else None
    inputs = AttnInputs(query, key, value, bias, None, seed)
    with torch.no_grad():
        spec = AttnSpec.of(inputs, mask=mask, scale=scale, dropout_p=dropout_p)
        out, lse = ops.attention(inputs, spec, None)
    return out, lse, seed


def _backward(
    d_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: Mask,
    bias: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
    scale: float | None,
) -> tuple[Tensor, ...]:
    inputs = AttnInputs(query, key, value, bias, None, seed)
    with torch.no_grad():
        spec = AttnSpec.of(inputs, mask=mask, scale=scale, dropout_p=dropout_p)
        return ops.BACKWARD(d_out, None, out, lse.contiguous(), None, None, *inputs, *spec.flat(), "")[:3]


def _causal(is_causal: bool) -> Mask:
    return Causal(align="top-left") if is_causal else Full()


def _for_cpu(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    out, lse, _ = _forward(query, key, value, _causal(is_causal), attn_mask, dropout_p, scale)
    # The layouts that torch's own kernel has, and its compiler counts on.
    return torch.empty_like(query).copy_(out), lse.transpose(1, 2).contiguous().transpose(1, 2)


def _for_cpu_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    dropout_p: float,
    is_causal: bool,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, ...]:
    grads = _backward(
        grad_out, query, key, value, out, logsumexp, _causal(is_causal), attn_mask, dropout_p, None, scale
    )
    return tuple(torch.empty_permuted(grad.shape, (0, 2, 1, 3), dtype=grad.dtype).copy_(grad) for grad in grads)


def _for_cuda(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    return_debug_mask: bool = False,
    *,
    scale: float | None = None,
) -> tuple[Any, ...]:
    _refuse(return_debug_mask=return_debug_mask)
    out, lse, seed = _forward(query, key, value, _causal(is_causal), None, dropout_p, scale)
    # empty_like keeps the query's layout, as torch's own kernel does.
    out = torch.empty_like(query).copy_(out) if out.stride() != query.stride() else out
    return out, lse, None, None, query.shape[2], key.shape[2], *_random_state(query, seed)


def _for_cuda_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    philox_seed: Tensor,
    philox_offset: Tensor,
    *,
    scale: float | None = None,
) -> tuple[Tensor, ...]:
    seed = _seed(philox_seed, dropout_p)
    return _backward(grad_out, query, key, value, out, logsumexp, _causal(is_causal), None, dropout_p, seed, scale)


def _packed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    return_debug_mask: bool,
    *,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
    seqused_k: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    block_table: Tensor | None = None,
    num_splits: int | None = None,
) -> tuple[Any, ...]:
    _refuse(return_debug_mask=return_debug_mask, alibi_slopes=alibi_slopes)
    if block_table is not None and seqused_k is not None and cum_seq_q is not None:
        check_ints("varlen_attn", seqused_k=seqused_k)
        cum_seq_k = torch.nn.functional.pad(seqused_k.cumsum(0, dtype=torch.int32), (1, 0))
        key, value = flash_cache.tokens(key, value, block_table, cum_seq_k)
    else:
        _refuse(seqused_k=seqused_k, block_table=block_table)
    mask = _inside(cum_seq_q, cum_seq_k, is_causal, window_size_left, window_size_right)
    packed = query.dim() == 3
    query, key, value = _heads_first(query, key, value)
    out, lse, seed = _forward(query, key, value, mask, None, dropout_p, scale)
    out = out[0].transpose(0, 1) if packed else out.transpose(1, 2)
    return out.contiguous(), lse[0] if packed else lse, *_random_state(query, seed)


def _packed_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    rng_state: Tensor,
    unused: Tensor,
    *,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
) -> tuple[Tensor, ...]:
    packed = query.dim() == 3
    mask = _inside(cum_seq_q, cum_seq_k, is_causal, window_size_left, window_size_right)
    grad_out, query, key, value, out = _heads_first(grad_out, query, key, value, out)
    lse, seed = logsumexp[None] if packed else logsumexp, _seed(rng_state, dropout_p)
    grads = _backward(grad_out, query, key, value, out, lse, mask, None, dropout_p, seed, scale)
    return tuple((grad[0].transpose(0, 1) if packed else grad.transpose(1, 2)).contiguous() for grad in grads)


def _inside(
    cum_seq_q: Tensor | None, cum_seq_k: Tensor | None, is_causal: bool, left: int | None, right: int | None
) -> Mask:
    """flash-attn's alignment, bottom-right, and its windows, where a negative side has no end."""
    sides = tuple(None if side is None or side < 0 else side for side in (left, right))
    mask: Mask = Window(sides[0], 0 if is_causal else sides[1])
    if cum_seq_q is None:
        return mask
    return Packed(cum_seq_q, cum_seq_q if cum_seq_k is None else cum_seq_k, mask)


def _heads_first(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(tensor.transpose(0, 1)[None] if tensor.dim() == 3 else tensor.transpose(1, 2) for tensor in tensors)


def _random_state(query: Tensor, seed: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """What torch carries from forward to backward: our seed in the first of two words; no offset; no debug mask."""
    state = torch.zeros(2, dtype=torch.int64, device=query.device)
    if seed is not None:
        state[:1] = seed
    return state.view(torch.uint64), torch.zeros((), dtype=torch.uint64, device=query.device), query.new_empty(0)


def _seed(state: Tensor, dropout_p: float) -> Tensor | None:
    return state.view(torch.int64)[:1].clone() if dropout_p > 0 else None


def _refuse(**asked: Any) -> None:
    for name, value in asked.items():
        if value is not None and value is not False:
            raise NotImplementedError(
                f"{name}: the flash-attention implementation 'fastattn' does not take it; "
                "torch.nn.attention.restore_flash_attention_impl() puts torch's own back"
            )
