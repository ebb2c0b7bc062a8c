"""The tolerance of every result: how far it may lie from float64, measured in the errors of a *low-precision baseline*.

The baseline is the definition evaluated plainly: for float16 and bfloat16 in that dtype, with the weights and the
gradient of the scores rounded to it before their second product and everything else in float32, as every fused kernel
works; for float32 (and for lse) plainly in float32. A result may err 1.25 times as much as its baseline in RMS and 2
times in its worst element (1.5 and 3 for float32), lse within 1e-4 for half dtypes; each bound plus a slack for
rounding: one ulp of the dtype at the tensor's largest magnitude (for the RMS, what one such element adds to it) and 8
float32 eps times the largest sum of absolute terms, so that what cancels to 0 passes.

Those bounds are a tensor's, and its worst row fills them: where scores are large the baseline's weights, and
anybody's, are off by scores * eps, more or less by chance, so that the bounds must allow as much; and a row that errs
as much without cause would pass. So each element is held to a bound of its own too, from the absolute terms that it is
the sum of (tolerance_elements.py): a row that sees one key has the weight 1, whatever its score.

The baseline's gradients are written out by hand (Dao et al. 2022, FlashAttention, appendix B), while float64 comes from
differentiating the definition: each checks the other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastattn import reference
from fastattn.dropout import dropout_mask
from fastattn.spec import AttnSpec
from fastattn.testing.tolerance_elements import EPS, Pairs, bounds

if TYPE_CHECKING:
    from fastattn.testing.cases import Problem

LIMITS = {True: (1.25, 2.0), False: (1.5, 3.0)}  # half dtypes or not: RMS, worst element
LSE_HALF = 1e-4


@dataclass(frozen=True)
class Agreement:
    """One tensor against float64: its RMS and worst error, the baseline's, and what is allowed."""

    name: str
    rms_error: float
    rms_twin: float
    rms_bound: float
    max_error: float
    max_twin: float
    max_bound: float
    element: float = 0.0  # the largest error of an element over what its own terms allow
    problem: str | None = None  # what no ratio can say: a wrong shape, a NaN

    @property
    def ok(self) -> bool:
        within = self.rms_error <= self.rms_bound and self.max_error <= self.max_bound and self.element <= 1
        return self.problem is None and within

    @property
    def rms_ratio(self) -> float:
        """RMS error over the baseline's."""
        return _over(self.rms_error, self.rms_twin)

    @property
    def max_ratio(self) -> float:
        """Worst error over the baseline's."""
        return _over(self.max_error, self.max_twin)

    @property
    def share(self) -> float:
        """How much of what is allowed has been used, by the worst of the three; above 1 is a failure."""
        return max(_over(self.rms_error, self.rms_bound), _over(self.max_error, self.max_bound), self.element)

    def __str__(self) -> str:
        if self.problem:
            return f"{self.name}: {self.problem}"
        return (
            f"{self.name}: RMS error {self.rms_error:.3g} "
            f"({self.rms_ratio:.2f}x the baseline's, allowed {self.rms_bound:.3g}), "
            f"worst {self.max_error:.3g} ({self.max_ratio:.2f}x, allowed {self.max_bound:.3g}), "
            f"up to {self.element:.2f} of what an element's own terms allow"
        )


@dataclass(frozen=True)
class Terms:
    """What a tensor's elements are made of: the largest sum of absolute terms; and what each element's own allow it to
    err, and the part of that which large scores are the cause of, where elements are held to their own.
    """

    largest: float
    allowed: Tensor | None = None
    coarse: Tensor | None = None


def check_close(problem: Problem, results: dict[str, Tensor]) -> list[Agreement]:
    """Hold `testing.run`'s results against float64; AssertionError with a line for each tensor that is too far off."""
    rows = agreement(problem, results)
    wrong = [str(row) for row in rows if not row.ok]
    if wrong:
        raise AssertionError(f"{problem.case.id}: " + "; ".join(wrong))
    return rows


Truth = tuple[dict[str, Tensor], tuple[dict[str, Tensor], dict[str, Terms]]]


def truth(problem: Problem) -> Truth:
    """What results of this problem are held against: float64, and the baseline with its sums of terms."""
    return exact(problem), baseline(problem)


def agreement(problem: Problem, results: dict[str, Tensor], known: Truth | None = None) -> list[Agreement]:
    """How each result stands to float64 and to its baseline; `known` is `truth(problem)`, for many results of one
    problem.
    """
    golden, (near, terms) = known or truth(problem)
    return [_compare(name, results[name], golden[name], near[name], terms[name], problem) for name in results]


def exact(problem: Problem) -> dict[str, Tensor]:
    """out, lse and all gradients of the definition in float64."""
    inputs = problem.inputs.double()
    spec = AttnSpec.of(inputs._replace(bias=None), mask=problem.mask, **problem.numbers)
    out, lse = reference.forward(spec, inputs)
    grads = reference.backward(spec, inputs, out, lse, problem.d_out.double(), problem.d_lse.double())
    names = ("out", "lse", "dq", "dk", "dv", "dbias", "dsinks")
    return {name: each for name, each in zip(names, (out, lse, *grads), strict=True) if each is not None}


def baseline(problem: Problem) -> tuple[dict[str, Tensor], dict[str, Terms]]:
    """The baseline's results, and the terms that each is made of."""
    spec, inputs = problem.spec, problem.inputs
    wide = torch.float64 if spec.dtype == torch.float64 else torch.float32
    query, key, value, d_out = (each.to(wide) for each in (*inputs[:3], problem.d_out))
    key, value = (reference.per_query_head(spec, each) for each in (key, value))
    keep = reference.visibility(spec, inputs.bias, query.device).expand(*query.shape[:3], spec.kv_len)
    row, column = keep.any(-1, keepdim=True), keep.any(-2).unsqueeze(-1)
    query, d_out = (torch.where(row, each, 0.0) for each in (query, d_out))
    key, value = (torch.where(column, each, 0.0) for each in (key, value))

    def rounded(tensor: Tensor) -> Tensor:
        return tensor.to(spec.dtype).to(wide)

    t = spec.scale * (query @ key.mT)
    size = abs(spec.scale) * (query.abs() @ key.mT.abs())
    slope = torch.ones_like(t)
    if spec.softcap is not None:
        bent = torch.tanh(t / spec.softcap)
        t, slope = spec.softcap * bent, 1 - bent * bent
    if inputs.bias is not None:
        t = t + inputs.bias.to(wide)
        size = size + torch.where(keep, inputs.bias.to(wide).abs(), 0.0)
    t = torch.where(keep, t, -torch.inf)
    lse = torch.logsumexp(t, -1, keepdim=True) if spec.kv_len else t.new_full((*t.shape[:3], 1), -torch.inf)
    sinks = None if inputs.sinks is None else inputs.sinks.to(wide)[:, None, None]
    total = lse if sinks is None else torch.logaddexp(lse, sinks)
    safe = torch.where(total == -torch.inf, 0.0, total)
    weights = (t - safe).exp()
    kept = torch.ones_like(weights)
    if spec.dropout_p > 0 and inputs.dropout_seed is not None:
        bits = dropout_mask(*weights.shape, p=spec.dropout_p, seed=inputs.dropout_seed)
        kept = bits.to(wide) / max(1 - spec.dropout_p, torch.finfo(wide).tiny)
    dropped = rounded(weights * kept)
    out = (dropped @ value).to(spec.dtype)

    d_weights = (d_out @ value.mT) * kept
    delta = (d_out * out.to(wide)).sum(-1, keepdim=True)
    alone = torch.where(keep, (t - torch.where(row, lse, 0.0)).exp(), 0.0)  # without the sink, for lse
    d_lse = torch.where(row, problem.d_lse.to(wide).unsqueeze(-1), 0.0)
    d_t = weights * (d_weights - delta) + alone * d_lse
    d_scores = rounded(d_t * slope)
    size_t = weights * (d_out.abs() @ value.mT.abs() * kept + delta.abs()) + alone * d_lse.abs()
    size_d = size_t * slope

    def by_kv_head(tensor: Tensor) -> Tensor:
        return tensor.unflatten(1, (spec.num_kv_heads, spec.group)).sum(2)

    near = {
        "out": out,
        "lse": lse.squeeze(-1),
        "dq": (spec.scale * (d_scores @ key)).to(spec.dtype),
        "dk": by_kv_head(spec.scale * (d_scores.mT @ query)).to(spec.dtype),
        "dv": by_kv_head(dropped.mT @ d_out).to(spec.dtype),
    }
    size = torch.where(keep, size, 0.0)
    sums = {
        "out": dropped @ value.abs(),
        "lse": size,
        "dq": abs(spec.scale) * (size_d @ key.abs()),
        "dk": by_kv_head(abs(spec.scale) * (size_d.mT @ query.abs())),
        "dv": by_kv_head(dropped.mT @ d_out.abs()),
    }
    share = None if sinks is None else (sinks - safe).exp()
    if inputs.bias is not None:
        near["dbias"] = d_t.sum_to_size(inputs.bias.shape).to(inputs.bias.dtype)
        sums["dbias"] = size_t.sum_to_size(inputs.bias.shape)
    if inputs.sinks is not None and share is not None:
        near["dsinks"] = (-share * delta).sum((0, 2, 3)).to(inputs.sinks.dtype)
        sums["dsinks"] = (share * delta.abs()).sum((0, 2, 3))
    pairs = Pairs(query, key, value, d_out, d_lse, keep, size, weights, alone, kept, slope, share, sinks)
    each, coarse = bounds(pairs, spec.scale, spec.dtype, by_kv_head, inputs.bias)
    return near, {name: Terms(_largest(sums[name]), each[name], coarse[name]) for name in sums}


def _compare(name: str, got: Tensor, golden: Tensor, near: Tensor, terms: Terms, problem: Problem) -> Agreement:
    half = problem.case.dtype in (torch.float16, torch.bfloat16)
    rms_limit, max_limit = LIMITS[half and name != "lse"]
    trouble = None
    if got.shape != golden.shape or got.dtype != near.dtype:
        trouble = f"{got.dtype} {list(got.shape)}, expected {near.dtype} {list(golden.shape)}"
    elif not torch.equal(got.isinf(), golden.isinf()) or not got[golden.isinf()].double().equal(golden[golden.isinf()]):
        trouble = "infinities in other places than the definition's"
    elif bool((got.isnan() & ~golden.isnan()).any()):
        trouble = f"{int(got.isnan().sum())} of {got.numel()} elements are NaN"
    if trouble:
        nan = torch.nan
        return Agreement(name, nan, nan, nan, nan, nan, nan, problem=trouble)
    finite = golden.isfinite()
    error, error_near = ((each.double()[finite] - golden[finite]).abs() for each in (got, near))
    ulp = torch.finfo(got.dtype).eps * _largest(golden[finite])
    noise = 8 * EPS * terms.largest
    coarse = terms.coarse[finite] if terms.coarse is not None else error.new_zeros(0)
    if half and name == "lse":
        limits = (LSE_HALF + ulp + noise,) * 2
    else:
        limits = (
            rms_limit * _rms(error_near) + ulp / max(1, error.numel()) ** 0.5 + noise + _rms(coarse),
            max_limit * _largest(error_near) + ulp + noise + _largest(coarse),
        )
    element = 0.0
    if terms.allowed is not None:
        info = torch.finfo(got.dtype)
        rounding = info.eps * golden[finite].abs() + info.smallest_normal * info.eps
        element = _largest((error / (terms.allowed.double()[finite] + rounding)).nan_to_num(0.0))
    return Agreement(
        name, _rms(error), _rms(error_near), limits[0], _largest(error), _largest(error_near), limits[1], element
    )


def _over(error: float, allowed: float) -> float:
    if allowed > 0:
        return error / allowed
    return torch.inf if error > 0 else 0.0


def _largest(tensor: Tensor) -> float:
    return float(tensor.abs().max()) if tensor.numel() else 0.0


def _rms(tensor: Tensor) -> float:
    return float(tensor.double().square().mean().sqrt()) if tensor.numel() else 0.0
