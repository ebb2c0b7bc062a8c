"""What a kernel is compiled for: everything about a problem that is not a number or a tensor."""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from fastattn.kernels.lower import Lowered
from fastattn.kernels.masks import Rule
from fastattn.kernels.online import NORMALIZERS
from fastattn.kernels.scores import SCORES, score_of
from fastattn.spec import AttnSpec

MIN_DOT = 16
"""The least width of a matrix product's factors."""


class Kind(NamedTuple):
    """One constexpr for all kernels: jit functions, and constants (as constexprs: Triton 3.6 does not make them so).

    One level of names, as Triton keeps no more.
    """

    numbers: tuple
    keep: tuple
    kv_span: tuple
    q_span: tuple
    PROGRAM: tuple
    TERMS: tuple
    score: Any
    slope: Any
    start: Any
    step: Any
    finish: Any
    total: Any
    weights: Any
    sink_share: Any
    lse_slope: Any
    HEAD_DIM: Any
    BLOCK_D: Any
    HEAD_DIM_V: Any
    BLOCK_DV: Any
    PRECISION: Any
    BF16_BY_HAND: Any
    BIAS: Any  # over which axes it varies: see scores.score_tile
    SINKS: Any
    DROPOUT: Any
    PACKED: Any = tl.constexpr(False)
    SPLIT: Any = tl.constexpr(False)
    PERSISTENT: Any = tl.constexpr(False)
    WARP_SPECIALIZE: Any = tl.constexpr(False)


def kind_of(spec: AttnSpec, mask: Lowered, *, interpreted: bool) -> Kind:
    """The kind of a spec."""
    rules = Rule(*zip(*mask.rules, strict=True)) if mask.rules else Rule((), (), (), ())
    exact = spec.dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest"
    return Kind(
        **rules._asdict(),
        PROGRAM=mask.program,
        TERMS=mask.terms,
        **SCORES[score_of(spec)[0]]._asdict(),
        **NORMALIZERS[type(spec.normalizer).__name__]._asdict(),
        HEAD_DIM=tl.constexpr(spec.head_dim),
        BLOCK_D=tl.constexpr(wide(spec.head_dim)),
        HEAD_DIM_V=tl.constexpr(spec.head_dim_v),
        BLOCK_DV=tl.constexpr(wide(spec.head_dim_v)),
        PRECISION=tl.constexpr("ieee" if exact else "tf32"),
        BF16_BY_HAND=tl.constexpr(interpreted and spec.dtype == torch.bfloat16),
        BIAS=tl.constexpr(bias_axes(spec)),
        SINKS=tl.constexpr(spec.has_sinks),
        DROPOUT=tl.constexpr(spec.dropout_p > 0),
    )


def bias_axes(spec: AttnSpec) -> str:
    """Which of queries and keys a bias varies over: "qk", "q", "k", "1" (neither); "" where there is none."""
    if spec.bias_shape is None:
        return ""
    q_size, kv_size = (1, 1, *spec.bias_shape)[-2:]
    return ("q" * (q_size > 1) + "k" * (kv_size > 1)) or "1"


def wide(dim: int) -> int:
    """A tile's width for a head: a power of two, and what a matrix product needs at least."""
    return max(triton.next_power_of_2(dim), MIN_DOT)
