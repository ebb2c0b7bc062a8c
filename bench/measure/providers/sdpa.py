"""Who computes: fastattn, by backend, beside PyTorch's own attentions; other libraries are in peers.py.

Masks become what each provider's users would pass, before the clock starts; the memory such a mask takes is counted.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastattn
from fastattn.bench.cases.module import TorchModule, forward_alone, made_of
from fastattn.bench.cases.operations import OPS, BenchCase, known
from fastattn.bench.cases.workload import Made, Workload, recording, tiny
from fastattn.bench.measure import estimate
from fastattn.bench.measure.env import cxx
from fastattn.bench.measure.providers.base import Provider
from fastattn.bench.measure.providers.peers import PEERS
from fastattn.bench.measure.providers.read import Read
from fastattn.dispatch import BACKENDS
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


class Fastattn(Provider):
    """fastattn.attention, or what stands in for PyTorch's own call; `backend` None lets it choose."""

    bias = dropout = value_dim = True

    def __init__(self, backend: str | None = None):
        self.backend = backend
        self.name = "fastattn" if backend is None else f"fastattn-{backend}"
        self.forms = ("4-D", "3-D", "3-D mask", "module") if backend is None else ("4-D", "module")

    def why_not(self, workload: Workload, mode: str) -> str | None:
        try:
            _explain(workload, mode, self.backend)
        except fastattn.BackendUnavailable:
            free = _explain(workload, mode)
            return free.reasons[self.backend] or free.backward_reasons.get(self.backend)
        return super().why_not(workload, mode) or forward_alone(workload, mode)

    def extra_bytes(self, case: BenchCase, mode: str, device: torch.device) -> int:
        try:
            found = _explain(Workload(tiny(case), device), mode, self.backend)
        except fastattn.BackendUnavailable:
            return 0
        return estimate.plain_bytes(case, mode) if "reference" in (found.backend, found.backward) else 0

    def make(self, workload: Workload, mode: str) -> Made:
        mask, backend, seed, dropout_p = workload.mask, self.backend, workload.seed, workload.op.dropout_p
        label = say_backends(_explain(workload, mode, backend))
        if workload.op.form == "module":
            return made_of(workload, fastattn.nn.MultiheadAttention, label, backend=backend)
        if workload.op.form != "4-D":
            return as_torch_calls(fastattn.scaled_dot_product_attention, workload, label)
        start = time.perf_counter()
        workload.op.mask(workload.case, workload.device)
        mask_s = time.perf_counter() - start

        def forward(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
            return fastattn.attention(
                query, key, value, mask=mask, bias=bias, dropout_p=dropout_p, dropout_seed=seed, backend=backend
            )

        return Made(forward, label, mask_s=mask_s)


def _explain(workload: Workload, mode: str, backend: str | None = None) -> fastattn.Verdict:
    """What fastattn runs `mode` on: a forward alone wants no gradients, and may run where there is no backward."""
    query, key, value, *bias = workload.tensors(mode)
    with recording(mode):
        return fastattn.explain(
            query,
            key,
            value,
            mask=workload.mask,
            bias=bias[0] if bias else None,
            dropout_p=workload.op.dropout_p,
            backend=backend,
        )


def say_backends(verdict: fastattn.Verdict) -> str:
    """A row's label: who computes, forward + backward where two do."""
    return " + ".join(dict.fromkeys(filter(None, (verdict.backend, verdict.backward))))


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


def provider(name: str) -> Provider:
    """The provider of that name; ValueError lists them."""
    every = known_providers()
    known("providers", [name], every)
    return every[name]


def known_providers() -> dict[str, Provider]:
    every = [Fastattn(), *map(Fastattn, BACKENDS), Sdpa(), *map(Sdpa, SDPA_BACKENDS), Flex(), TorchModule(), Read()]
    every += PEERS.values()
    return {each.name: each for each in every}
