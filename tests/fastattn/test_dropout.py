"""Dropout's bits: the generator's published answers, the frequency, and the definition written another way."""

import pytest
import torch

from fastattn import dropout_mask
from fastattn.dropout import new_dropout_seed, philox, threshold


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        pytest.param((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8), id="zeros"),
        pytest.param((2**32 - 1,) * 4, (2**32 - 1,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD), id="ones"),
        pytest.param(
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
            id="pi",
        ),
    ],
)
def test_philox_gives_the_published_answers(counter, key, words):
    """Known answers of Random123's philox4x32-10."""
    seed = key[0] | key[1] << 32
    seed = torch.tensor([seed - 2**64 if seed >= 2**63 else seed])
    got = philox(seed, tuple(torch.tensor([word]) for word in counter))
    assert tuple(word.item() for word in got) == words


def test_each_element_follows_the_contract():
    p, seed = 0.37, torch.tensor([-123456789])
    table = dropout_mask(2, 3, 4, 10, p=p, seed=seed)
    for b, h, i, j in ((0, 0, 0, 0), (1, 2, 3, 9), (0, 1, 2, 5), (1, 0, 3, 7)):
        words = philox(seed, tuple(torch.tensor([n]) for n in (j // 4, i, h, b)))
        assert table[b, h, i, j].item() == (words[j % 4].item() >= int(p * 2**32))


def test_frequency_and_ends():
    seed = torch.tensor([1])
    kept = dropout_mask(4, 4, 64, 64, p=0.25, seed=seed).double().mean().item()
    assert abs(kept - 0.75) < 0.01
    assert dropout_mask(1, 1, 8, 9, p=0.0, seed=seed).all()
    assert not dropout_mask(1, 1, 8, 9, p=1.0, seed=seed).any()
    assert threshold(1.0) == 2**32
    assert dropout_mask(0, 1, 3, 0, p=0.5, seed=seed).shape == (0, 1, 3, 0)


def test_seeds_come_from_torchs_generator():
    torch.manual_seed(3)
    first = new_dropout_seed("cpu")
    torch.manual_seed(3)
    assert torch.equal(first, new_dropout_seed("cpu"))
    assert first.dtype == torch.int64
    assert first.shape == (1,)


@pytest.mark.parametrize("p", [-0.1, 1.1, float("nan")])
def test_probabilities_outside_0_to_1_are_refused(p):
    with pytest.raises(ValueError, match="dropout_p: a probability from 0 to 1"):
        dropout_mask(1, 1, 1, 1, p=p, seed=torch.tensor([0]))


@pytest.mark.parametrize(
    "seed", [3, torch.tensor(3), torch.tensor([1, 2]), torch.tensor([1], dtype=torch.int32)], ids=repr
)
def test_seeds_of_another_kind_are_refused(seed):
    with pytest.raises(ValueError, match="dropout_seed: an int64 tensor of shape"):
        dropout_mask(1, 1, 1, 1, p=0.5, seed=seed)


@pytest.mark.parametrize("sizes", [(1, -1, 2, 2), (1, 1.5, 2, 2), (1, 1, 2, "2")], ids=str)
def test_sizes_that_are_none(sizes):
    with pytest.raises(ValueError, match=r"(num_heads|kv_len): an int of at least 0 is needed, got"):
        dropout_mask(*sizes, p=0.5, seed=torch.tensor([1]))
