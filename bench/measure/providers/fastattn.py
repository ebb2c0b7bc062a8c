"""fastattn itself: the backend of its choice, or one by name."""

from __future__ import annotations

import time

import torch
from torch import Tensor

import fastattn
from fastattn.bench.cases.operations import BenchCase
from fastattn.bench.cases.workload import Made, Workload, recording, tiny
from fastattn.bench.measure import estimate
from fastattn.bench.measure.providers.base import Provider
from fastattn.bench.measure.providers.module import forward_alone, made_of
from fastattn.bench.measure.providers.sdpa import as_torch_calls


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
