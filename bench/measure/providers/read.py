"""A ceiling for decoding, which is bound by memory: the time in which a plain loop reads the same keys and values."""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn.bench.cases.workload import Made, Workload
from fastattn.bench.measure.providers.base import Provider


class Read(Provider):
    """Adds up keys and values as 64-bit integers: every byte is read once, by torch's threads, and no more is done."""

    name = "read"
    attends = False

    def why_not(self, workload: Workload, mode: str) -> str | None:
        if mode != "fwd":
            return "reads once, for the forward"
        if workload.case.q_len > 1:
            return "bounds one query alone"
        return super().why_not(workload, mode)

    def make(self, workload: Workload, mode: str) -> Made:
        def forward(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return key.view(torch.int64).sum() + value.view(torch.int64).sum()

        return Made(forward, "read loop")
