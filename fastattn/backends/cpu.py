"""The adapter of the CPU backend: what it can do, and the way in. The library is built and loaded before it runs."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from fastattn import storage
from fastattn.backends.inputs import Gradients, readable
from fastattn.building.cpu_library import LIBRARY
from fastattn.low_parts import NONE, LowParts
from fastattn.masks import program
from fastattn.spec import AttnInputs, AttnSpec

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
ISAS = ("generic", "avx2", "avx512", "amx")
MAX_LEN = 2**31 - 1  # an interval's ends are int32
READS_BLOCKS = True
HAS_BACKWARD = True
READS_BLOCKS_BACKWARD = False
LOOKS_AT_STORAGE = True  # csrc/ops.cpp does, at no cost
ROUNDS_LSE: str | None = None


def why_not(spec: AttnSpec) -> str | None:
    """The first reason why this backend cannot run the call, as a sentence; None if it can, after a build maybe."""
    return _spec_reason(spec) or LIBRARY.why_not() or _isa_reason()


def prepare(spec: AttnSpec, *, by_name: bool = False) -> str | None:
    """As `why_not`, just before a run: the library is there afterwards, or a sentence says why it is not."""
    return _spec_reason(spec) or LIBRARY.prepare(by_name=by_name) or _isa_reason()


def needs_asking(spec: AttnSpec) -> str | None:
    """A free choice takes it."""
    return None


def why_not_backward(spec: AttnSpec) -> str | None:
    """Its backward runs what its forward runs."""
    return None


def notes(spec: AttnSpec, inputs: AttnInputs) -> list[str]:
    """What is to be said of a verdict that names this backend."""
    return [] if LIBRARY.available() else ["the CPU library is not built yet: the first call builds it and waits"]


def kernel_name(spec: AttnSpec) -> str:
    """The kernels of the forward."""
    return f"attention forward{_isa()}"


def kernel_name_backward(spec: AttnSpec) -> str:
    """The kernels of the backward."""
    return f"attention backward{_isa()}"


def _isa() -> str:
    """The instruction set, in brackets, where the library is there."""
    library = LIBRARY.available()
    return "" if library is None else f" ({library.isa()})"


def forward(spec: AttnSpec, inputs: AttnInputs) -> tuple[Tensor, Tensor]:
    """out [batch, num_heads, q_len, head_dim_v], lse [batch, num_heads, q_len] float32."""
    inputs = _readable(inputs)
    out, lse = spec.empty_out(inputs.query), spec.empty_lse(inputs.query)
    _run(LIBRARY.get().forward, inputs, spec, out, lse)
    return out, lse


def forward_with_low(spec: AttnSpec, inputs: AttnInputs) -> tuple[Tensor, Tensor, LowParts]:
    """out, lse and what their rounding took."""
    inputs = _readable(inputs)
    out, lse = spec.empty_out(inputs.query), spec.empty_lse(inputs.query)
    low = LowParts.empty(spec, out, lse)
    _run(LIBRARY.get().forward, inputs, spec, out, lse, *low)
    return out, lse, low


def backward(
    spec: AttnSpec,
    inputs: AttnInputs,
    out: Tensor,
    lse: Tensor,
    d_out: Tensor,
    d_lse: Tensor | None,
    *,
    wants_dbias: bool = True,
    low: LowParts = NONE,
) -> Gradients:
    """dq, dk, dv, dbias, dsinks in their inputs' shapes and dtypes; no dbias where nobody wants it."""
    inputs, d_out = _readable(inputs), d_out.resolve_neg()
    d_lse = None if d_lse is None else d_lse.resolve_neg().contiguous()
    dq, dk, dv = torch.empty_like(inputs.query), torch.empty_like(inputs.key), torch.empty_like(inputs.value)
    dbias = _empty_dbias(spec, inputs.bias) if inputs.bias is not None and wants_dbias else None
    dsinks = None if inputs.sinks is None else torch.empty_like(inputs.sinks)
    row_terms = torch.empty(2, *lse.shape, dtype=torch.float32, device=spec.device)
    results = (d_out, d_lse, dq, dk, dv, dbias, dsinks, row_terms)
    read = {"out": out, "lse": lse, "the gradient of out": d_out}
    _run(LIBRARY.get().backward, inputs, spec, out, lse.contiguous(), *low, *results, read=read)
    return dq, dk, dv, dbias, dsinks


def _run(operator: Any, inputs: AttnInputs, spec: AttnSpec, *rest: Any, read: dict[str, Tensor] | None = None) -> None:
    """Call an operator of the library. Where it finds memory missing, that tensor is named: an input, one of `read`."""
    try:
        operator(*inputs, *_numbers(spec), *rest)
    except RuntimeError:
        storage.check((*inputs._fields, *(read or {})), (*inputs, *(read or {}).values()), thorough=True)
        raise


def weights(spec: AttnSpec, inputs: AttnInputs, lse: Tensor | None, rows: Tensor | None, *, mean: bool) -> Tensor:
    """weights [batch, num_heads, q_len or len(rows), kv_len] float32, before dropout, or their mean over the heads
    [batch, q_len or len(rows), kv_len]; lse is computed where it is not given.
    """
    inputs = _readable(inputs)
    if lse is None:  # a value of one column is the cheapest
        _, lse = forward(spec, inputs._replace(value=inputs.value[..., :1]))
    count = spec.q_len if rows is None else len(rows)
    table = torch.empty(
        spec.batch, 1 if mean else spec.num_heads, count, spec.kv_len, dtype=torch.float32, device=spec.device
    )
    words, tensors, scale, softcap, _ = _numbers(spec)
    LIBRARY.get().weights(
        inputs.query, inputs.key, inputs.bias, inputs.sinks, words, tensors, scale, softcap,
        lse.float().contiguous(), rows, mean, table,
    )  # fmt: skip
    return table.squeeze(1) if mean else table


def _numbers(spec: AttnSpec) -> tuple[list[int], list[Tensor], float, float, float]:
    """The operators' arguments between the inputs and the outputs."""
    words, tensors = (
        spec.mask_program if spec.pages is None else program.over_blocks(spec.mask_program, spec.pages.table)
    )
    return words, tensors, spec.scale, spec.softcap or 0.0, spec.dropout_p


def _empty_dbias(spec: AttnSpec, bias: Tensor) -> Tensor:
    """Zeros for a bias's gradient: in its dtype where every pair has its own number, for sums float32."""
    own = bias.shape == (spec.batch, spec.num_heads, spec.q_len, spec.kv_len)
    return torch.zeros(bias.shape, dtype=bias.dtype if own else torch.float32, device=spec.device)


def _readable(inputs: AttnInputs) -> AttnInputs:
    """As these kernels read memory; nobody has looked at it before."""
    return readable(inputs, sinks_dtype=torch.float32, looked_at=False)


def _spec_reason(spec: AttnSpec) -> str | None:
    if spec.device.type != "cpu":
        return f"the tensors are on {spec.device.type}, and this backend runs on the CPU"
    if spec.dtype not in DTYPES:
        return f"dtype {spec.dtype} has no kernel; float16, bfloat16 and float32 have"
    if max(spec.q_len, spec.kv_len) > MAX_LEN:
        return f"length {max(spec.q_len, spec.kv_len)} is above {MAX_LEN}"
    return program.why_not(spec.mask)


def _isa_reason() -> str | None:
    """What FASTATTN_CPU_ISA asks for and this machine lacks. ValueError if there is no such instruction set."""
    asked = os.environ.get("FASTATTN_CPU_ISA")
    if not asked:
        return None
    if asked not in ISAS:
        raise ValueError(f"FASTATTN_CPU_ISA: one of {', '.join(ISAS)} is needed, got {asked!r}")
    library = LIBRARY.available()
    if library is None or asked in (has := library.isas()):
        return None
    return f"FASTATTN_CPU_ISA={asked}: the library and this machine share {', '.join(has)} only"
