"""The two products of attention over visible pairs only, each the other's derivative.

    masked_scores(x, y, keep)_ij = <x_i, y_j>               where keep_ij, else 0
    masked_sum(w, y, keep)_i     = sum_j w_ij y_j           over the j with keep_ij

A plain matrix product multiplies hidden pairs by 0, and 0 * NaN is NaN. These two leave hidden pairs out, forward and
in every derivative, so that a non-finite row reaches only its partners. Under compilers and functorch they are plain
products.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn.tracing import being_transformed, holds_many


def masked_scores(x: Tensor, y: Tensor, keep: Tensor) -> Tensor:
    """x [..., q_len, d], y [..., kv_len, d], keep bool broadcastable to [..., q_len, kv_len] -> [..., q_len,
    kv_len].
    """
    return torch.where(keep, x @ y.mT, 0.0) if being_transformed() else _Scores.apply(x, y, keep)


def masked_sum(weights: Tensor, y: Tensor, keep: Tensor) -> Tensor:
    """weights, keep [..., q_len, kv_len], y [..., kv_len, d] -> [..., q_len, d]."""
    return torch.where(keep, weights, 0.0) @ y if being_transformed() else _Sum.apply(weights, y, keep)


class _Scores(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, y: Tensor, keep: Tensor) -> Tensor:
        ctx.save_for_backward(x, y, keep)
        return torch.where(keep, x @ y.mT, 0.0)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, y, keep = ctx.saved_tensors
        return masked_sum(grad, y, keep), masked_sum(grad.mT, x, keep.mT), None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weights: Tensor, y: Tensor, keep: Tensor) -> Tensor:
        ctx.save_for_backward(weights, y, keep)
        visible = torch.where(keep, weights, 0.0)
        if not _can_look(y) or bool(y.isfinite().all()):
            return visible @ y
        rows = [
            (visible[..., i, :, None] * torch.where(keep[..., i, :, None], y, 0.0)).sum(-2)
            for i in range(weights.shape[-2])
        ]
        return torch.stack(rows, -2) if rows else visible @ y

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        weights, y, keep = ctx.saved_tensors
        return masked_scores(grad, y, keep), masked_sum(weights.mT, grad, keep.mT), None


def _can_look(tensor: Tensor) -> bool:
    """Whether values may be read: not while a CUDA graph is being captured, nor where there are none, or many."""
    if holds_many(tensor):
        return False
    if tensor.is_cuda:
        return not torch.cuda.is_current_stream_capturing()
    return type(tensor) is Tensor and tensor.device.type == "cpu"
