"""Weights beyond a size are refused before they are computed, with the bytes and what else there is to ask for."""

import pytest
import torch

import fastattn
from fastattn import attention_weights, functional

QUERY, KEY = torch.randn(2, 4, 30, 8), torch.randn(2, 4, 50, 8)
ALL = 2 * 4 * 30 * 50 * 4


@pytest.fixture
def most(monkeypatch):
    return lambda number: monkeypatch.setattr(functional, "MOST_WEIGHTS", number)


def test_up_to_the_limit(most):
    most(ALL)
    assert attention_weights(QUERY, KEY).shape == (2, 4, 30, 50)


CASES = {
    "all": ({}, ALL - 1, f"30 queries by 50 keys would take {ALL:,} bytes, and {ALL - 1:,} bytes are allowed"),
    "mean-would-do": ({}, ALL - 1, f"heads='mean' takes {ALL // 4:,} bytes; rows=\\[...\\] of up to 29 queries fit"),
    "mean": ({"heads": "mean"}, ALL // 4 - 1, f"would take {ALL // 4:,} bytes, and .* allowed; rows=\\[...\\]"),
    "rows": ({"rows": [0, 5]}, 3000, "2 queries by 50 keys would take 3,200 bytes.*up to 1 queries fit"),
    "nothing-fits": ({"rows": [0]}, 100, "fewer keys or sequences at a time fit"),
    "allowed-by": ({}, 7, f"fastattn.functional.MOST_WEIGHTS = {ALL} allows it"),
}


@pytest.mark.parametrize("name", CASES)
def test_beyond_it(name, most):
    arguments, limit, words = CASES[name]
    most(limit)
    with pytest.raises(ValueError, match=words):
        attention_weights(QUERY, KEY, **arguments)


def test_nothing_is_computed_and_gib_are_said():
    query = torch.zeros(1, 1, 1, 8).expand(1, 32, 2**16, 8)
    with pytest.raises(ValueError, match=r"would take 549,755,813,888 bytes \(512.0 GiB\).*\(4.0 GiB\) are allowed"):
        attention_weights(query, query)


def test_a_module_allocates_as_torchs_does(most):
    most(7)
    torch.manual_seed(0)
    module = fastattn.nn.MultiheadAttention(8, 2, batch_first=True)
    x = torch.randn(2, 9, 8)
    assert module(x, x, x)[1].shape == (2, 9, 9)


def test_output_attentions_of_a_model(most):
    transformers = pytest.importorskip("transformers", reason="needs transformers (pip install 'fastattn[models]')")
    import fastattn.integrations.transformers  # noqa: F401

    config = transformers.BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64
    )
    model = transformers.BertModel(config, add_pooling_layer=False)
    model.set_attn_implementation("fastattn")
    ids = torch.randint(0, 64, (2, 10))
    most(3199)
    with pytest.raises(ValueError, match=r"output_attentions=True would take 3,200 bytes in this layer.*rows=.*heads="):
        model(ids, output_attentions=True)
    assert model(ids).last_hidden_state.shape == (2, 10, 32)
