"""What a provider is: it says why it cannot run a case, else makes the callable that is checked and timed."""

from __future__ import annotations

import torch

from fastattn.bench.cases.operations import BenchCase
from fastattn.bench.cases.workload import Made, Workload


class Provider:
    """Base: a name, a reason not to run, a callable."""

    name: str
    compiles = False
    """Whether each size is compiled anew, so that a tiny call says nothing of a large one's overhead."""
    forms: tuple[str, ...] = ("4-D",)
    """Forms of a call, by `Op`, that it takes."""
    bias = dropout = value_dim = False
    """Whether it takes a learned bias, drops weights, has values of another width than keys."""
    attends = True
    """Whether it computes attention; a ceiling does not, and is not checked as if it did."""

    def why_not(self, workload: Workload, mode: str) -> str | None:
        """A short reason why this provider cannot run `mode` of `workload`, or None."""
        op, case = workload.op, workload.case
        if op.form not in self.forms:
            return f"no {op.form} call"
        if op.form == "3-D" and case.batch > 1:
            return f"3-D tensors have no batch, and {case.batch} were asked for"
        if op.form == "module" and (case.num_heads, case.q_len, case.head_dim) != (
            case.num_kv_heads,
            case.kv_len,
            case.value_dim,
        ):
            return "a module looks at itself: one length, one head dim, no shared key heads"
        if op.bias and not self.bias:
            return "no learned bias"
        if op.dropout_p and not self.dropout:
            return "no dropout"
        if case.value_dim != case.head_dim and not self.value_dim:
            return f"no values of width {case.value_dim} with keys of {case.head_dim}"
        return None

    def extra_bytes(self, case: BenchCase, mode: str, device: torch.device) -> int:
        """Bytes, about, that `mode` of `case` will take beside its inputs and outputs."""
        return 0

    def make(self, workload: Workload, mode: str) -> Made:
        """What runs `mode` of `workload`: compiled, built and labelled for this mode."""
        raise NotImplementedError
