"""ALiBi as flash-attn takes it (Press et al. 2022): slopes a head, a head and batch item, or a head and sequence."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def check_slopes(slopes: object, query: Tensor, sequences: int | None = None) -> None:
    """One slope for each head of query [batch, num_heads, q_len, head_dim], or for each head of each batch item.

    Args:
        sequences: how many there are, where they are packed and not the batch.

    Raises:
        TypeError, ValueError: something else.
    """
    batch, num_heads = query.shape[0] if sequences is None else sequences, query.shape[1]
    each = "batch" if sequences is None else "sequences"
    want = (
        f"alibi_slopes: float32 [num_heads] = [{num_heads}] or [{each}, num_heads] = [{batch}, {num_heads}] is needed"
    )
    if not isinstance(slopes, Tensor):
        raise TypeError(f"{want}, got {type(slopes).__name__}")
    if list(slopes.shape) not in ([num_heads], [batch, num_heads]) or not slopes.is_floating_point():
        raise ValueError(f"{want}, got {slopes.dtype} {list(slopes.shape)}")
    if slopes.device != query.device:
        raise ValueError(f"alibi_slopes: they must be on q's device {query.device}, got {slopes.device}")


@dataclass(frozen=True)
class Alibi:
    """-slope * |row - place| for each query's row and each key's place, both counted back from the last key.

    Where nobody looks ahead, this is slope * place but for a number that all keys of a row share, which the softmax
    does not feel and lse does: a row of numbers a head then serves in place of a table.
    """

    q_slopes: Tensor  # [batch or 1, num_heads, q_len or 1]
    k_slopes: Tensor  # [batch or 1, num_heads, kv_len or 1]
    rows: Tensor  # [batch or 1, q_len]
    places: Tensor  # [batch or 1, kv_len]
    by_key: bool

    @classmethod
    def of_lengths(cls, slopes: Tensor, q_len: int, kv_len: int, by_key: bool) -> Alibi:
        """For one length of queries and one of keys."""
        each = (slopes[None] if slopes.dim() == 1 else slopes)[..., None].detach()
        rows, places = (torch.arange(1 - length, 1, device=slopes.device)[None] for length in (q_len, kv_len))
        return cls(each, each, rows, places, by_key)

    @classmethod
    def of_cache(cls, slopes: Tensor, lengths: Tensor, q_len: int, kv_len: int, by_key: bool) -> Alibi:
        """For keys whose last one lies at lengths[batch] - 1, and queries that end there."""
        alibi = cls.of_lengths(slopes, q_len, kv_len, by_key)
        places = torch.arange(1, kv_len + 1, device=slopes.device) - lengths[:, None]
        return cls(alibi.q_slopes, alibi.k_slopes, alibi.rows, places, by_key)

    @classmethod
    def of_packed(
        cls, slopes: Tensor, cu_q: Tensor, cu_kv: Tensor, q_tokens: int, kv_tokens: int, by_key: bool
    ) -> Alibi:
        """For sequences laid end to end, cu_q and cu_kv [sequences + 1] saying where each begins."""
        found = []
        for cu, tokens in ((cu_q, q_tokens), (cu_kv, kv_tokens)):
            token = torch.arange(tokens, device=cu.device)
            sequence = (torch.searchsorted(cu.long(), token, right=True) - 1).clamp(max=cu.shape[0] - 2)
            each = slopes[:, None] if slopes.dim() == 1 else slopes[sequence].T
            found.append(((token - cu[sequence + 1] + 1)[None], each[None].detach()))
        (rows, q_slopes), (places, k_slopes) = found
        return cls(q_slopes, k_slopes, rows, places, by_key)

    def bias(self, dtype: torch.dtype) -> Tensor:
        """What is added to the scores, [batch or 1, num_heads, q_len or 1, kv_len]; float32, float64 for float64."""
        dtype = torch.float64 if dtype == torch.float64 else torch.float32
        if self.by_key:
            return (self.k_slopes * self.places[:, None]).to(dtype)[:, :, None]
        away = (self.rows[:, None, :, None] - self.places[:, None, None]).abs()
        return (-self.q_slopes[..., None] * away).to(dtype)

    def whole(self, lse: Tensor) -> Tensor:
        """lse with what every key of a row shares."""
        return lse - (self.q_slopes * self.rows[:, None]).to(lse.dtype) if self.by_key else lse
