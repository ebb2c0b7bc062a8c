"""A mask whose tensors have lost their memory is refused before anybody reads it."""

import pytest
import torch

from fastattn import attention, attention_weights
from fastattn.masks import Causal, Dense, Lengths, Packed, Prefix, Segments, Window

TENSOR = torch.randn(1, 2, 70, 16)


def whole(*numbers):
    return torch.tensor(numbers, dtype=torch.int32)


MASKS = {
    "lengths": lambda: Lengths(whole(50)),
    "starts": lambda: Lengths(whole(50), kv_starts=whole(2)),
    "prefix": lambda: Prefix(whole(5)),
    "segments": lambda: Segments(torch.zeros(1, 70, dtype=torch.int32)),
    "packed": lambda: Packed(whole(0, 30, 70), whole(0, 30, 70)),
    "offset": lambda: Causal(offset=whole(0)),
    "table": lambda: Dense(torch.ones(70, 70, dtype=torch.bool)),
    "joined": lambda: Window(3, 3) & Lengths(whole(50)),
}
CALLS = {
    "forward": lambda mask: attention(TENSOR, TENSOR, TENSOR, mask=mask),
    "training": lambda mask: attention(TENSOR.clone().requires_grad_(), TENSOR, TENSOR, mask=mask),
    "reference": lambda mask: attention(TENSOR, TENSOR, TENSOR, mask=mask, backend="reference"),
    "weights": lambda mask: attention_weights(TENSOR, TENSOR, mask=mask),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("name", MASKS)
def test_a_mask_without_its_memory_is_refused(name, call):
    mask = MASKS[name]()
    assert call(mask).isfinite().all()
    for tensor in mask.tensors:
        tensor.untyped_storage().resize_(0)
    # Packed looks at its numbers by itself, where PyTorch refuses in its own words.
    with pytest.raises(
        (ValueError, RuntimeError), match=r"storage (holds 0 bytes|of size 0)|out of bounds for storage"
    ):
        call(mask)


def test_memory_that_goes_before_the_backward_is_missed_there():
    mask = Lengths(whole(50))
    query = TENSOR.clone().requires_grad_()
    out = attention(query, TENSOR, TENSOR, mask=mask)
    mask.tensors[0].untyped_storage().resize_(0)
    with pytest.raises((ValueError, RuntimeError), match=r"storage|modified"):
        out.sum().backward()
