"""One case made real: tensors, mask and spec on a device; and what a mode calls, computes and is checked by."""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fastattn import testing
from fastattn.bench.cases.operations import OPS, BenchCase
from fastattn.masks import Dense, Full, Mask
from fastattn.spec import AttnInputs, AttnSpec
from fastattn.testing.tolerance import Agreement, Truth, agreement, truth

Forward = Callable[..., Tensor]
"""query, key, value and, where the operation has one, bias -> out; the first three in the layout of the `Made`."""

SLICE_PAIRS = {"cpu": 1 << 24, "cuda": 1 << 28}
"""(query, key) pairs of a float64 table that one check makes at a time; larger workloads are checked head by head."""

LAYOUTS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "bhld": (lambda tensor: tensor, lambda tensor: tensor),
    "blhd": (lambda tensor: tensor.transpose(1, 2), lambda tensor: tensor.transpose(1, 2)),
    "hld": (lambda tensor: tensor.squeeze(0), lambda tensor: tensor.unsqueeze(0)),
}
"""How tensors may lie: heads before or after the length, or without a batch; the way there, and the way back."""

ALL_PAIRS = {"cpu": 1 << 25, "cuda": 1 << 30}
"""Pairs that are checked in all; beyond, evenly spread heads stand for the rest, and the report says how many."""


class NoBackward(RuntimeError):
    """A provider's output takes no gradients."""


@dataclass
class Made:
    """A provider ready for one workload."""

    forward: Forward
    label: str
    """What really runs, for the table: a backend or a kernel of PyTorch's."""
    compile_s: float | None = None
    prepared_bytes: int = 0
    """Memory of the mask in the form this provider needs."""
    mask_s: float = 0.0
    """Seconds that making this form took."""
    layout: str = "bhld"
    """How the tensors lie that `forward` takes and gives, by `LAYOUTS`."""
    checked_as: tuple[str, Forward] | None = None
    """Another operation and its forward, held against float64 in place of this one, whose random bits no definition
    knows."""


Pick = Callable[[str, Tensor], Tensor]
Part = tuple[testing.Problem, Truth, Pick]
"""Part of a workload, its truth, and how to cut the same part out of a result by its name."""


@dataclass(frozen=True)
class Correctness:
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


class Workload:
    """A case on a device. `leaves` (query, key, value, and bias where the operation has one) take gradients; `d_out` is
    the gradient that arrives from above.
    """

    def __init__(self, case: BenchCase, device: torch.device):
        made = testing.make_inputs(case.row(), device)
        self.case, self.device, self.d_out = case, device, made.d_out
        self.mask: Mask = made.mask or Full()
        self.op = OPS[case.op]
        # Only out takes part in the benchmark's gradients, lse does not.
        self.made = dataclasses.replace(made, d_lse=torch.zeros_like(made.d_lse))
        given = made.inputs
        self.seed = given.dropout_seed
        self.leaves = tuple(
            each.detach().clone().requires_grad_()
            for each in (given.query, given.key, given.value, given.bias)
            if each is not None
        )
        self.grad_names = ("dq", "dk", "dv", "dbias")[: len(self.leaves)]
        self.spec = AttnSpec.of(AttnInputs(*self.leaves), mask=self.mask, dropout_p=self.op.dropout_p)
        self._by_layout: dict[str, tuple[tuple[Tensor, ...], Tensor]] = {}
        self._known: dict[bool, list[Part]] = {}

    @property
    def qkv(self) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = self.leaves[:3]
        return query, key, value

    @property
    def bias(self) -> Tensor | None:
        return self.leaves[3] if self.op.bias else None

    def tensors(self, mode: str) -> tuple[Tensor, ...]:
        """query, key, value and a bias as `mode` takes them: leaves that want gradients, for "fwd" none that does."""
        return _plain(self.leaves) if mode == "fwd" else self.leaves

    def flops(self, mode: str, *, useful: bool) -> int:
        """Floating-point operations of the matrix products; `useful` ones on pairs that the mask shows."""
        return self.spec.flops(mode, useful=useful)

    def bytes(self, mode: str) -> int:
        """Bytes that must cross memory once."""
        return self.spec.bytes(mode)

    def call(self, mode: str, made: Made) -> Callable[[], object]:
        """What is timed: `fwd` without autograd, `bwd` the backward alone on a kept graph, `fwd+bwd` both.

        The tensors lie as `made` likes them; bringing them there is no part of the call. For `bwd` this runs the
        forward once.
        """
        forward = made.forward
        leaves, d_out = self._leaves(made.layout)
        if mode == "fwd":
            plain = _plain(leaves)
            return lambda: _no_grad(forward, plain)
        if mode == "bwd":
            out = _with_graph(forward(*leaves), made)
            return lambda: torch.autograd.grad(out, leaves, d_out, retain_graph=True)
        return lambda: torch.autograd.grad(forward(*leaves), leaves, d_out)

    def results(self, mode: str, made: Made, *, poisoned: bool = True) -> dict[str, Tensor]:
        """What a mode computes, by name: out for `fwd`, the gradients for `bwd`, all for `fwd+bwd`.

        `poisoned`: on memory filled with NaN. That is a global flag of PyTorch's, at which compiled code compiles anew.
        """
        leaves, d_out = self._leaves(made.layout)
        with warnings.catch_warnings(), testing.poison() if poisoned else contextlib.nullcontext():
            # Under that flag PyTorch warns of its own kernels that are not deterministic.
            warnings.simplefilter("ignore")
            if mode == "fwd":
                found = {"out": _no_grad(made.forward, _plain(leaves))}
            else:
                out = _with_graph(made.forward(*leaves), made)
                found = dict(zip(self.grad_names, torch.autograd.grad(out, leaves, d_out), strict=True))
                if mode == "fwd+bwd":
                    found = {"out": out.detach(), **found}
        back = LAYOUTS[made.layout][1]
        return {name: each if name == "dbias" else back(each) for name, each in found.items()}

    def _leaves(self, layout: str) -> tuple[tuple[Tensor, ...], Tensor]:
        """The leaves and d_out, lying in memory as `layout` says; a bias stays as it is."""
        if layout == "bhld":
            return self.leaves, self.d_out
        if layout not in self._by_layout:
            there = LAYOUTS[layout][0]
            turned = [there(each.detach()).contiguous() for each in (*self.qkv, self.d_out)]
            leaves = tuple(each.requires_grad_() for each in turned[:3]) + self.leaves[3:]
            self._by_layout[layout] = leaves, turned[3]
        return self._by_layout[layout]

    def check(self, results: dict[str, Tensor]) -> Correctness:
        """Hold results against float64 by the library's tolerance."""
        worst: dict[str, Agreement] = {}
        for part, known, pick in self._truths(forward_alone=set(results) == {"out"}):
            for row in agreement(part, {name: pick(name, tensor) for name, tensor in results.items()}, known):
                worst[row.name] = max(worst.get(row.name, row), row, key=_badness)
        checked = sum(part.case.batch * part.case.num_heads for part, _, _ in self._truths(set(results) == {"out"}))
        return Correctness(list(worst.values()), self.case.batch * self.case.num_heads, checked)

    def _truths(self, forward_alone: bool) -> list[Part]:
        """Parts of the workload that are checked; where one head is too large, the forward by some of its queries."""
        plan = slices(self.case, self.device.type, forward_alone)
        by_query = plan is not None and plan.queries < self.case.q_len
        if by_query not in self._known:
            if plan is None:
                parts = [(self.made, lambda name, tensor: tensor)]
            else:
                # A bias's gradient is a sum over the batch.
                items = [slice(None)] if self.op.bias else [slice(item, item + 1) for item in range(self.case.batch)]
                heads = range(0, self.case.num_kv_heads, plan.kv_heads)
                starts = [(item, head) for item in items for head in heads]
                queries = _spread(self.case.q_len, plan.queries)
                parts = [self._part(*starts[at], plan.kv_heads, queries) for at in _spread(len(starts), plan.parts)]
            self._known[by_query] = [(part, truth(part), pick) for part, pick in parts]
        return self._known[by_query]

    def _part(self, items: slice, head: int, kv_heads: int, queries: list[int]) -> tuple[testing.Problem, Pick]:
        """Some batch items' key heads with their query heads, at some queries: a problem of its own."""
        case, group = self.case, self.spec.group
        heads, keys = slice(head * group, (head + kv_heads) * group), slice(head, head + kv_heads)
        rows = slice(None) if len(queries) == case.q_len else torch.tensor(queries, device=self.device)

        def cut(tensor: Tensor, at: slice) -> Tensor:
            """Of a tensor with queries."""
            return tensor.detach()[items, at][:, :, rows]

        def pick(name: str, tensor: Tensor) -> Tensor:
            if name == "dbias":
                return tensor[:, heads]
            return tensor.detach()[items, keys] if name in ("dk", "dv") else cut(tensor, heads)

        bias = None if self.bias is None else self.bias.detach()[:, heads][:, :, rows]
        query, key, value = self.qkv
        inputs = AttnInputs(cut(query, heads), key.detach()[items, keys], value.detach()[items, keys], bias)
        row = dataclasses.replace(
            self.made.case,
            batch=inputs.query.shape[0],
            q_len=len(queries),
            num_heads=kv_heads * group,
            num_kv_heads=kv_heads,
        )
        mask: Mask
        if isinstance(self.mask, Full):
            mask = self.mask
        else:
            every = (case.batch, case.num_heads, case.q_len, case.kv_len)
            mask = Dense(cut(self.mask.dense(case.q_len, case.kv_len, device=self.device).expand(every), heads))
        made = testing.Problem(row, inputs, mask, cut(self.d_out, heads), cut(self.made.d_lse, heads))
        return made, pick


class Slices(NamedTuple):
    """What is checked: so many parts, each of so many key heads with their query heads, at so many queries."""

    parts: int
    kv_heads: int
    queries: int


def slices(case: BenchCase, kind: str, forward_alone: bool) -> Slices | None:
    """How a large workload is checked in parts on a device of that kind; None: whole, as are those with random bits."""
    pairs = case.batch * case.num_heads * case.q_len * case.kv_len
    at_once = SLICE_PAIRS.get(kind, SLICE_PAIRS["cpu"])
    if pairs <= at_once or OPS[case.op].dropout_p:
        return None
    groups = part_groups(case)
    queries = case.q_len
    if forward_alone and pairs // groups > at_once:
        queries = max(1, at_once * groups * case.q_len // pairs)
    of_all = pairs * queries // case.q_len
    fit = [each for each in range(1, case.num_kv_heads + 1) if case.num_kv_heads % each == 0]
    kv_heads = max([each for each in fit if each * of_all <= at_once * groups], default=1)
    parts = ALL_PAIRS.get(kind, ALL_PAIRS["cpu"]) * groups // (of_all * kv_heads)
    return Slices(min(groups // kv_heads, max(1, parts)), kv_heads, queries)


def part_groups(case: BenchCase) -> int:
    """Key heads that can be checked apart. A bias's gradient is a sum over the batch, which is then left whole."""
    return (1 if OPS[case.op].bias else case.batch) * case.num_kv_heads


def _spread(count: int, few: int) -> list[int]:
    """`few` of `count` indices, evenly spread, both ends among them."""
    return [index * (count - 1) // max(1, few - 1) for index in range(few)]


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


def recording(mode: str) -> torch.set_grad_enabled:
    """A context with autograd as `mode` runs: off for "fwd", on where there is a backward."""
    return torch.set_grad_enabled(mode != "fwd")


def _with_graph(out: Tensor, made: Made) -> Tensor:
    if not out.requires_grad:
        raise NoBackward(f"no backward in {made.label}")
    return out


def _plain(leaves: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Tensors that want no gradients, a learned bias too: a backend without a backward takes them."""
    return tuple(each.detach() for each in leaves)


def _badness(row: Agreement) -> tuple[bool, float]:
    return row.problem is not None, row.share


def _no_grad(forward: Forward, leaves: tuple[Tensor, ...]) -> Tensor:
    with torch.no_grad():
        return forward(*leaves)
