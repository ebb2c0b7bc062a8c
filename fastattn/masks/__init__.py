"""Masks: which queries see which keys.

A mask is a frozen value. `mask.dense(q_len, kv_len)` is the bool table it stands for, broadcastable to
[batch, num_heads, q_len, kv_len], True = attend. `a & b` shows what both show, `a | b` what either shows.

Most masks are *interval masks*: query i sees the keys start <= j < stop, and `interval` says start and stop. It is
written once per mask; the dense table, the pictures, the counts and the tile lists (blocks.py) are all derived from it.

`Causal`, `Window`, `Chunked` and `Prefix` place query i at position i + offset. `align="bottom-right"` (the default)
means offset = kv_len - q_len, so that the last query sits at the last key; `align="top-left"` means 0; `offset=`, an
int or an int tensor [batch], says it outright (a cache with empty slots needs that).

Tensors are int32 or int64 and live on the query's device. Their values are checked when the mask is made if they lie
on the CPU, or anywhere with `validate=True` (one device sync); `validate=False` never checks. Kernels clamp, so that
a bad value hides or shows wrong keys but never reads out of bounds.
"""

# base: Mask, & and |. kinds: each mask, its definition. paged: keys in blocks.
# For backends: serialize (primitives, pytrees), program (postfix, for C++), blocks (lists of tiles).
# torch's own: flex takes a CausalBias or a BlockMask; mask_mod reads its function by the rules of mask_mod_rules.
from fastattn.masks.base import And, Mask, Or, visible_pairs
from fastattn.masks.kinds import Causal, Chunked, Dense, Full, Lengths, Packed, Prefix, Segments, Window

__all__ = [
    "And", "Causal", "Chunked", "Dense", "Full", "Lengths", "Mask", "Or", "Packed", "Prefix", "Segments", "Window",
    "visible_pairs",
]  # fmt: skip
