"""Dropout bits: the same in every backend, on every device.

Element (b, h, i, j) of the weights is kept when word j % 4 of Philox4x32-10 with key = seed and counter = (j // 4, i,
h, b) is at least floor(p * 2^32). Philox: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".
"""

from __future__ import annotations

import torch
from torch import Tensor

WORD = 0xFFFFFFFF
ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)


def philox(seed: Tensor, counter: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10. seed int64 [1] (its 64 bits are the key), counter four int64 tensors below 2^32 -> four such
    words.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = seed & WORD, (seed >> 32) & WORD
    for _ in range(ROUNDS):
        # An unsigned 32 x 32 product wraps in int64 with its bits right; masking after the shift drops sign copies.
        p0, p1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c1, c2, c3 = ((p1 >> 32) & WORD) ^ c1 ^ k0, p1 & WORD, ((p0 >> 32) & WORD) ^ c3 ^ k1, p0 & WORD
        k0, k1 = (k0 + KEY_STEPS[0]) & WORD, (k1 + KEY_STEPS[1]) & WORD
    return c0, c1, c2, c3


def threshold(p: float) -> int:
    """Words below it are dropped: floor(p * 2^32)."""
    return int(p * (WORD + 1))


def dropout_mask(batch: int, num_heads: int, q_len: int, kv_len: int, *, p: float, seed: Tensor) -> Tensor:
    """The table of weights that `attention(..., dropout_p=p, dropout_seed=seed)` keeps.

    Args:
        batch, num_heads, q_len, kv_len: the sizes of the problem.
        p: the probability of dropping, from 0 to 1.
        seed: int64 tensor [1]; its device is the result's.

    Returns:
        bool [batch, num_heads, q_len, kv_len], True = kept.

    Raises:
        TypeError: p is not a Python number.
        ValueError: p outside [0, 1], a seed that is not an int64 tensor of shape [1], or a size below 0.
    """
    check_dropout(p, seed)
    for name, size in (("batch", batch), ("num_heads", num_heads), ("q_len", q_len), ("kv_len", kv_len)):
        if isinstance(size, bool) or not isinstance(size, (int, torch.SymInt)) or size < 0:
            raise ValueError(f"{name}: an int of at least 0 is needed, got {size!r}")

    return kept_of_rows(batch, num_heads, torch.arange(q_len, device=seed.device), kv_len, p=p, seed=seed)


def kept_of_rows(batch: int, num_heads: int, rows: Tensor, kv_len: int, *, p: float, seed: Tensor) -> Tensor:
    """Of that table the queries `rows`, int64 [n]: bool [batch, num_heads, n, kv_len]."""

    def axis(places: Tensor, dim: int) -> Tensor:
        return places.view([-1 if d == dim else 1 for d in range(4)])

    sizes = ((kv_len + 3) // 4, 3), (num_heads, 1), (batch, 0)
    columns, heads, items = (axis(torch.arange(size, device=seed.device), dim) for size, dim in sizes)
    words = philox(seed, (columns, axis(rows, 2), heads, items))
    shape = (batch, num_heads, rows.shape[0], columns.shape[3])
    return torch.stack([word.expand(shape) for word in words], -1).flatten(-2)[..., :kv_len] >= threshold(p)


def new_dropout_seed(device: torch.device | str) -> Tensor:
    """A fresh seed, int64 [1], from torch's generator of that device."""
    info = torch.iinfo(torch.int64)
    return torch.randint(info.min, info.max, (1,), dtype=torch.int64, device=device)


def check_dropout(p: float, seed: Tensor | None) -> None:
    """Raise unless p is a number in [0, 1] and the seed, where given, is an int64 tensor [1]."""
    check_number("dropout_p", p)
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"dropout_p: a probability from 0 to 1 is needed, got {p}")
    if seed is not None and (not isinstance(seed, Tensor) or seed.dtype != torch.int64 or tuple(seed.shape) != (1,)):
        got = f"{seed.dtype} {list(seed.shape)}" if isinstance(seed, Tensor) else type(seed).__name__
        raise ValueError(
            f"dropout_seed: an int64 tensor of shape [1] is needed, got {got}; "
            "fastattn.functional.new_dropout_seed makes one"
        )


def check_number(name: str, value: object, *, bools: bool = True) -> None:
    """Raise TypeError for anything but a Python number: no derivative would reach a tensor here. `bools`: True and
    False are 1 and 0, as in `training and 0.1`.
    """
    if not isinstance(value, (float, int, torch.SymFloat, torch.SymInt)) or (not bools and isinstance(value, bool)):
        hint = "; a learned factor goes into the query" if isinstance(value, Tensor) else ""
        raise TypeError(f"{name}: a Python number is needed, got {type(value).__name__}{hint}")
