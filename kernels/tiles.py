"""Tiles: how they are walked, loaded, multiplied and stored."""

import triton
import triton.language as tl


@triton.jit
def walk(span, BLOCK: tl.constexpr):
    """A span in tiles: four bounds that cut it into edge, full, edge. Only the middle part needs no check."""
    lo, full_lo, full_hi, hi = span
    lo = lo // BLOCK * BLOCK
    full_lo = tl.maximum(tl.minimum(tl.cdiv(full_lo, BLOCK) * BLOCK, hi), lo)
    full_hi = tl.maximum(tl.minimum(full_hi, hi) // BLOCK * BLOCK, full_lo)
    return lo, full_lo, full_hi, hi


@triton.jit
def tile_base(pointer, strides, batch, head):
    """The first element of one batch item and head, addressed in 64 bits."""
    return pointer + batch.to(tl.int64) * strides[0] + head.to(tl.int64) * strides[1]


@triton.jit
def load_tile(base, strides, rows, length, DIM: tl.constexpr, BLOCK_D: tl.constexpr, CHECK: tl.constexpr):
    """Rows of [length, DIM] as [len(rows), BLOCK_D]; 0 beyond DIM and, with CHECK, beyond the length."""
    offs_d = tl.arange(0, BLOCK_D)
    pointers = base + rows.to(tl.int64)[:, None] * strides[2] + offs_d.to(tl.int64)[None, :] * strides[3]
    if CHECK and DIM != BLOCK_D:
        return tl.load(pointers, mask=(rows < length)[:, None] & (offs_d < DIM)[None, :], other=0.0)
    elif CHECK:
        return tl.load(pointers, mask=(rows < length)[:, None], other=0.0)
    elif DIM != BLOCK_D:
        return tl.load(pointers, mask=(offs_d < DIM)[None, :], other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def store_tile(
    base, strides, rows, length, values, DIM: tl.constexpr, BLOCK_D: tl.constexpr, BF16_BY_HAND: tl.constexpr
):
    """The reverse, always checked, in the pointer's dtype."""
    offs_d = tl.arange(0, BLOCK_D)
    pointers = base + rows.to(tl.int64)[:, None] * strides[2] + offs_d.to(tl.int64)[None, :] * strides[3]
    inside = (rows < length)[:, None] & (offs_d < DIM)[None, :]
    tl.store(pointers, narrow(values, base.dtype.element_ty, BF16_BY_HAND), mask=inside)


@triton.jit
def only_seen(tile, kept, AXIS: tl.constexpr):
    """Rows of a tile that a partner sees; the others as 0, for they may hold anything. `kept` is reduced over AXIS."""
    seen = tl.max(kept.to(tl.int32), AXIS) > 0
    return tl.where(seen[:, None], tile, 0.0)


# Triton's interpreter multiplies bfloat16 wrongly and cuts float32 off instead of rounding it. BF16_BY_HAND, set only
# there, widens factors and rounds to nearest even before the cut. Nothing else in this room knows.


@triton.jit
def dot(a, b, PRECISION: tl.constexpr, BF16_BY_HAND: tl.constexpr):
    """a @ b in float32."""
    if BF16_BY_HAND:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision=PRECISION)
    else:
        return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def narrow(values, dtype: tl.constexpr, BF16_BY_HAND: tl.constexpr):
    """float32 rounded to the dtype of a factor or an output."""
    if BF16_BY_HAND:
        bits = values.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
        values = bits.to(tl.float32, bitcast=True)
    return values.to(dtype)


@triton.jit
def split_program(tiles, heads):
    """program_id(0) -> tile, head, batch; tiles run fastest. One axis, as the others end at 65,535."""
    program = tl.program_id(0)
    rest = program // tiles
    return program % tiles, rest % heads, rest // heads
