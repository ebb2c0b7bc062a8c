"""nn.MultiheadAttention as people call it: one input for query, key and value, projections inside, weights asked for.

`ModuleWorkload` beside `Workload`: the same sizes, but weights of a module and an input [batch, length, embed_dim] with
embed_dim = num_heads * head_dim.
"""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastattn import testing
from fastattn.bench.cases.operations import OPS, BenchCase
from fastattn.bench.cases.workload import Correctness, Made, Workload
from fastattn.testing.tolerance import Terms, agreement


def workload_of(case: BenchCase, device: torch.device) -> Workload:
    """The case made real, in the form that its operation has."""
    return ModuleWorkload(case, device) if OPS[case.op].form == "module" else Workload(case, device)


class ModuleWorkload(Workload):
    """A module's weights and an input. Held against torch's own module in float64; torch's in the input's dtype is the
    low-precision baseline.
    """

    def __init__(self, case: BenchCase, device: torch.device):
        super().__init__(case, device)
        self.embed_dim = case.num_heads * case.head_dim
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.module = self.filled(nn.MultiheadAttention)
        self.tokens = self.d_out.transpose(1, 2).flatten(2).contiguous()

    def filled(self, kind: Callable[..., nn.Module], **more: object) -> nn.Module:
        """A module of `kind` in evaluation, with this workload's weights once there are some."""
        case = self.case
        module = kind(
            self.embed_dim,
            case.num_heads,
            batch_first=True,
            device=self.device,
            dtype=self.made.case.dtype,
            **more,
        )
        if hasattr(self, "module"):
            module.load_state_dict(self.module.state_dict())
        return module.eval()

    def flops(self, mode: str, *, useful: bool) -> int:
        """With the four projections."""
        return super().flops(mode, useful=useful) + 8 * self.case.batch * self.case.q_len * self.embed_dim**2

    def bytes(self, mode: str) -> int:
        """Input and output, projections, and the mean weights."""
        case, item = self.case, self.tokens.itemsize
        weights = case.batch * case.q_len * case.kv_len
        return item * (2 * self.tokens.numel() + 4 * self.embed_dim**2 + weights)

    def call(self, mode: str, made: Made) -> Callable[[], object]:
        return lambda: _evaluated(made, self.tokens)

    def results(self, mode: str, made: Made, *, poisoned: bool = True) -> dict[str, Tensor]:
        with warnings.catch_warnings(), testing.poison() if poisoned else contextlib.nullcontext():
            warnings.simplefilter("ignore")
            out, weights = _evaluated(made, self.tokens)
        return {"out": out, "weights": weights}

    def check(self, results: dict[str, Tensor]) -> Correctness:
        case = self.case
        exact = copy.deepcopy(self.module).double()
        golden = _evaluated(Made(exact, ""), self.tokens.double())
        near = _evaluated(Made(self.module, ""), self.tokens)
        # Each output is a sum of embed_dim terms and a bias; a weight is a mean over heads.
        size = float(exact.get_parameter("out_proj.weight").detach().abs().sum(1).max() * golden[0].abs().max())
        names, terms = ("out", "weights"), {"out": Terms(size), "weights": Terms(float(golden[1].max()))}
        known = tuple(dict(zip(names, each, strict=True)) for each in (golden, near))
        rows = agreement(self.made, results, (known[0], (known[1], terms)))
        return Correctness(rows, case.batch * case.num_heads, case.batch * case.num_heads)


def _evaluated(made: Made, tokens: Tensor) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        return made.forward(tokens, tokens, tokens)
