"""Mask rules of the Triton backend: which tiles to visit, and which elements of a tile to keep.

A rule is a few jit functions, handed to a kernel as constexprs:

    numbers(args, batch, head, q_len, kv_len)   read once per program: this batch item's numbers
    start(q_idx, numbers)                       the first key that query q_idx sees; None: the first there is
    stop(q_idx, numbers)                        the one after the last, not clipped
    keep(q_idx, kv_idx, numbers)                for a rule that is no interval, instead of both: bool, broadcast
    kv_span(q_lo, q_hi, numbers, BLOCK)         for queries q_lo ... q_hi - 1, BLOCK at most: lo, full_lo, full_hi, hi
    q_span(kv_lo, kv_hi, numbers, BLOCK)        the mirror, for keys kv_lo ... kv_hi - 1

A span says: everything that some of them sees lies in [lo, hi), and all of them see everything in [full_lo, full_hi).
Bounds may lie outside the problem. A rule without spans (None) is walked by block lists. Each rule is held against the
mask's own table by one test; `args` are made in mask_lowering.py, which also says how rules combine:

    VARIANT.TERMS     an OR of ANDs of rules, by their places: at most two terms, all with spans; none where lists are
    VARIANT.STARTS    walked. For each term, whether a rule of it has a start
    VARIANT.PROGRAM   the mask in postfix: a rule's place, or AND or OR of the two before
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from fastattn.kernels.opaque_int import from_opaque, stride

UNBOUNDED = tl.constexpr(2**29 - 1)  # beyond every length; opaque it fits an int32, and so does the sum of three
AND, OR = tl.constexpr(-1), tl.constexpr(-2)


class Rule(NamedTuple):
    """The jit functions of one rule."""

    numbers: Any
    start: Any = None
    stop: Any = None
    keep: Any = None
    kv_span: Any = None
    q_span: Any = None


@triton.jit
def read_numbers(VARIANT: tl.constexpr, args, batch, head, q_len, kv_len):
    """Every rule's numbers for one batch item and head, after the lengths."""
    numbers = ((q_len, kv_len),)
    for n in tl.static_range(len(VARIANT.numbers)):
        numbers = numbers + (VARIANT.numbers[n](args[n], batch, head, q_len, kv_len),)
    return numbers


@triton.jit
def keep(VARIANT: tl.constexpr, q_idx, kv_idx, numbers):
    """What the mask keeps within the problem. q_idx and kv_idx broadcast against each other, in either order.

    Intervals are intersected query by query: an element is compared twice at most, whatever the rules.
    """
    # A query past the last one sees nothing.
    end = tl.where(q_idx < numbers[0][0], numbers[0][1], 0)
    if len(VARIANT.TERMS) > 0:
        kept = _term(VARIANT, 0, q_idx, kv_idx, numbers, end)
        if len(VARIANT.TERMS) == 2:
            kept = kept | _term(VARIANT, 1, q_idx, kv_idx, numbers, end)
        return kept
    else:
        stack = (kv_idx < end, None)  # top, rest
        for n in tl.static_range(len(VARIANT.PROGRAM)):
            if VARIANT.PROGRAM[n] == AND:
                stack = (stack[0] & stack[1][0], stack[1][1])
            elif VARIANT.PROGRAM[n] == OR:
                stack = (stack[0] | stack[1][0], stack[1][1])
            else:
                stack = (_alone(VARIANT, VARIANT.PROGRAM[n], q_idx, kv_idx, numbers), stack)
        return stack[0] & (kv_idx < end)


@triton.jit
def _term(VARIANT: tl.constexpr, TERM: tl.constexpr, q_idx, kv_idx, numbers, end):
    start = tl.zeros_like(end)
    for n in tl.static_range(len(VARIANT.TERMS[TERM])):
        end = tl.minimum(end, VARIANT.stop[VARIANT.TERMS[TERM][n]](q_idx, numbers[VARIANT.TERMS[TERM][n] + 1]))
        if VARIANT.start[VARIANT.TERMS[TERM][n]] is not None:
            start = tl.maximum(start, VARIANT.start[VARIANT.TERMS[TERM][n]](q_idx, numbers[VARIANT.TERMS[TERM][n] + 1]))
    kept = kv_idx < end
    if VARIANT.STARTS[TERM]:
        kept = kept & (kv_idx >= start)
    return kept


@triton.jit
def _alone(VARIANT: tl.constexpr, RULE: tl.constexpr, q_idx, kv_idx, numbers):
    if VARIANT.stop[RULE] is None:
        kept = VARIANT.keep[RULE](q_idx, kv_idx, numbers[RULE + 1])
    else:
        kept = kv_idx < VARIANT.stop[RULE](q_idx, numbers[RULE + 1])
        if VARIANT.start[RULE] is not None:
            kept = kept & (kv_idx >= VARIANT.start[RULE](q_idx, numbers[RULE + 1]))
    return kept


@triton.jit
def kv_span(VARIANT: tl.constexpr, TERM: tl.constexpr, q_lo, q_hi, numbers, BLOCK: tl.constexpr):
    """The keys that one term shows to queries q_lo ... q_hi - 1, within the problem."""
    span = (0, 0, numbers[0][1], numbers[0][1])
    for n in tl.static_range(len(VARIANT.TERMS[TERM])):
        shown = VARIANT.kv_span[VARIANT.TERMS[TERM][n]](q_lo, q_hi, numbers[VARIANT.TERMS[TERM][n] + 1], BLOCK)
        span = _intersect(span, shown)
    return span


@triton.jit
def q_span(VARIANT: tl.constexpr, TERM: tl.constexpr, kv_lo, kv_hi, numbers, BLOCK: tl.constexpr):
    """The queries that one term shows keys kv_lo ... kv_hi - 1 to, within the problem."""
    span = (0, 0, numbers[0][0], numbers[0][0])
    for n in tl.static_range(len(VARIANT.TERMS[TERM])):
        shown = VARIANT.q_span[VARIANT.TERMS[TERM][n]](kv_lo, kv_hi, numbers[VARIANT.TERMS[TERM][n] + 1], BLOCK)
        span = _intersect(span, shown)
    return span


@triton.jit
def _intersect(a, b):
    return tl.maximum(a[0], b[0]), tl.maximum(a[1], b[1]), tl.minimum(a[2], b[2]), tl.minimum(a[3], b[3])


# A placed mask sees the keys with low <= kv_idx - q_idx <= high. No bound is None on the host, UNBOUNDED in a kernel.


@triton.jit
def _diagonal(bound, offsets, batch, IF_NONE: tl.constexpr):
    """A bound as an int32, moved by this batch item's offset where there is one; IF_NONE where there is none."""
    if bound is None:
        return IF_NONE
    elif offsets is None:
        return from_opaque(bound)
    else:
        offset = tl.minimum(tl.maximum(tl.load(offsets + batch), -UNBOUNDED), UNBOUNDED).to(tl.int32)
        return tl.minimum(tl.maximum(offset + from_opaque(bound), -UNBOUNDED), UNBOUNDED)


@triton.jit
def _placed_numbers(args, batch, head, q_len, kv_len):
    return _diagonal(args[0], args[2], batch, -UNBOUNDED), _diagonal(args[1], args[2], batch, UNBOUNDED)


@triton.jit
def _placed_start(q_idx, numbers):
    return q_idx + numbers[0]


@triton.jit
def _placed_stop(q_idx, numbers):
    return q_idx + numbers[1] + 1


@triton.jit
def _causal_kv_span(q_lo, q_hi, numbers, BLOCK: tl.constexpr):
    return 0, 0, q_lo + numbers[1] + 1, q_hi + numbers[1]


@triton.jit
def _causal_q_span(kv_lo, kv_hi, numbers, BLOCK: tl.constexpr):
    return kv_lo - numbers[1], kv_hi - 1 - numbers[1], UNBOUNDED, UNBOUNDED


@triton.jit
def _window_kv_span(q_lo, q_hi, numbers, BLOCK: tl.constexpr):
    low, high = numbers[0], numbers[1]
    return q_lo + low, q_hi - 1 + low, q_lo + high + 1, q_hi + high


@triton.jit
def _window_q_span(kv_lo, kv_hi, numbers, BLOCK: tl.constexpr):
    low, high = numbers[0], numbers[1]
    return kv_lo - high, kv_hi - 1 - high, kv_lo - low + 1, kv_hi - low


@triton.jit
def _lengths_numbers(args, batch, head, q_len, kv_len):
    """kv_start, kv_stop, q_stop, clamped to the problem."""
    kv_start, q_stop = 0, q_len
    if args[1] is not None:
        q_stop = _length(args[1], batch, q_len)
    if args[2] is not None:
        kv_start = _length(args[2], batch, kv_len)
    return kv_start, _length(args[0], batch, kv_len), q_stop


@triton.jit
def _length(lengths, batch, most):
    return tl.minimum(tl.maximum(tl.load(lengths + batch), 0), most).to(tl.int32)


@triton.jit
def _lengths_start(q_idx, numbers):
    return numbers[0]


@triton.jit
def _lengths_stop(q_idx, numbers):
    return tl.where(q_idx < numbers[2], numbers[1], 0)


@triton.jit
def _lengths_kv_span(q_lo, q_hi, numbers, BLOCK: tl.constexpr):
    kv_start, kv_stop, q_stop = numbers[0], numbers[1], numbers[2]
    full_hi = tl.where(q_hi <= q_stop, kv_stop, kv_start)
    return kv_start, kv_start, full_hi, tl.where(q_lo < q_stop, kv_stop, kv_start)


@triton.jit
def _lengths_q_span(kv_lo, kv_hi, numbers, BLOCK: tl.constexpr):
    kv_start, kv_stop, q_stop = numbers[0], numbers[1], numbers[2]
    meets = (kv_lo < kv_stop) & (kv_hi > kv_start)
    inside = (kv_lo >= kv_start) & (kv_hi <= kv_stop)
    return 0, 0, tl.where(inside, q_stop, 0), tl.where(meets, q_stop, 0)


# Chunk c holds the positions c * size ... c * size + size - 1. Queries sit offset further on than they count.


@triton.jit
def _chunk(position, size):
    """floor(position / size), which C++ and Python disagree about below 0."""
    chunk = position // size
    return chunk - (position - chunk * size < 0).to(chunk.dtype)


@triton.jit
def _chunked_numbers(args, batch, head, q_len, kv_len):
    """size, chunks back, chunks ahead, offset; none back or ahead is UNBOUNDED."""
    return from_opaque(args[0]), from_opaque(args[1]), from_opaque(args[2]), _diagonal(args[3], args[4], batch, 0)


@triton.jit
def _chunked_start(q_idx, numbers):
    return _chunk_edge(q_idx + numbers[3], -numbers[1], numbers[0], 0)


@triton.jit
def _chunked_stop(q_idx, numbers):
    return _chunk_edge(q_idx + numbers[3], numbers[2] + 1, numbers[0], 0)


@triton.jit
def _chunked_kv_span(q_lo, q_hi, numbers, BLOCK: tl.constexpr):
    return _chunk_span(q_lo + numbers[3], q_hi + numbers[3], 0, numbers[0], numbers[1], numbers[2])


@triton.jit
def _chunked_q_span(kv_lo, kv_hi, numbers, BLOCK: tl.constexpr):
    return _chunk_span(kv_lo, kv_hi, numbers[3], numbers[0], numbers[2], numbers[1])


@triton.jit
def _chunk_span(lo, hi, offset, size, back, ahead):
    """The positions within reach of lo ... hi - 1, less the offset."""
    return (
        _chunk_edge(lo, -back, size, offset),
        _chunk_edge(hi - 1, -back, size, offset),
        _chunk_edge(lo, ahead + 1, size, offset),
        _chunk_edge(hi - 1, ahead + 1, size, offset),
    )


@triton.jit
def _chunk_edge(position, chunks, size, offset):
    """Where the chunk begins that lies `chunks` beyond a position's own. 64 bits wide before it is clamped."""
    edge = (_chunk(position, size).to(tl.int64) + chunks) * size - offset
    return tl.minimum(tl.maximum(edge, -UNBOUNDED), UNBOUNDED).to(tl.int32)


# Prefix: causal, and the first keys for all.


@triton.jit
def _prefix_numbers(args, batch, head, q_len, kv_len):
    return 0, _diagonal(args[1], args[2], batch, UNBOUNDED), _length(args[3], batch, kv_len)


@triton.jit
def _prefix_stop(q_idx, numbers):
    return tl.maximum(q_idx + numbers[1] + 1, numbers[2])


@triton.jit
def _prefix_kv_span(q_lo, q_hi, numbers, BLOCK: tl.constexpr):
    span = _causal_kv_span(q_lo, q_hi, numbers, BLOCK)
    return 0, 0, tl.maximum(span[2], numbers[2]), tl.maximum(span[3], numbers[2])


@triton.jit
def _prefix_q_span(kv_lo, kv_hi, numbers, BLOCK: tl.constexpr):
    span = _causal_q_span(kv_lo, kv_hi, numbers, BLOCK)
    return tl.where(kv_lo < numbers[2], 0, span[0]), tl.where(kv_hi <= numbers[2], 0, span[1]), UNBOUNDED, UNBOUNDED


# Row tables: any mask that shows each query one interval of keys, [start, stop) read from a table. A query that sees
# nothing has start kv_len and stop 0, so that least and most over a tile of rows are right as they come.


@triton.jit
def _rows_numbers(args, batch, head, q_len, kv_len):
    """Where this head's rows begin: starts, stops (a number a query); bounds (four a key, see mask_lowering.py)."""
    rows = batch.to(tl.int64) * from_opaque(args[3][0]) + head.to(tl.int64) * from_opaque(args[3][1])
    bounds = batch.to(tl.int64) * from_opaque(args[4][0]) + head.to(tl.int64) * from_opaque(args[4][1])
    return args[0] + rows, args[1] + rows, args[2] + bounds, q_len, kv_len


@triton.jit
def _rows_start(q_idx, numbers):
    return tl.load(numbers[0] + q_idx, mask=q_idx < numbers[3], other=0)


@triton.jit
def _rows_stop(q_idx, numbers):
    return tl.load(numbers[1] + q_idx, mask=q_idx < numbers[3], other=0)


@triton.jit
def _rows_kv_span(q_lo, q_hi, numbers, BLOCK: tl.constexpr):
    rows = tl.minimum(q_lo + tl.arange(0, BLOCK), q_hi - 1)
    start, stop = tl.load(numbers[0] + rows), tl.load(numbers[1] + rows)
    return tl.min(start, 0), tl.max(start, 0), tl.min(stop, 0), tl.max(stop, 0)


@triton.jit
def _rows_q_span(kv_lo, kv_hi, numbers, BLOCK: tl.constexpr):
    first, last, kv_len = numbers[2] + kv_lo, numbers[2] + kv_hi - 1, numbers[4]
    return tl.load(first), tl.load(last + kv_len), tl.load(first + 2 * kv_len), tl.load(last + 3 * kv_len)


# Scattered segments and tables have no span.


@triton.jit
def _segments_numbers(args, batch, head, q_len, kv_len):
    q_step, kv_step = from_opaque(args[2]), from_opaque(args[3])
    return args[0] + batch.to(tl.int64) * q_step, args[1] + batch.to(tl.int64) * kv_step, q_len, kv_len


@triton.jit
def _segments_keep(q_idx, kv_idx, numbers):
    q_id = tl.load(numbers[0] + q_idx, mask=q_idx < numbers[2], other=-1)
    return (q_id == tl.load(numbers[1] + kv_idx, mask=kv_idx < numbers[3], other=-1)) & (q_id >= 0)


@triton.jit
def _dense_numbers(args, batch, head, q_len, kv_len):
    """The first byte of the table; the strides of its queries and keys."""
    table = args[0] + batch.to(tl.int64) * stride(args[1], 0) + head.to(tl.int64) * stride(args[1], 1)
    return table, stride(args[1], 2), stride(args[1], 3), q_len, kv_len


@triton.jit
def _dense_keep(q_idx, kv_idx, numbers):
    at = numbers[0] + q_idx.to(tl.int64) * numbers[1] + kv_idx.to(tl.int64) * numbers[2]
    return tl.load(at, mask=(q_idx < numbers[3]) & (kv_idx < numbers[4]), other=0) != 0


RULES: dict[str, Rule] = {
    "Causal": Rule(_placed_numbers, None, _placed_stop, None, _causal_kv_span, _causal_q_span),
    "Window": Rule(_placed_numbers, _placed_start, _placed_stop, None, _window_kv_span, _window_q_span),
    "Chunked": Rule(_chunked_numbers, _chunked_start, _chunked_stop, None, _chunked_kv_span, _chunked_q_span),
    "Lengths": Rule(_lengths_numbers, _lengths_start, _lengths_stop, None, _lengths_kv_span, _lengths_q_span),
    "Prefix": Rule(_prefix_numbers, None, _prefix_stop, None, _prefix_kv_span, _prefix_q_span),
    "Rows": Rule(_rows_numbers, _rows_start, _rows_stop, None, _rows_kv_span, _rows_q_span),
    "Segments": Rule(_segments_numbers, keep=_segments_keep),
    "Dense": Rule(_dense_numbers, keep=_dense_keep),
}
"""By the mask's class name; `Full` hides nothing and needs none. "Rows" serves any other mask with an interval."""
