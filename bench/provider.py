"""What a provider is: it says why it cannot run a case, else makes the callable that is checked and timed."""

from __future__ import annotations

import torch

from fastattn.bench.problem import Made, Problem
from fastattn.bench_cases import BenchCase


class Provider:
    """Base: a name, a reason not to run, a callable."""

    name: str
    compiles = False
    """Whether each size is compiled anew, so that a tiny call says nothing of a large one's overhead."""

    def why_not(self, problem: Problem, mode: str) -> str | None:
        """A short reason why this provider cannot run `mode` of `problem`, or None."""
        return None

    def extra_bytes(self, case: BenchCase, mode: str, device: torch.device) -> int:
        """Bytes, about, that `mode` of `case` will take beside its inputs and outputs."""
        return 0

    def make(self, problem: Problem) -> Made:
        raise NotImplementedError
