"""What rounding takes from a forward's results, kept for its backward.

A float32 lse beside scores of 1e4 has an ulp of 1e-3, which exp(score - lse) turns into an error of the weights. The
gradient of a score is the difference of d_out * value and a row sum of d_out * out, in which the rounding of a
half-precision out is seen. As in double-double arithmetic (Dekker 1971), each result is the sum of a high part, which
the caller gets, and of a low part.

Which parts there are follows from the spec alone, since operators promise shapes before a backend is chosen.
`forward_with_low` of a backend gives them; a backward that is given none takes out and lse at their word.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from fastattn.spec import AttnSpec


class LowParts(NamedTuple):
    """lse's: float32 [batch, num_heads, q_len]; out's: in its shape and dtype. None: not kept."""

    lse: Tensor | None = None
    out: Tensor | None = None

    @classmethod
    def empty(cls, spec: AttnSpec, out: Tensor, lse: Tensor) -> LowParts:
        """Uninitialised, for gradients on a CPU: both for half dtypes, lse's for float32."""
        if not spec.needs_grad or spec.device.type != "cpu" or spec.dtype == torch.float64:
            return NONE
        return cls(torch.empty_like(lse), None if spec.dtype == torch.float32 else torch.empty_like(out))

    def unknown(self) -> LowParts:
        """What a backend that keeps none leaves behind: no word on lse, and nothing taken from out."""
        if self.lse is not None:
            self.lse.fill_(torch.nan)
        if self.out is not None:
            self.out.zero_()
        return self

    def as_results(self, query: Tensor) -> tuple[Tensor, ...]:
        """For an operator, which returns tensors alone: [0] for a part that is not kept."""
        return tuple(query.new_empty(0) if part is None else part for part in self)

    @classmethod
    def of_results(cls, parts: tuple[Tensor, ...]) -> LowParts:
        """The opposite of `as_results`."""
        return cls(*(part if part.dim() > 1 else None for part in parts))


NONE = LowParts()


def not_kept(spec: AttnSpec, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, LowParts]:
    """The results of a forward that writes no low parts, as those of one that does."""
    return out, lse, LowParts.empty(spec, out, lse).unknown()
