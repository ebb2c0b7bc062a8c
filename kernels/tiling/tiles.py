"""Tiles: how they are loaded, multiplied and stored.

A tensor is a pointer with its four strides, or a tensor descriptor, which has none: Hopper's copy engine (TMA) then
moves whole tiles, [1, 1, rows, BLOCK_D] of [batch, heads, length, DIM], fills what lies outside with 0 and leaves out
what may not be written. Addresses are 64 bits wide.
"""

import triton
import triton.language as tl

from fastattn.kernels.opaque_int import from_opaque, stride


@triton.jit
def load_tile(
    tensor, strides, batch, head, rows, start, length, DIM: tl.constexpr, BLOCK_D: tl.constexpr, CHECK: tl.constexpr
):
    """Rows of [length, DIM] as [len(rows), BLOCK_D]; 0 beyond DIM and, with CHECK, beyond length. `rows` begin at
    `start` and follow each other where the tensor is a descriptor. `head` may be a vector, one for each row.
    """
    if len(strides) == 0:
        tile = tensor.load([batch, head, start, 0])
        return tl.reshape(tile, [tile.shape[2], BLOCK_D])
    else:
        pointers, inside = _pointers(tensor, strides, batch, head, rows, length, DIM, BLOCK_D)
        if CHECK:
            return tl.load(pointers, mask=inside, other=0.0)
        elif DIM != BLOCK_D:
            return tl.load(pointers, mask=(tl.arange(0, BLOCK_D) < DIM)[None, :], other=0.0)
        else:
            return tl.load(pointers)


@triton.jit
def store_tile(
    tensor, strides, batch, head, rows, start, length, tile, DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BF16_BY_HAND: tl.constexpr,
):  # fmt: skip
    """The reverse of load_tile, rounded to the tensor's dtype."""
    if len(strides) == 0:
        tile = round_to(tile, tensor.dtype, BF16_BY_HAND)
        tensor.store([batch, head, start, 0], tl.reshape(tile, [1, 1, tile.shape[0], BLOCK_D]))
    else:
        pointers, inside = _pointers(tensor, strides, batch, head, rows, length, DIM, BLOCK_D)
        tl.store(pointers, round_to(tile, tensor.dtype.element_ty, BF16_BY_HAND), mask=inside)


@triton.jit
def _pointers(tensor, strides, batch, head, rows, length, DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """[len(rows), BLOCK_D], and which of them lie inside."""
    offs_d = tl.arange(0, BLOCK_D)
    if len(strides) == 5:  # a pool of blocks: tensor_arguments._in_blocks
        own, table, width, size, count = strides
        base = tensor
        block = tl.load(
            table + batch.to(tl.int64) * from_opaque(width) + rows // from_opaque(size), mask=rows < length, other=0
        )
        block = tl.minimum(tl.maximum(block, 0), from_opaque(count) - 1)
        offs_row = head.to(tl.int64) * stride(own, 1) + block.to(tl.int64) * stride(own, 0)
        offs_row += (rows % from_opaque(size)).to(tl.int64) * stride(own, 2)
    else:
        own = strides
        base = tensor + batch.to(tl.int64) * stride(own, 0)
        offs_row = head.to(tl.int64) * stride(own, 1) + rows.to(tl.int64) * stride(own, 2)
    inside = (rows < length)[:, None]
    if DIM != BLOCK_D:
        inside = inside & (offs_d < DIM)[None, :]
    return base + offs_row[:, None] + offs_d.to(tl.int64)[None, :] * stride(own, 3), inside


@triton.jit
def row_places(batch, num_heads, head, q_len, q_idx):
    """Where rows lie in a contiguous [batch, num_heads, q_len], 64 bits wide."""
    return (batch.to(tl.int64) * num_heads + head) * q_len + q_idx


@triton.jit
def load_line(tensor, strides, batch, head, rows, start, other: tl.constexpr):
    """[len(rows)] of a [batch, heads, padded] tensor, `rows` from `start` on; pointer or descriptor, see load_tile.
    What lies past the end is `other`, or 0 from a descriptor.
    """
    if len(strides) == 0:
        line = tensor.load([batch, head, 0, start])
        return tl.reshape(line, [line.shape[3]])
    else:
        places, inside = line_places(strides, batch, head, rows)
        return tl.load(tensor + places, mask=inside, other=other)


@triton.jit
def line_places(strides, batch, head, rows):
    """Where rows lie in a contiguous [batch, heads, padded], 64 bits wide, and which of them do."""
    return batch.to(tl.int64) * strides[0] + head.to(tl.int64) * strides[1] + rows, rows < strides[1]


@triton.jit
def only_seen(tile, kept, AXIS: tl.constexpr):
    """Rows of a tile that a partner sees; the others as 0, for they may hold anything. `kept` is reduced over AXIS."""
    seen = tl.max(kept.to(tl.int32), AXIS) > 0
    return tl.where(seen[:, None], tile, 0.0)


# Triton's interpreter multiplies bfloat16 wrongly and cuts float32 off instead of rounding it. BF16_BY_HAND, set only
# there, widens factors and rounds to nearest even before the cut. Nothing else in this backend knows.


@triton.jit
def dot(a, b, VARIANT: tl.constexpr):
    """a @ b in float32."""
    if VARIANT.BF16_BY_HAND:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision=VARIANT.PRECISION)
    else:
        return tl.dot(a, b, input_precision=VARIANT.PRECISION)


@triton.jit
def add_dot(sum, a, b, VARIANT: tl.constexpr):
    """sum + round(a) @ b in float32; `a`, float32, is rounded to b's dtype."""
    a = round_to(a, b.dtype, VARIANT.BF16_BY_HAND)
    if VARIANT.BF16_BY_HAND:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), sum, input_precision=VARIANT.PRECISION)
    else:
        return tl.dot(a, b, sum, input_precision=VARIANT.PRECISION)


@triton.jit
def round_to(values, dtype: tl.constexpr, BF16_BY_HAND: tl.constexpr):
    """float32 rounded to the dtype of a factor or an output."""
    if BF16_BY_HAND and dtype == tl.bfloat16:
        bits = values.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
        values = bits.to(tl.float32, bitcast=True)
    return values.to(dtype)
