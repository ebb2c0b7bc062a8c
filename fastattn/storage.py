"""Whether the memory of a call's tensors is still there: a storage can be resized after a tensor was made on it."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor


def check(names: Iterable[str], tensors: Iterable[Tensor | None], *, thorough: bool = False) -> None:
    """Raise ValueError where a tensor's storage holds fewer bytes than its numbers take.

    Without `thorough`, which takes longer, a tensor with gaps passes whose storage holds as many bytes and ends before
    its last number. One without a storage of its own, a wrapper, passes.
    """
    for name, tensor in zip(names, tensors, strict=False):
        if tensor is None:
            continue
        try:
            held = tensor.untyped_storage().nbytes()
        except (NotImplementedError, RuntimeError):
            continue
        # One that is expanded repeats its memory.
        if (thorough or held < tensor.nbytes) and held < (needed := _needed(tensor)):
            raise ValueError(
                f"{name}: its storage holds {held} bytes, and its numbers take {needed}; the storage was resized after "
                "the tensor was made (untyped_storage().resize_, as FSDP frees parameters); fill it again first"
            )


def _needed(tensor: Tensor) -> int:
    """Bytes from the start of a tensor's storage to the end of its last number."""
    if tensor.numel() == 0:
        return 0
    last = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    return int((tensor.storage_offset() + last + 1) * tensor.element_size())
