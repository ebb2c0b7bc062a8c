"""Tensors whose memory was taken away are refused by name, as reading them would end the process."""

import pytest
import torch

import fastattn
from fastattn import masks
from fastattn.backends import cpu

BACKENDS = ("cpu", "reference")
TAKEN = {"all": 0, "most": 16}


def taken(tensor, left=0):
    """The tensor without its memory."""
    tensor.untyped_storage().resize_(left)
    return tensor


def problem(**changed):
    torch.manual_seed(0)
    made = {name: torch.randn(2, 2, 9, 8) for name in ("query", "key", "value")}
    return made | changed


@pytest.mark.parametrize("left", TAKEN)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["query", "key", "value"])
def test_an_input_whose_memory_was_taken_is_refused_by_name(library, name, backend, left):
    tensors = problem()
    taken(tensors[name], TAKEN[left])
    says = f"{name}: its storage holds {TAKEN[left]} bytes, and its numbers take 1152"
    with pytest.raises(ValueError, match=says):
        fastattn.attention(*tensors.values(), backend=backend)


OTHERS = {
    "bias": lambda: {"bias": taken(torch.randn(1, 2, 9, 9))},
    "sinks": lambda: {"sinks": taken(torch.randn(2))},
    "sinks of 16 bits": lambda: {"sinks": taken(torch.randn(2).bfloat16())},
    "dropout_seed": lambda: {"dropout_p": 0.5, "dropout_seed": taken(torch.zeros(1, dtype=torch.int64))},
    "a view of what is gone": lambda: {"query": view_of_taken()},
    "a view that ends beyond": lambda: {"query": view_of_taken(2 * 2 * 9 * 8 * 4)},
    "a negated view": lambda: {"key": negated_and_taken()},
}


def view_of_taken(left=0):
    whole = torch.randn(2, 2, 20, 8)
    view = whole[:, :, 5:14]
    taken(whole, left)
    return view


def negated_and_taken():
    whole = torch.randn(2, 2, 9, 8)
    view = torch._neg_view(whole)
    taken(whole)
    return view


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("what", OTHERS)
def test_whatever_of_a_call_has_no_memory_it_is_refused(library, what, backend):
    if backend == "reference" and what == "a view that ends beyond":
        pytest.skip("the look that is not thorough lets a view with gaps pass that lacks its end alone")
    given = problem(**OTHERS[what]())
    with pytest.raises(ValueError, match=r"its storage holds .* bytes, and its numbers take"):
        fastattn.attention(**given, backend=backend)


MASKS = {
    "Lengths": lambda numbers: masks.Lengths(numbers[:, 0]),
    "Segments": lambda numbers: masks.Segments(numbers),
    "Dense": lambda numbers: masks.Dense(numbers.bool()[:, None, :, None].expand(2, 1, 9, 9).contiguous()),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", MASKS)
def test_a_mask_whose_memory_was_taken_is_refused(library, kind, backend):
    """By PyTorch's own words where it looks first."""
    mask = MASKS[kind](torch.ones(2, 9, dtype=torch.int64))
    for tensor in mask.tensors:
        taken(tensor)
    with pytest.raises((ValueError, RuntimeError), match="storage"):
        fastattn.attention(**problem(), mask=mask, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("what", ["key", "the gradient of out"])
def test_a_backward_without_memory_is_refused(library, what, backend):
    tensors = problem()
    tensors["query"].requires_grad_()
    out = fastattn.attention(**tensors, backend=backend)
    gradient = torch.ones(2, 2, 9, 8)
    taken(tensors["key"] if what == "key" else gradient)
    with pytest.raises(ValueError, match=f"{what}: its storage holds 0 bytes"):
        out.backward(gradient)


def test_weights_without_memory_are_refused(library):
    with pytest.raises((ValueError, RuntimeError), match="storage"):
        fastattn.attention_weights(torch.randn(1, 2, 9, 8), taken(torch.randn(1, 2, 9, 8)))


def test_an_expanded_tensor_has_less_memory_than_numbers_and_runs(library):
    key = torch.randn(1, 1, 9, 8).expand(2, 2, 9, 8)
    out = fastattn.attention(torch.randn(2, 2, 9, 8), key, key, backend="reference")
    assert out.isfinite().all() and cpu.LOOKS_AT_STORAGE
    assert fastattn.attention(torch.randn(2, 2, 9, 8), key, key, backend="cpu").isfinite().all()


def test_an_empty_tensor_needs_no_memory(library):
    empty = taken(torch.empty(1, 2, 0, 8))
    for backend in BACKENDS:
        assert fastattn.attention(torch.randn(1, 2, 3, 8), empty, empty, backend=backend).eq(0).all()
