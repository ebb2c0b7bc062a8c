"""One case made real: tensors, mask and spec on a device; and what a mode calls, computes and is checked by."""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fastattn import testing
from fastattn.bench_cases import BenchCase
from fastattn.masks import Dense, Full, Mask
from fastattn.spec import AttnInputs, AttnSpec
from fastattn.yardstick import Agreement, Truth, agreement, truth

Forward = Callable[[Tensor, Tensor, Tensor], Tensor]
"""query, key, value -> out, all of them in the layout of the `Made` that has it."""

SLICE_PAIRS = {"cpu": 1 << 24, "cuda": 1 << 28}
"""(query, key) pairs of a float64 table that one check makes at a time; larger problems are checked head by head."""

ALL_PAIRS = {"cpu": 1 << 25, "cuda": 1 << 30}
"""Pairs that are checked in all; beyond, evenly spread heads stand for the rest, and the report says how many."""


@dataclass
class Made:
    """A provider ready for one problem."""

    forward: Forward
    label: str
    """What really runs, for the table: a room or a kernel of PyTorch's."""
    compile_s: float | None = None
    prepared_bytes: int = 0
    """Memory of the mask in the form this provider needs."""
    mask_s: float = 0.0
    """Seconds that making this form took."""
    layout: str = "bhld"
    """How the tensors lie that `forward` takes and gives: bhld, or blhd (heads after length)."""


@dataclass(frozen=True)
class Verdict:
    """Results of one provider against float64, the worst of each tensor over the heads that were checked."""

    agreements: list[Agreement]
    heads: int
    heads_checked: int

    @property
    def ok(self) -> bool:
        return all(row.ok for row in self.agreements)

    @property
    def worst(self) -> Agreement:
        """The tensor that is furthest off, in shares of what is allowed."""
        return max(self.agreements, key=_badness)


class Problem:
    """A case on a device. `qkv` are leaves that take gradients; `d_out` is the gradient that arrives from above."""

    def __init__(self, case: BenchCase, device: torch.device):
        made = testing.make_inputs(case.row(), device)
        self.case, self.device, self.d_out = case, device, made.d_out
        self.mask: Mask = made.mask or Full()
        # Only out takes part in the benchmark's gradients, lse does not.
        self.made = dataclasses.replace(made, d_lse=torch.zeros_like(made.d_lse))
        self.qkv: tuple[Tensor, Tensor, Tensor] = tuple(
            each.detach().clone().requires_grad_() for each in (made.inputs.query, made.inputs.key, made.inputs.value)
        )  # type: ignore[assignment]
        self.spec = AttnSpec.of(AttnInputs(*self.qkv), mask=self.mask)
        self._by_layout: dict[str, tuple[tuple[Tensor, ...], Tensor]] = {}

    @property
    def detached(self) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = (each.detach() for each in self.qkv)
        return query, key, value

    def call(self, mode: str, made: Made) -> Callable[[], object]:
        """What is timed: `fwd` without autograd, `bwd` the backward alone on a kept graph, `fwd+bwd` both.

        The tensors lie as `made` likes them; bringing them there is no part of the call. For `bwd` this runs the
        forward once.
        """
        forward = made.forward
        qkv, d_out = self._leaves(made.layout)
        if mode == "fwd":
            plain = tuple(each.detach() for each in qkv)
            return lambda: _no_grad(forward, plain)
        if mode == "bwd":
            out = forward(*qkv)
            return lambda: torch.autograd.grad(out, qkv, d_out, retain_graph=True)
        return lambda: torch.autograd.grad(forward(*qkv), qkv, d_out)

    def results(self, mode: str, made: Made, *, poisoned: bool = True) -> dict[str, Tensor]:
        """What a mode computes, by name: out for `fwd`, the three gradients for `bwd`, all for `fwd+bwd`.

        `poisoned`: on memory filled with NaN. That is a global flag of PyTorch's, at which compiled code compiles anew.
        """
        qkv, d_out = self._leaves(made.layout)
        with warnings.catch_warnings(), testing.poison() if poisoned else contextlib.nullcontext():
            # Under that flag PyTorch warns of its own kernels that are not deterministic.
            warnings.simplefilter("ignore")
            if mode == "fwd":
                found = {"out": _no_grad(made.forward, tuple(each.detach() for each in qkv))}
            else:
                out = made.forward(*qkv)
                found = dict(zip(("dq", "dk", "dv"), torch.autograd.grad(out, qkv, d_out), strict=True))
                if mode == "fwd+bwd":
                    found = {"out": out.detach(), **found}
        return found if made.layout == "bhld" else {name: each.transpose(1, 2) for name, each in found.items()}

    def _leaves(self, layout: str) -> tuple[tuple[Tensor, ...], Tensor]:
        """query, key, value that take gradients, and d_out; `blhd` has the heads after the length, in memory too."""
        if layout == "bhld":
            return self.qkv, self.d_out
        if layout not in self._by_layout:
            turned = [each.detach().transpose(1, 2).contiguous() for each in (*self.qkv, self.d_out)]
            self._by_layout[layout] = tuple(each.requires_grad_() for each in turned[:3]), turned[3]
        return self._by_layout[layout]

    def check(self, results: dict[str, Tensor]) -> Verdict:
        """Hold results against float64 by the library's yardstick."""
        worst: dict[str, Agreement] = {}
        for part, known, pick in self._truths:
            for row in agreement(part, {name: pick(name, tensor) for name, tensor in results.items()}, known):
                worst[row.name] = max(worst.get(row.name, row), row, key=_badness)
        return Verdict(list(worst.values()), self.case.batch * self.case.num_heads, self._heads_checked)

    @cached_property
    def _truths(self) -> list[tuple[testing.Problem, Truth, Callable[[str, Tensor], Tensor]]]:
        """Parts of the problem, the truth of each, and how to cut the same part out of a result."""
        case, kind = self.case, self.device.type
        pairs = case.batch * case.num_heads * case.q_len * case.kv_len
        if pairs <= SLICE_PAIRS.get(kind, SLICE_PAIRS["cpu"]):
            return [(self.made, truth(self.made), lambda name, tensor: tensor)]
        rows = [(item, head) for item in range(case.batch) for head in range(case.num_kv_heads)]
        few = max(1, ALL_PAIRS.get(kind, ALL_PAIRS["cpu"]) * len(rows) // pairs)
        if few < len(rows):
            rows = [rows[index * (len(rows) - 1) // max(1, few - 1)] for index in range(few)]
        parts = [self._part(item, head) for item, head in rows]
        return [(part, truth(part), pick) for part, pick in parts]

    @property
    def _heads_checked(self) -> int:
        return sum(part.case.batch * part.case.num_heads for part, _, _ in self._truths)

    def _part(self, item: int, head: int) -> tuple[testing.Problem, Callable[[str, Tensor], Tensor]]:
        """One batch item's key head with its query heads: a problem of its own."""
        case, group = self.case, self.spec.group
        queries, keys = slice(head * group, (head + 1) * group), slice(head, head + 1)

        def cut(tensor: Tensor, heads: slice) -> Tensor:
            return tensor.detach()[item : item + 1, heads]

        def pick(name: str, tensor: Tensor) -> Tensor:
            return cut(tensor, keys if name in ("dk", "dv") else queries)

        table = self.mask.dense(case.q_len, case.kv_len, device=self.device).expand(case.batch, case.num_heads, -1, -1)
        inputs = AttnInputs(cut(self.qkv[0], queries), cut(self.qkv[1], keys), cut(self.qkv[2], keys))
        row = dataclasses.replace(self.made.case, batch=1, num_heads=group, num_kv_heads=1)
        made = testing.Problem(
            row, inputs, Dense(cut(table, queries)), cut(self.d_out, queries), cut(self.made.d_lse, queries)
        )
        return made, pick


def tiny(case: BenchCase) -> BenchCase:
    """The smallest case that takes the same way: one query, one key, one group of heads."""
    return dataclasses.replace(
        case,
        batch=1,
        num_heads=case.num_heads // case.num_kv_heads,
        num_kv_heads=1,
        q_len=1,
        kv_len=1,
        window=None if case.window is None else 1,
    )


def _badness(row: Agreement) -> tuple[bool, float]:
    return row.problem is not None, row.share


def _no_grad(forward: Forward, qkv: tuple[Tensor, ...]) -> Tensor:
    with torch.no_grad():
        return forward(*qkv)
