"""Cases: rows of problems, their inputs, one run of them."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastattn.dropout import check_dropout
from fastattn.functional import attention
from fastattn.masks import Causal, Chunked, Dense, Full, Lengths, Mask, Packed, Prefix, Segments, Window
from fastattn.spec import AttnInputs, AttnSpec

HALF = torch.bfloat16
MaskMaker = Callable[["Case", torch.device], Mask | None]


@dataclass(frozen=True)
class Case:
    """One problem. Sizes in tokens; `layout` says how the tensors lie in memory; queries and keys are random numbers
    times the square root of `scores`.
    """

    id: str
    q_len: int = 64
    kv_len: int | None = None
    batch: int = 2
    num_heads: int = 2
    num_kv_heads: int | None = None
    head_dim: int = 32
    head_dim_v: int | None = None
    dtype: torch.dtype = HALF
    mask: MaskMaker = lambda case, device: None
    bias: tuple[int, ...] | None = None
    bias_dtype: torch.dtype = torch.float32
    scale: float | None = None
    scores: float = 1.0
    softcap: float | None = None
    sinks: bool = False
    dropout_p: float = 0.0
    layout: str = (
        "bhld"  # bhld, blhd (heads after length), strided (every second element), expanded (one batch for all)
    )

    def __post_init__(self) -> None:
        if self.layout not in LAYOUTS:
            raise ValueError(f"layout: one of {', '.join(LAYOUTS)} is needed, got {self.layout!r}")
        check_dropout(self.dropout_p, None)

    @property
    def kv(self) -> int:
        return self.q_len if self.kv_len is None else self.kv_len


@dataclass(frozen=True)
class Problem:
    """A case made flesh: the tensors, the mask, the gradients that come in from above."""

    case: Case
    inputs: AttnInputs
    mask: Mask | None
    d_out: Tensor
    d_lse: Tensor

    @property
    def spec(self) -> AttnSpec:
        return AttnSpec.of(self.inputs, mask=self.mask, **self.numbers)

    @property
    def numbers(self) -> dict[str, Any]:
        return {"scale": self.case.scale, "softcap": self.case.softcap, "dropout_p": self.case.dropout_p}


LAYOUTS: dict[str, Callable[[Callable[..., Tensor], int, int, int, int], Tensor]] = {
    "bhld": lambda make, b, h, n, d: make(b, h, n, d),
    "blhd": lambda make, b, h, n, d: make(b, n, h, d).transpose(1, 2),
    "strided": lambda make, b, h, n, d: make(b, h, n, 2 * d)[..., ::2],
    "expanded": lambda make, b, h, n, d: make(1, h, n, d).expand(b, -1, -1, -1),
}


def make_inputs(case: Case, device: torch.device | str = "cpu", seed: int = 0) -> Problem:
    """Random tensors with outliers (never zeros), the same on every device for one seed."""
    device = torch.device(device)
    generator = torch.Generator().manual_seed(seed)
    wide = torch.float64 if case.dtype == torch.float64 else torch.float32

    def make(*shape: int, dtype: torch.dtype = case.dtype, times: float = 1.0) -> Tensor:
        tensor = torch.randn(shape, generator=generator, dtype=torch.float64) * times
        spikes = torch.rand(shape, generator=generator) < 0.005
        return torch.where(spikes, tensor * 8, tensor).to(device, dtype)

    def laid(heads: int, length: int, dim: int, times: float = 1.0) -> Tensor:
        return LAYOUTS[case.layout](functools.partial(make, times=times), case.batch, heads, length, dim)

    kv_heads = case.num_kv_heads or case.num_heads
    inputs = AttnInputs(
        laid(case.num_heads, case.q_len, case.head_dim, case.scores**0.5),
        laid(kv_heads, case.kv, case.head_dim, case.scores**0.5),
        laid(kv_heads, case.kv, case.head_dim_v or case.head_dim),
        None if case.bias is None else make(*case.bias, dtype=case.bias_dtype),
        make(case.num_heads, dtype=wide) if case.sinks else None,
        torch.tensor([0x1234_5678_9ABC], device=device) if case.dropout_p else None,
    )
    d_out = make(case.batch, case.num_heads, case.q_len, case.head_dim_v or case.head_dim)
    d_lse = make(case.batch, case.num_heads, case.q_len, dtype=wide)
    return Problem(case, inputs, case.mask(case, device), d_out, d_lse)


def run(problem: Problem, backend: str | None = None, *, grads: bool = True) -> dict[str, Tensor]:
    """One forward and, unless `grads=False`, one backward pass through the public call, on poisoned memory.

    Returns:
        out, lse, and the gradients dq, dk, dv and, where there are such inputs, dbias and dsinks.
    """
    leaves = problem.inputs.detached(requires_grad=grads)
    with poison():
        out, lse = attention(**leaves._asdict(), mask=problem.mask, backend=backend, return_lse=True, **problem.numbers)
        results = {"out": out.detach(), "lse": lse.detach()}
        if grads:
            found = torch.autograd.grad((out, lse), leaves.differentiable, (problem.d_out, problem.d_lse))
            by_place = zip(("dq", "dk", "dv", "dbias", "dsinks"), leaves.in_place_of(found), strict=True)
            results |= {name: grad for name, grad in by_place if grad is not None}
    return results


FILL = "fill_uninitialized_memory"


@contextlib.contextmanager
def poison() -> Iterator[None]:
    """Fresh uninitialised memory holds NaN (floating dtypes), so that what a kernel forgets to write shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    settings = torch.utils.deterministic
    fill = getattr(settings, FILL)
    setattr(settings, FILL, True)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        setattr(settings, FILL, fill)


def lengths(*kv: int, **others: tuple[int, ...]) -> MaskMaker:
    """Rows' way to write Lengths: `lengths(3, 0)`, with q_lengths= and kv_starts= as tuples."""

    def make(case: Case, device: torch.device) -> Mask:
        q_lengths, kv_starts = (
            torch.tensor(others[name], device=device) if name in others else None for name in ("q_lengths", "kv_starts")
        )
        return Lengths(torch.tensor(kv, device=device), q_lengths, kv_starts)

    return make


def both(*makers: MaskMaker) -> MaskMaker:
    """The `&` of several makers."""

    def make(case: Case, device: torch.device) -> Mask:
        mask: Mask = Full()
        for maker in makers:
            mask = mask & (maker(case, device) or Full())
        return mask

    return make


def is_(mask: Mask) -> MaskMaker:
    """A mask without tensors."""
    return lambda case, device: mask


def offsets(*starts: int) -> MaskMaker:
    return lambda case, device: Causal(offset=torch.tensor(starts, device=device))


def documents(sort: bool) -> MaskMaker:
    """Three documents and a little padding, in order or scattered."""

    def make(case: Case, device: torch.device) -> Mask:
        ids = torch.arange(case.kv, device=device)[None].repeat(case.batch, 1)
        ids = ids * 3 // max(case.kv, 1) if sort else ids % 3
        ids[:, case.kv - case.kv // 8 :] = -1
        return Segments(ids, sorted=sort)

    return make


def packed(inside: Mask) -> MaskMaker:
    """One sequence of a third, one empty, one of the rest."""

    def make(case: Case, device: torch.device) -> Mask:
        cut = (0, case.q_len // 3, case.q_len // 3, case.q_len), (0, case.kv // 3, case.kv // 3, case.kv)
        cu_q, cu_kv = (torch.tensor(each, device=device, dtype=torch.int32) for each in cut)
        return Packed(cu_q, cu_kv, inside)

    return make


def table(case: Case, device: torch.device) -> Mask:
    generator = torch.Generator().manual_seed(1)
    return Dense((torch.rand(case.batch, 1, case.q_len, case.kv, generator=generator) < 0.6).to(device))


_ROWS = (
    # Empty and odd shapes first.
    Case("q0", 0, 5),
    Case("kv0", 5, 0),
    Case("batch0", 8, batch=0),
    Case("one-by-one", 1, 1),
    Case("one-query", 1, 70),
    Case("one-key", 70, 1),
    Case("odd", 37, 53, head_dim=24),
    Case("dim1", 9, 11, head_dim=1),
    Case("dim40", 33, 65, head_dim=40),
    # Plain attention.
    Case("full", 64),
    Case("cross", 48, 100),
    Case("long-query", 100, 48),
    Case("dim64", 64, 96, head_dim=64, batch=1),
    Case("dim128", 40, 72, head_dim=128, batch=1),
    Case("dim-v", 33, 50, head_dim=32, head_dim_v=16),
    # Wider heads: each width has kernels of its own in the CUDA backend, one for every key visible and one for masks.
    Case("dim80", 40, 200, head_dim=80, batch=1),
    Case("dim96-causal", 40, 200, head_dim=96, batch=1, mask=is_(Causal())),
    Case("dim192", 40, 200, head_dim=192, batch=1),
    Case("dim192-causal", 40, 200, head_dim=192, batch=1, mask=is_(Causal())),
    Case("dim192-v128", 40, 200, head_dim=192, head_dim_v=128, batch=1),
    Case("dim192-v128-causal", 40, 200, head_dim=192, head_dim_v=128, batch=1, mask=is_(Causal())),
    Case("dim256", 40, 200, head_dim=256, batch=1),
    Case("dim256-causal", 40, 200, head_dim=256, batch=1, mask=is_(Causal())),
    Case("gqa", 40, 56, num_heads=6, num_kv_heads=2, batch=1),
    Case("mqa", 40, 56, num_heads=4, num_kv_heads=1, batch=1),
    Case("scale", 32, 32, scale=-0.3),
    Case("float16", 50, 70, dtype=torch.float16),
    Case("float32", 50, 70, dtype=torch.float32),
    Case("blhd", 50, 70, layout="blhd"),
    Case("strided", 50, 70, layout="strided"),
    Case("expanded", 50, 70, layout="expanded"),
    # Masks in closed form.
    Case("causal", 70, mask=is_(Causal())),
    Case("causal-cross", 40, 90, mask=is_(Causal())),
    Case("causal-empty-rows", 90, 40, mask=is_(Causal())),
    Case("causal-top-left", 40, 90, mask=is_(Causal(align="top-left"))),
    Case("causal-offsets", 40, 90, mask=offsets(3, 50)),
    Case("window", 100, mask=is_(Window(17, 5)), head_dim=16),
    Case("window-left", 100, mask=is_(Window(9, 0)), dtype=torch.float16),
    Case("window-none", 60, 80, mask=is_(Window(None, 3))),
    Case("window-nobody", 20, 20, mask=is_(Window(2, 2, offset=100))),
    Case("lengths", 50, 70, mask=lengths(33, 0)),
    Case("left-padding", 50, 70, mask=lengths(70, 60, kv_starts=(11, 60))),
    Case("lengths-q", 50, 70, mask=lengths(33, 70, q_lengths=(50, 7))),
    Case("causal-lengths", 60, mask=both(is_(Causal()), lengths(60, 13)), dtype=torch.float32),
    Case("window-lengths-gqa", 90, num_heads=4, num_kv_heads=2,
         mask=both(is_(Window(20, 0)), lengths(80, 33, kv_starts=(5, 0)))),
    # Masks that walk other ways.
    Case("chunked", 60, 75, mask=is_(Chunked(16, 1, 0))),
    Case("chunked-causal", 60, mask=both(is_(Chunked(16)), is_(Causal()))),
    Case("prefix", 60, mask=lambda case, device: Prefix(torch.tensor([5, 33], device=device))),
    Case("segments-sorted", 64, mask=documents(True)),
    Case("segments-scattered", 64, mask=documents(False)),
    Case("packed-causal", 64, batch=1, mask=packed(Causal())),
    Case("packed-window", 64, 90, batch=1, mask=packed(Window(6, 2))),
    Case("table", 50, 70, mask=table),
    Case("window-or-sinks", 80, mask=lambda case, device: Window(8, 0) | Lengths(torch.tensor([4, 0], device=device))),
    # The rest of the contract.
    Case("bias", 40, 56, bias=(2, 1, 40, 56)),
    Case("bias-key", 40, 56, bias=(2, 1, 1, 56), bias_dtype=HALF, mask=is_(Causal())),
    Case("bias-head", 40, 56, bias=(2, 40, 56), dtype=torch.float32),
    Case("softcap", 40, 56, softcap=3.0, mask=is_(Causal())),
    Case("sinks", 40, 56, sinks=True, mask=is_(Window(9, 0))),
    Case("dropout", 40, 57, dropout_p=0.3),
    Case("dropout-all", 20, 21, dropout_p=1.0),
    Case("everything", 40, 56, num_heads=4, num_kv_heads=2, mask=both(is_(Window(20, 3)), lengths(56, 30)),
         bias=(1, 4, 1, 56), softcap=5.0, sinks=True, dropout_p=0.1, dtype=torch.float32, layout="blhd"),
)  # fmt: skip


def _few() -> Iterator[Case]:
    """Few keys with large scores: what rounding takes from a score or an lse must not reach the weights. The scale is
    no power of two, with which nothing is rounded.
    """
    for keys, (left, right) in {1: (0, 0), 2: (1, 0), 3: (1, 1), 5: (2, 2)}.items():
        for scores in (1e2, 1e3, 1e4):
            for dtype in (torch.float32, torch.float16, HALF):
                name = f"keys-{keys}-scores-{scores:.0e}-{str(dtype).removeprefix('torch.')}".replace("e+0", "e")
                mask = is_(Window(left, right))
                yield Case(name, 20, batch=1, head_dim=16, dtype=dtype, mask=mask, scores=scores, scale=0.3)
    row = functools.partial(Case, batch=1, head_dim=16, dtype=torch.float32, scores=1e4, scale=0.3)
    one = is_(Window(0, 0))
    yield row("large-one-by-one", 1, 1)
    yield row("large-tiles", 130, mask=one)
    yield row("large-causal", 130, mask=is_(Causal()))
    yield row("large-causal-half", 130, mask=is_(Causal()), dtype=torch.float16)
    yield row("large-one-query", 1, 130, mask=lengths(1))
    yield row("large-few-queries", 3, 130, mask=is_(Window(1, 0)), num_heads=4, num_kv_heads=2)
    yield row("large-gqa", 70, num_heads=4, num_kv_heads=2, mask=is_(Window(2, 0)))
    yield row("large-sinks", 70, sinks=True, mask=one)
    yield row("large-softcap", 70, softcap=9e3, mask=one)
    yield row("large-bias", 70, bias=(1, 2, 70, 70), mask=is_(Window(1, 0)))
    yield row("large-bias-key", 70, bias=(1, 1, 1, 70), mask=one)
    yield row("large-dropout", 70, dropout_p=0.3, mask=one)
    yield row("large-scale", 70, scores=1e-3, scale=1e4, dtype=torch.float16, mask=is_(Window(9, 0)))
    yield row("large-scale-negative", 70, scores=1e-3, scale=-1e4, dtype=HALF, mask=is_(Window(9, 0)))
    yield row("small-scale", 70, scores=1.0, scale=1e-6, dtype=torch.float16)


CASES: dict[str, Case] = {case.id: case for case in _ROWS}
LARGE_CASES: dict[str, Case] = {case.id: case for case in _few()}


def with_dtype(case: Case, dtype: torch.dtype) -> Case:
    """The same problem in another dtype."""
    name = str(dtype).removeprefix("torch.")
    return dataclasses.replace(case, id=f"{case.id}-{name}", dtype=dtype)
