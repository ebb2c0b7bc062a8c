"""What the adapters of several backends share: the type of gradients, and inputs as kernels read them."""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn import storage
from fastattn.spec import AttnInputs

Gradients = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]
"""dq, dk, dv, dbias, dsinks, in the shapes and dtypes of what they are gradients of; None where there is none."""


def readable(inputs: AttnInputs, *, sinks_dtype: torch.dtype | None = None, looked_at: bool = True) -> AttnInputs:
    """The inputs as kernels read memory: no negated views, sinks side by side, in `sinks_dtype` where one is given.
    `looked_at`: somebody has seen that no tensor's memory was taken away; else that is done here before any is copied.

    Raises:
        ValueError: memory is missing, as `storage.check` says it.
    """
    query, key, value, bias, sinks, _ = inputs
    if query.is_neg() or key.is_neg() or value.is_neg() or bias is not None or sinks is not None:
        if not looked_at:
            storage.check(inputs._fields, inputs)
        inputs = inputs.resolved()
    if inputs.sinks is not None:
        inputs = inputs._replace(sinks=inputs.sinks.to(sinks_dtype or inputs.sinks.dtype).contiguous())
    return inputs
