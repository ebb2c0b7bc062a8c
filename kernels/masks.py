"""Mask rules of the Triton room: which tiles to visit, and which elements of a tile to keep.

A rule is five functions. `arguments` runs on the host; the others are jit functions, handed to a kernel as constexprs:

    arguments(mask, spec)                 what the kernel gets: ints, tensors, None, as one tuple
    numbers(args, batch, q_len, kv_len)   read once per program: this batch item's numbers, int32
    keep(q_idx, kv_idx, numbers)          bool, broadcast: may query q_idx see key kv_idx
    kv_span(q_lo, q_hi, numbers)          for queries q_lo ... q_hi - 1: lo, full_lo, full_hi, hi
    q_span(kv_lo, kv_hi, numbers)         the mirror, for keys kv_lo ... kv_hi - 1

A span says: everything that some of them sees lies in [lo, hi), and all of them see everything in [full_lo, full_hi).
Bounds may lie outside the problem. A `Mask` is several rules that must all agree: it keeps what all keep and intersects
their spans. Each rule is held against the mask's own table by one test.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from fastattn.spec import AttnSpec

FAR = tl.constexpr(2**30 - 1)  # beyond every length; the sum of two and one more still fits an int32


class Rule(NamedTuple):
    """The jit functions of one rule."""

    numbers: Any
    keep: Any
    kv_span: Any
    q_span: Any


class Mask(NamedTuple):
    """The rules that must all agree, function by function: Triton keeps the names of one level of tuples only."""

    numbers: tuple
    keep: tuple
    kv_span: tuple
    q_span: tuple


@triton.jit
def read_numbers(MASK: tl.constexpr, args, batch, q_len, kv_len):
    """Every rule's numbers for one batch item, after the lengths."""
    numbers = ((q_len, kv_len),)
    for n in tl.static_range(len(MASK.numbers)):
        numbers = numbers + (MASK.numbers[n](args[n], batch, q_len, kv_len),)
    return numbers


@triton.jit
def keep(MASK: tl.constexpr, q_idx, kv_idx, numbers):
    """What all rules keep within the problem. q_idx and kv_idx broadcast against each other, in either order."""
    kept = (q_idx < numbers[0][0]) & (kv_idx < numbers[0][1])
    for n in tl.static_range(len(MASK.keep)):
        kept = kept & MASK.keep[n](q_idx, kv_idx, numbers[n + 1])
    return kept


@triton.jit
def kv_span(MASK: tl.constexpr, q_lo, q_hi, numbers):
    """The keys to visit for queries q_lo ... q_hi - 1, within the problem."""
    lo, full_lo, full_hi, hi = 0, 0, numbers[0][1], numbers[0][1]
    for n in tl.static_range(len(MASK.kv_span)):
        lo, full_lo, full_hi, hi = _intersect(lo, full_lo, full_hi, hi, MASK.kv_span[n](q_lo, q_hi, numbers[n + 1]))
    return lo, full_lo, full_hi, hi


@triton.jit
def q_span(MASK: tl.constexpr, kv_lo, kv_hi, numbers):
    """The queries to visit for keys kv_lo ... kv_hi - 1, within the problem."""
    lo, full_lo, full_hi, hi = 0, 0, numbers[0][0], numbers[0][0]
    for n in tl.static_range(len(MASK.q_span)):
        lo, full_lo, full_hi, hi = _intersect(lo, full_lo, full_hi, hi, MASK.q_span[n](kv_lo, kv_hi, numbers[n + 1]))
    return lo, full_lo, full_hi, hi


@triton.jit
def _intersect(lo, full_lo, full_hi, hi, span):
    return (
        tl.maximum(lo, span[0]),
        tl.maximum(full_lo, span[1]),
        tl.minimum(full_hi, span[2]),
        tl.minimum(hi, span[3]),
    )


# A placed mask sees the keys with low <= kv_idx - q_idx <= high. No bound is None on the host and FAR in a kernel.


@triton.jit
def _diagonal(bound, offsets, batch, OPEN: tl.constexpr):
    """A bound as an int32, moved by this batch item's offset where there is one; OPEN where there is no bound."""
    if bound is None:
        return OPEN
    elif offsets is None:
        return bound
    else:
        moved = tl.minimum(tl.maximum(tl.load(offsets + batch), -FAR), FAR).to(tl.int32) + bound
        return tl.minimum(tl.maximum(moved, -FAR), FAR)


@triton.jit
def _placed_numbers(args, batch, q_len, kv_len):
    return _diagonal(args[0], args[2], batch, -FAR), _diagonal(args[1], args[2], batch, FAR)


def _placed(mask: Any, spec: AttnSpec, left: int | None, right: int | None) -> tuple:
    """low, high, offsets [batch] or None. A fixed offset is in the bounds already."""
    offsets = mask.offset if isinstance(mask.offset, torch.Tensor) else None
    at = 0 if offsets is not None else mask.offset
    if at is None:
        at = spec.kv_len - spec.q_len if mask.align == "bottom-right" else 0
    low, high = None if left is None else at - left, None if right is None else at + right
    return _near(low), _near(high), _per_batch(offsets, spec)


@triton.jit
def _causal_keep(q_idx, kv_idx, numbers):
    return kv_idx - q_idx <= numbers[1]


@triton.jit
def _causal_kv_span(q_lo, q_hi, numbers):
    return 0, 0, q_lo + numbers[1] + 1, q_hi + numbers[1]


@triton.jit
def _causal_q_span(kv_lo, kv_hi, numbers):
    return kv_lo - numbers[1], kv_hi - 1 - numbers[1], FAR, FAR


@triton.jit
def _window_keep(q_idx, kv_idx, numbers):
    return (kv_idx - q_idx >= numbers[0]) & (kv_idx - q_idx <= numbers[1])


@triton.jit
def _window_kv_span(q_lo, q_hi, numbers):
    low, high = numbers[0], numbers[1]
    return q_lo + low, q_hi - 1 + low, q_lo + high + 1, q_hi + high


@triton.jit
def _window_q_span(kv_lo, kv_hi, numbers):
    low, high = numbers[0], numbers[1]
    return kv_lo - high, kv_hi - 1 - high, kv_lo - low + 1, kv_hi - low


@triton.jit
def _lengths_numbers(args, batch, q_len, kv_len):
    """kv_start, kv_stop, q_stop, clamped to the problem."""
    kv_stop = tl.minimum(tl.maximum(tl.load(args[0] + batch), 0), kv_len).to(tl.int32)
    kv_start, q_stop = 0, q_len
    if args[1] is not None:
        q_stop = tl.minimum(tl.maximum(tl.load(args[1] + batch), 0), q_len).to(tl.int32)
    if args[2] is not None:
        kv_start = tl.minimum(tl.maximum(tl.load(args[2] + batch), 0), kv_len).to(tl.int32)
    return kv_start, kv_stop, q_stop


@triton.jit
def _lengths_keep(q_idx, kv_idx, numbers):
    return (kv_idx >= numbers[0]) & (kv_idx < numbers[1]) & (q_idx < numbers[2])


@triton.jit
def _lengths_kv_span(q_lo, q_hi, numbers):
    kv_start, kv_stop, q_stop = numbers[0], numbers[1], numbers[2]
    full_hi = tl.where(q_hi <= q_stop, kv_stop, kv_start)
    return kv_start, kv_start, full_hi, tl.where(q_lo < q_stop, kv_stop, kv_start)


@triton.jit
def _lengths_q_span(kv_lo, kv_hi, numbers):
    kv_start, kv_stop, q_stop = numbers[0], numbers[1], numbers[2]
    meets = (kv_lo < kv_stop) & (kv_hi > kv_start)
    inside = (kv_lo >= kv_start) & (kv_hi <= kv_stop)
    return 0, 0, tl.where(inside, q_stop, 0), tl.where(meets, q_stop, 0)


def _lengths(mask: Any, spec: AttnSpec) -> tuple:
    return tuple(_per_batch(each, spec) for each in (mask.kv_lengths, mask.q_lengths, mask.kv_starts))


RULES: dict[str, tuple[Callable[[Any, AttnSpec], tuple], Rule]] = {
    "Causal": (
        lambda mask, spec: _placed(mask, spec, None, 0),
        Rule(_placed_numbers, _causal_keep, _causal_kv_span, _causal_q_span),
    ),
    "Window": (
        lambda mask, spec: _placed(mask, spec, mask.left, mask.right),
        Rule(_placed_numbers, _window_keep, _window_kv_span, _window_q_span),
    ),
    "Lengths": (_lengths, Rule(_lengths_numbers, _lengths_keep, _lengths_kv_span, _lengths_q_span)),
}
"""By the mask's class name. `Full` hides nothing and needs none."""


def lower(spec: AttnSpec) -> tuple[Mask, tuple]:
    """The spec's mask as a kernel takes it: the constexpr, and the arguments."""
    leaves = [leaf for leaf in spec.mask.leaves() if type(leaf).__name__ != "Full"]
    rules = [RULES[type(leaf).__name__] for leaf in leaves]
    functions = zip(*(rule for _, rule in rules), strict=True) if rules else ((), (), (), ())
    return Mask(*functions), tuple(arguments(leaf, spec) for leaf, (arguments, _) in zip(leaves, rules, strict=True))


def _near(bound: int | None) -> int | None:
    return None if bound is None else max(-FAR.value, min(FAR.value, bound))


def _per_batch(tensor: torch.Tensor | None, spec: AttnSpec) -> torch.Tensor | None:
    """[batch] with stride 1; a single entry serves all."""
    return None if tensor is None else tensor.expand(spec.batch).contiguous()
