"""PyTorch's scaled_dot_product_attention, its own choice of kernel or one by name; and the calls that stand in for it.

Masks become what each provider's users would pass, before the clock starts; the memory such a mask takes is counted.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn.bench.cases.operations import OPS, BenchCase
from fastattn.bench.cases.workload import Made, Workload
from fastattn.bench.measure import estimate
from fastattn.bench.measure.providers.base import Provider
from fastattn.masks import Causal, Full

SDPA_BACKENDS = {
    "math": "MATH",
    "flash": "FLASH_ATTENTION",
    "efficient": "EFFICIENT_ATTENTION",
    "cudnn": "CUDNN_ATTENTION",
}
CUDA_ONLY = ("efficient", "cudnn")
BARE = "self"
"""The operation with nothing but queries, keys and values."""


class Sdpa(Provider):
    """torch.nn.functional.scaled_dot_product_attention, PyTorch's own choice of kernel or one by name.

    is_causal where that says the mask, no mask where all is visible, else the bool table that its users build. Its
    dropout draws bits of its own: what is checked is the same call without.
    """

    forms = ("4-D", "3-D", "3-D mask")
    bias = dropout = value_dim = True

    def __init__(self, kernel: str | None = None):
        self.kernel = kernel
        self.name = "sdpa" if kernel is None else f"sdpa-{kernel}"

    def why_not(self, workload: Workload, mode: str) -> str | None:
        if self.kernel in CUDA_ONLY and workload.device.type != "cuda":
            return "needs CUDA"
        return super().why_not(workload, mode)

    def extra_bytes(self, case: BenchCase, mode: str, device: torch.device) -> int:
        op = OPS[case.op]
        # PyTorch's fused kernel on a CPU takes none of these.
        other = op.dropout_p or op.bias or op.form != "4-D" or case.value_dim != case.head_dim
        unfused = self.kernel == "math" or (device.type == "cpu" and other)
        return (estimate.plain_bytes(case, mode) if unfused else 0) + estimate.mask_bytes(case)

    def make(self, workload: Workload, mode: str) -> Made:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        made = as_torch_calls(F.scaled_dot_product_attention, workload, self.kernel or "")
        if workload.op.dropout_p:
            made.checked_as = (
                BARE,
                as_torch_calls(F.scaled_dot_product_attention, workload, "", dropout=False).forward,
            )
        if self.kernel is not None:
            backend = getattr(SDPBackend, SDPA_BACKENDS[self.kernel])
            forward = made.forward

            def by_kernel(*leaves: Tensor) -> Tensor:
                with sdpa_kernel(backend):
                    return forward(*leaves)

            made.forward = by_kernel
        return made


def as_torch_calls(function: Callable[..., Tensor], workload: Workload, label: str, *, dropout: bool = True) -> Made:
    """A workload as a call of `scaled_dot_product_attention`, PyTorch's or the one that stands in for it."""
    case, mask, op = workload.case, workload.mask, workload.op
    is_causal = isinstance(mask, Causal) and case.q_len == case.kv_len
    visible = isinstance(mask, Full) or is_causal
    start = time.perf_counter()
    table = None if visible else mask.dense(case.q_len, case.kv_len, device=workload.device)
    mask_s = time.perf_counter() - start
    if table is not None and op.form == "3-D mask":
        table = table[0]
    options: dict[str, Any] = {"is_causal": is_causal, "dropout_p": op.dropout_p if dropout else 0.0}
    if case.num_heads != case.num_kv_heads:
        options["enable_gqa"] = True

    def forward(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
        return function(query, key, value, attn_mask=table if bias is None else bias, **options)

    return Made(
        forward,
        label,
        prepared_bytes=0 if table is None else table.numel(),
        mask_s=mask_s,
        layout="hld" if op.form == "3-D" else "bhld",
    )
