"""The reference: the definition of attention in plain PyTorch, nothing optimised. The oracle of the tests and a
backend.

    t_ij = score(q_i, k_j)                  scale * <q_i, k_j>
    t_ij = softcap * tanh(t_ij / softcap)   where softcap is given
    t_ij = t_ij + bias_ij                   -inf hides, like a mask
    weights_i = normaliser(t_i over the visible keys, sinks)
    weights_ij = weights_ij / (1 - p) where kept by dropout, else 0
    out_i = sum_j weights_ij v_j            lse_i = log sum_j exp(t_ij), before dropout, without the sink

Everything in float32 (float64 for float64 inputs); out in the query's dtype. A row that sees no key gives out 0, lse
-inf and zero gradients. What is hidden from every partner may be NaN or inf; and, unlike in the fused backends, a
non-finite value reaches exactly the rows that see it, forward and backward.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastattn.dropout import dropout_mask
from fastattn.low_parts import NONE, LowParts, not_kept
from fastattn.masked_matmul import masked_sum
from fastattn.spec import AttnInputs, AttnSpec
from fastattn.tracing import autograd_inside_operator, holds_many, without_autocast

if TYPE_CHECKING:
    from fastattn.backends.inputs import Gradients

READS_BLOCKS = READS_BLOCKS_BACKWARD = HAS_BACKWARD = True
LOOKS_AT_STORAGE = False
ROUNDS_LSE: str | None = None


def why_not(spec: AttnSpec) -> str | None:
    """The reference runs everything."""
    return None


def prepare(spec: AttnSpec, *, by_name: bool = False) -> str | None:
    """There is nothing to prepare."""
    return why_not(spec)


def needs_asking(spec: AttnSpec) -> str | None:
    """A free choice takes it where nothing else runs."""
    return None


def why_not_backward(spec: AttnSpec) -> str | None:
    """Its backward runs everything too."""
    return None


def notes(spec: AttnSpec, inputs: AttnInputs) -> list[str]:
    """Nothing is to be said of a verdict that names this backend."""
    return []


def kernel_name(spec: AttnSpec) -> str:
    return "plain PyTorch"


kernel_name_backward = kernel_name


def forward(spec: AttnSpec, inputs: AttnInputs) -> tuple[Tensor, Tensor]:
    """out [batch, num_heads, q_len, head_dim_v], lse [batch, num_heads, q_len]."""
    with torch.no_grad():
        out, lse = plain(spec, inputs)
        return spec.empty_out(inputs.query).copy_(out), lse


def forward_with_low(spec: AttnSpec, inputs: AttnInputs) -> tuple[Tensor, Tensor, LowParts]:
    """out and lse; what their rounding takes is not kept."""
    return not_kept(spec, *forward(spec, inputs))


def backward(
    spec: AttnSpec,
    inputs: AttnInputs,
    out: Tensor,
    lse: Tensor,
    d_out: Tensor,
    d_lse: Tensor | None,
    *,
    wants_dbias: bool = True,
    low: LowParts = NONE,
) -> Gradients:
    """Gradients by differentiating the definition; `out` and `lse` are not needed, and the bias's comes in any case."""
    with autograd_inside_operator(), without_autocast(spec.device):
        leaves = inputs.detached()
        results = plain(spec, leaves)
        d_lse = torch.zeros_like(lse) if d_lse is None else d_lse
        wanted = leaves.differentiable
        grads = torch.autograd.grad(results, wanted, (d_out, d_lse), materialize_grads=True)
    return inputs.in_place_of(map(like, grads, inputs.differentiable))  # type: ignore[return-value]


def weights(
    spec: AttnSpec, inputs: AttnInputs, lse: Tensor | None, rows: Tensor | None, *, mean: bool
) -> Tensor | None:
    """None: `attention_weights` below is the plain formulation."""
    return None


def pull_back(
    spec: AttnSpec, inputs: AttnInputs, lse: Tensor, d_out: Tensor, d_lse: Tensor | None
) -> tuple[Tensor | None, ...]:
    """The same gradients in a way that functorch can transform."""

    def outputs(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        query, key, value, bias, sinks = inputs.in_place_of(tensors)
        return plain(spec, AttnInputs(query, key, value, bias, sinks, inputs.dropout_seed))  # type: ignore[arg-type]

    pull = torch.func.vjp(outputs, *inputs.differentiable)[1]
    return inputs.in_place_of(pull((d_out, torch.zeros_like(lse) if d_lse is None else d_lse)))


def like(grad: Tensor, tensor: Tensor) -> Tensor:
    """The gradient in the dtype and memory layout that `torch.empty_like` of the tensor has: what operators promise."""
    if holds_many(grad):
        return grad
    promised = torch.empty_like(tensor)
    return grad if (grad.dtype, grad.stride()) == (promised.dtype, promised.stride()) else promised.copy_(grad)


def plain(spec: AttnSpec, inputs: AttnInputs) -> tuple[Tensor, Tensor]:
    """The formulation itself: differentiable any number of times, in both modes, under functorch and compilers."""
    with without_autocast(spec.device):
        return _plain(spec, inputs)


def _plain(spec: AttnSpec, inputs: AttnInputs) -> tuple[Tensor, Tensor]:
    query, key, value, bias, sinks, seed = inputs
    if spec.pages is not None:
        key, value = spec.pages.laid_out(key), spec.pages.laid_out(value)
    keep = visibility(spec, bias, query.device)
    if spec.kv_len == 0:
        # One key that nobody sees stands for none, as reductions over nothing are not defined.
        key, value, keep = (torch.nn.functional.pad(t, pad) for t, pad in ((key, _ROW), (value, _ROW), (keep, _COLUMN)))
        bias = None
    query, key, value = (widen(tensor) for tensor in (query, key, value))
    seen_by_query = keep.any(-1, keepdim=True)  # [.., q_len, 1]
    seen_by_head = keep.any(-2).unsqueeze(-1).expand(-1, spec.num_heads, -1, -1)  # [.., num_heads, kv_len, 1]
    query = torch.where(seen_by_query, query, 0.0)
    key, value = (torch.where(seen_by_head, per_query_head(spec, tensor), 0.0) for tensor in (key, value))
    scores = raw_scores(spec, query, key, bias, keep)
    weights, lse = spec.normalizer.eager(scores, keep, sinks)
    if spec.dropout_p > 0:
        weights = apply_dropout(spec, weights, seed)
    out = masked_sum(weights, value, keep)
    return torch.where(seen_by_query, out, 0.0).to(spec.dtype), lse


def attention_weights(spec: AttnSpec, inputs: AttnInputs, lse: Tensor | None, rows: Tensor | None = None) -> Tensor:
    """weights [batch, num_heads, q_len or len(rows), kv_len], before dropout; from lse by one exponential each where
    given.
    """
    with without_autocast(spec.device):
        return _attention_weights(spec, inputs, lse, rows)


def _attention_weights(spec: AttnSpec, inputs: AttnInputs, lse: Tensor | None, rows: Tensor | None) -> Tensor:
    query, key, _, bias, sinks, _ = inputs
    key = key if spec.pages is None else spec.pages.laid_out(key)
    keep = visibility(spec, bias, query.device)
    seen_by_head = keep.any(-2).unsqueeze(-1).expand(-1, spec.num_heads, -1, -1)
    if rows is not None:
        query, keep = query[:, :, rows], keep[:, :, rows]
        bias = bias[..., rows, :] if bias is not None and bias.dim() > 1 and bias.shape[-2] > 1 else bias
        lse = None if lse is None else lse[..., rows]
    query = torch.where(keep.any(-1, keepdim=True), widen(query), 0.0)
    key = torch.where(seen_by_head, per_query_head(spec, widen(key)), 0.0)
    scores = raw_scores(spec, query, key, bias, keep)
    if spec.kv_len == 0:
        return scores  # nothing, differentiably
    if lse is None:
        return spec.normalizer.eager(scores, keep, sinks)[0]
    return spec.normalizer.from_lse(scores, keep, sinks, lse)


def visibility(spec: AttnSpec, bias: Tensor | None, device: torch.device) -> Tensor:
    """bool [batch or 1, num_heads or 1, q_len, kv_len]: the mask, and no -inf in the bias."""
    keep = spec.mask.dense(spec.q_len, spec.kv_len, device=device)
    return keep if bias is None else keep & (bias != -torch.inf)


def raw_scores(spec: AttnSpec, query: Tensor, key: Tensor, bias: Tensor | None, keep: Tensor) -> Tensor:
    """t before the normaliser, [batch, num_heads, q_len, kv_len]; hidden pairs hold 0."""
    scores = spec.score.eager(query, key, spec.scale, keep)
    if spec.softcap is not None:
        scores = spec.softcap * torch.tanh(scores / spec.softcap)
    if bias is not None:
        scores = scores + torch.where(bias == -torch.inf, 0.0, bias)
    return scores


def apply_dropout(spec: AttnSpec, weights: Tensor, seed: Tensor | None) -> Tensor:
    """Weights times their keep bits, divided by the probability of being kept."""
    if seed is None:
        raise ValueError("dropout_seed: a seed is needed where dropout_p > 0")
    kept = dropout_mask(*weights.shape, p=spec.dropout_p, seed=seed)
    return torch.where(kept, weights / max(1.0 - spec.dropout_p, torch.finfo(weights.dtype).tiny), 0.0)


def widen(tensor: Tensor) -> Tensor:
    """float32, or float64 where the tensor is."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def per_query_head(spec: AttnSpec, tensor: Tensor) -> Tensor:
    """[batch, num_kv_heads, ...] -> [batch, num_heads, ...]: query head h reads key head h // group."""
    return tensor if spec.group == 1 else tensor.repeat_interleave(spec.group, 1)


_ROW, _COLUMN = (0, 0, 0, 1), (0, 1)
