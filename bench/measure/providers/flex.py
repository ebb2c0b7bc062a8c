"""FlexAttention, compiled."""

from __future__ import annotations

import importlib.util
import time
from typing import Any

import torch
from torch import Tensor

from fastattn.bench.cases.workload import Made, Workload, recording
from fastattn.bench.measure.env import cxx
from fastattn.bench.measure.providers.base import Provider
from fastattn.masks import Full


class Flex(Provider):
    """torch.nn.attention.flex_attention, compiled; block masks are made from the mask's own row intervals."""

    name = "flex"
    compiles = value_dim = True

    def why_not(self, workload: Workload, mode: str) -> str | None:
        if workload.device.type == "cpu":
            if cxx() is None:
                return "no C++ compiler"
            if mode != "fwd":
                return "no backward on CPU"
        elif importlib.util.find_spec("triton") is None:
            return "no Triton"
        if workload.mask.intervals(workload.case.q_len, workload.case.kv_len, workload.device) is None:
            return "mask without a rule"
        return super().why_not(workload, mode)

    def make(self, workload: Workload, mode: str) -> Made:
        from torch.nn.attention.flex_attention import flex_attention

        # Each case is compiled anew and for its own sizes; the compiler's limit on versions of one function stays away.
        torch.compiler.reset()
        compiled = torch.compile(flex_attention, dynamic=False)
        start = time.perf_counter()
        block_mask, prepared = _block_mask(workload)
        mask_s = time.perf_counter() - start
        enable_gqa = workload.case.num_heads != workload.case.num_kv_heads

        def forward(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return compiled(query, key, value, block_mask=block_mask, enable_gqa=enable_gqa)

        start = time.perf_counter()
        leaves = workload.tensors(mode)
        with recording(mode):
            out = forward(*leaves)
        if mode != "fwd":
            torch.autograd.grad(out, leaves, workload.d_out)
        if workload.device.type == "cuda":
            torch.cuda.synchronize()
        return Made(forward, "compiled", time.perf_counter() - start, prepared, mask_s)


def _block_mask(workload: Workload) -> tuple[Any, int]:
    """FlexAttention's block mask (None where all is visible) and its bytes."""
    from torch.nn.attention.flex_attention import create_block_mask

    case, mask = workload.case, workload.mask
    if isinstance(mask, Full):
        return None, 0
    [(start, stop)] = mask.intervals(case.q_len, case.kv_len, workload.device)  # type: ignore[misc]
    rows = torch.broadcast_shapes(start.shape, (start.dim() and 1, 1, case.q_len))
    start, stop = start.expand(rows).int().contiguous(), stop.expand(rows).int().contiguous()
    many_batches, many_heads = rows[0] > 1, rows[1] > 1

    def visible(batch: Tensor, head: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        row = (batch if many_batches else 0, head if many_heads else 0, q_idx)
        return (kv_idx >= start[row]) & (kv_idx < stop[row])

    block_mask = create_block_mask(
        visible,
        rows[0] if many_batches else None,
        rows[1] if many_heads else None,
        case.q_len,
        case.kv_len,
        device=str(workload.device),
    )
    tensors = [part for part in block_mask.as_tuple() if isinstance(part, Tensor)] + [start, stop]
    return block_mask, sum(tensor.numel() * tensor.element_size() for tensor in tensors)
