"""What a kernel is compiled for: everything about a problem that is not a number or a tensor."""

import functools
import hashlib
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton.language as tl

from fastattn.kernels.host.mask_lowering import LoweredMask
from fastattn.kernels.rules import masks, scores, softmax
from fastattn.kernels.rules.masks import RULES, Rule
from fastattn.kernels.rules.scores import SCORES, score_of
from fastattn.kernels.rules.softmax import NORMALIZERS
from fastattn.spec import AttnSpec

SOURCE = hashlib.sha256(
    b"".join(Path(str(each.__file__)).read_bytes() for each in (masks, softmax, scores))
).hexdigest()
"""Of the rules, scores and normalisers."""

MIN_DOT = 16
"""The least width of a matrix product's factors."""


class KernelVariant(NamedTuple):
    """One constexpr for all kernels: jit functions, and constants (as constexprs: Triton 3.6 does not make them so).

    One level of names, as Triton keeps no more.
    """

    numbers: tuple
    start: tuple
    stop: tuple
    keep: tuple
    kv_span: tuple
    q_span: tuple
    PROGRAM: tuple
    TERMS: tuple
    STARTS: tuple
    HIDES: Any  # whether somebody may see nothing or be seen by nobody, whose numbers may then be anything
    score: Any
    slope: Any
    begin: Any
    step: Any
    finish: Any
    total: Any
    weights: Any
    left: Any
    HEAD_DIM: Any
    BLOCK_D: Any
    HEAD_DIM_V: Any
    BLOCK_DV: Any
    PRECISION: Any
    BF16_BY_HAND: Any
    BIAS: Any  # over which axes it varies: see scores.score_tile
    SINKS: Any
    DROPOUT: Any
    SOURCE: Any  # Triton's cache on disk looks at a kernel's own source and not at that of the functions in a constexpr
    PACKED: Any
    SPLIT: Any
    PERSISTENT: Any


def variant_of(spec: AttnSpec, mask: LoweredMask, *, interpreted: bool, **flags: bool) -> KernelVariant:
    """The variant of a spec; `flags` are those of a kernel's own: packed, split, persistent."""
    by_hand = interpreted and spec.dtype == torch.bfloat16
    score = score_of(spec)[0]
    normalizer = type(spec.normalizer).__name__ + ("" if score == "raw" else "Natural")
    constants = (
        ("HEAD_DIM", spec.head_dim),
        ("BLOCK_D", wide(spec.head_dim)),
        ("HEAD_DIM_V", spec.head_dim_v),
        ("BLOCK_DV", wide(spec.head_dim_v)),
        ("PRECISION", precision_of(spec)),
        ("BF16_BY_HAND", by_hand),
        ("BIAS", bias_axes(spec)),
        ("HIDES", mask.hides or spec.bias_shape is not None),
        ("SINKS", spec.has_sinks),
        ("DROPOUT", spec.dropout_p > 0),
    )
    return _variant(mask.rules, mask.program, mask.terms, score, normalizer, constants, **flags)


@functools.cache
def _variant(
    rules: tuple[str, ...],
    program: tuple[int, ...],
    terms: tuple[tuple[int, ...], ...],
    score: str,
    normalizer: str,
    constants: tuple[tuple[str, Any], ...],
    packed: bool = False,
    split: bool = False,
    persistent: bool = False,
) -> KernelVariant:
    """One object for equal variants: making one costs more than a launch."""
    functions = zip(*(RULES[name] for name in rules), strict=True) if rules else [()] * len(Rule._fields)
    return KernelVariant(
        **Rule(*functions)._asdict(),
        PROGRAM=tuple(map(tl.constexpr, program)),
        TERMS=tuple(tuple(map(tl.constexpr, term)) for term in terms),
        STARTS=tuple(tl.constexpr(any(RULES[rules[n]].start is not None for n in term)) for term in terms),
        **SCORES[score]._asdict(),
        **NORMALIZERS[normalizer]._asdict(),
        **{name: tl.constexpr(value) for name, value in constants},
        SOURCE=tl.constexpr(SOURCE),
        PACKED=tl.constexpr(packed),
        SPLIT=tl.constexpr(split),
        PERSISTENT=tl.constexpr(persistent),
    )


def precision_of(spec: AttnSpec) -> str:
    """How products are multiplied. torch's setting is float32's alone, and torch refuses to tell it where it was set
    for one backend.
    """
    exact = spec.dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest"
    return "ieee" if exact else "tf32"


def bias_axes(spec: AttnSpec) -> str:
    """Which of queries and keys a bias varies over: "qk", "q", "k", "1" (neither); "" where there is none."""
    if spec.bias_shape is None:
        return ""
    q_size, kv_size = (1, 1, *spec.bias_shape)[-2:]
    return ("q" * (q_size != 1) + "k" * (kv_size != 1)) or "1"


def wide(dim: int) -> int:
    """A tile's width for a head: a power of two, and what a matrix product needs at least."""
    return max(1 << (dim - 1).bit_length(), MIN_DOT)
