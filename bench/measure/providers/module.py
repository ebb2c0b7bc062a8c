"""torch.nn.MultiheadAttention, and the modules that stand in for it."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from fastattn.bench.cases.module import ModuleWorkload
from fastattn.bench.cases.workload import Made, Workload
from fastattn.bench.measure.providers.base import Provider


class TorchModule(Provider):
    """torch.nn.MultiheadAttention with torch's own defaults: in evaluation it takes torch's fast path."""

    name = "mha"
    forms = ("module",)

    def why_not(self, workload: Workload, mode: str) -> str | None:
        return super().why_not(workload, mode) or forward_alone(workload, mode)

    def make(self, workload: Workload, mode: str) -> Made:
        return made_of(workload, nn.MultiheadAttention, "torch.nn.MultiheadAttention")


def made_of(workload: Workload, kind: Callable[..., nn.Module], label: str, **more: object) -> Made:
    if not isinstance(workload, ModuleWorkload):
        raise ValueError(f"{label} needs a case in the form of a module, got {workload.case.name}")
    return Made(workload.filled(kind, **more), label)


def forward_alone(workload: Workload, mode: str) -> str | None:
    """Why a mode of a module in evaluation is not timed."""
    return "evaluation has no backward" if workload.op.form == "module" and mode != "fwd" else None
