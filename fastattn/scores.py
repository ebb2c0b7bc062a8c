"""Scores and normalisers: how a query and a key make a number, and how a row of numbers becomes weights.

`eager` is the definition, in plain differentiable PyTorch. One of each exists today; kernels name them by class, so
another is a class here and a rule in each backend.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastattn.masked_matmul import masked_scores

LARGE_LSE = 1024.0
"""From here on a float32 lse is too coarse for exp(score - lse) to be the weight."""


@dataclass(frozen=True)
class DotProduct:
    """score(q, k) = scale * <q, k>  (Vaswani et al. 2017, "Attention is all you need", eq. 1)."""

    def eager(self, query: Tensor, key: Tensor, scale: float, keep: Tensor) -> Tensor:
        """query [..., q_len, head_dim], key [..., kv_len, head_dim] -> scores [..., q_len, kv_len], 0 where hidden."""
        return masked_scores(query, key, keep) * scale  # a product beyond the dtype's range is one, whatever the scale


@dataclass(frozen=True)
class Softmax:
    """weights_ij = exp(t_ij) / (sum_j' exp(t_ij') + exp(sink_h)) over the visible keys j'; without sinks the last
    term is 0.

    A row that sees nothing gets weights 0 and lse -inf. A score below the dtype's range, -inf, hides its key like a
    mask; one above it, inf, has no weights beside it: its row is NaN, and its lse inf. The sink is gpt-oss's learned
    logit per head (OpenAI 2025); it takes weight and adds no value. lse is the natural log of the visible sum, without
    the sink.
    """

    def eager(self, scores: Tensor, keep: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
        """scores [..., num_heads, q_len, kv_len], keep bool broadcastable to it, sinks [num_heads] -> weights, lse."""
        keep = keep & (scores != -torch.inf)
        some = keep.any(-1, keepdim=True)
        # A row that sees nothing is computed as if it held zeros and overwritten after: its gradients are 0, not NaN.
        visible = torch.where(keep, scores, torch.where(some, -torch.inf, 0.0).to(scores.dtype))
        lse = visible.logsumexp(-1, keepdim=True)
        # Not exp(visible - lse): beside a huge score lse loses the logarithm of how many keys share it.
        weights = torch.where(keep, visible.softmax(-1), 0.0)
        if sinks is not None:
            total = torch.logaddexp(lse, sinks.to(scores.dtype)[:, None, None])
            weights = weights * (lse - total).exp()
        return weights, torch.where(some, lse, -torch.inf).squeeze(-1)

    def from_lse(self, scores: Tensor, keep: Tensor, sinks: Tensor | None, lse: Tensor) -> Tensor:
        """The same weights from a row's lse [..., num_heads, q_len], by one exponential each. Where lse is large its
        rounding would be seen in them, and they are divided by their own sum.
        """
        known = torch.where(lse == -torch.inf, 0.0, torch.where(lse == torch.inf, torch.nan, lse)).unsqueeze(-1)
        weights = torch.where(keep, scores - known, -torch.inf).exp()
        whole = weights.sum(-1, keepdim=True)
        weights = weights / torch.where((known.abs() >= LARGE_LSE) & (whole > 0), whole, 1.0)
        if sinks is not None:
            total = torch.logaddexp(known, sinks.to(scores.dtype)[:, None, None])
            weights = weights * (known - total).exp()
        return weights
