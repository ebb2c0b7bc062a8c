"""Dropout bits: the contract's Philox4x32-10 words (fastattn/dropout.py), tile by tile."""

import triton
import triton.language as tl

from fastattn.kernels.opaque_int import from_opaque, opaque

WORDS = 2**32
WIDE = tl.constexpr(2**40)  # added, the threshold takes 64 bits whatever it is


def threshold_of(dropout_p: float) -> int:
    """Words below it are dropped; as it travels."""
    return opaque(int(dropout_p * WORDS) + WIDE.value)


@triton.jit
def kept_weights(seed, threshold, batch, head, q_idx, kv_lo, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """bool [ROWS, COLUMNS]: which weights of queries q_idx [ROWS] and keys kv_lo ... kv_lo + COLUMNS - 1 are kept.

    One Philox block of four words serves four keys side by side; kv_lo is a multiple of 4. `head` may be a vector like
    q_idx.
    """
    word = tl.zeros([ROWS, COLUMNS // 4], tl.int32)
    c0 = word + (kv_lo // 4 + tl.arange(0, COLUMNS // 4))[None, :]
    c1 = word + q_idx[:, None]
    c2 = word + (tl.zeros([ROWS], tl.int32) + head)[:, None]
    w0, w1, w2, w3 = tl.philox(tl.load(seed), c0, c1, c2, word + batch)
    # The last axis of a join runs fastest: pairs (0, 1) and (2, 3) side by side.
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))
    return tl.reshape(words, [ROWS, COLUMNS]).to(tl.int64) >= from_opaque(threshold) - WIDE
