"""transformers' mask functions and padding, read as masks."""

import importlib.util
import itertools

import pytest
import torch
import torch._dynamo.testing

if importlib.util.find_spec("transformers") is None:
    pytest.skip("needs transformers (pip install 'fastattn[models]')", allow_module_level=True)

import transformers
from transformers import masking_utils as given

from fastattn import masks
from fastattn.integrations import transformers as ours
from fastattn.integrations.transformers.model_mask import ModelMask, padding
from fastattn.masks.mask_mod import Call, Unreadable, read

BATCH, LENGTH = 2, 11
POSITIONS = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5], [0, 1, 2, 0, 1, 2, 3, 4, 5, 6, 7]])
BLOCKS = torch.tensor([[-1, 0, 0, -1, 1, 1, 1, -1, -1, 2, 2], [-1, -1, 0, 0, 0, 0, -1, -1, 1, -1, -1]])
LEFT = torch.tensor([3, 0])
NOTHING_LEFT = torch.zeros(2, dtype=torch.long)


def packed(function):
    return given.packed_sequence_compatibility_function(
        function, POSITIONS, given.find_packed_sequence_indices(POSITIONS)
    )


FUNCTIONS = {
    "causal": given.causal_mask_function,
    "full": given.bidirectional_mask_function,
    "window": given.sliding_window_causal_mask_function(4),
    "window-1": given.sliding_window_causal_mask_function(1),
    "window-both-sides": given.sliding_window_bidirectional_mask_function(2),
    "difference": lambda b, h, q, k: (q - k <= 3) & (k - q < 1),
    "difference-from-below": lambda b, h, q, k: (k - q >= -2) & (q - k > -4),
    "distance": lambda b, h, q, k: (q - k).abs() < 3,
    "chunks": given.chunked_causal_mask_function(3, NOTHING_LEFT),
    "chunks-from-the-first-real": given.chunked_causal_mask_function(3, LEFT),
    "packed": packed(given.causal_mask_function),
    "packed-window": packed(given.sliding_window_causal_mask_function(2)),
    "packed-chunks": packed(given.chunked_causal_mask_function(3, NOTHING_LEFT)),
    "blocks": given.or_masks(given.causal_mask_function, given.blockwise_overlay(BLOCKS)),
    "blocks-window": given.or_masks(given.sliding_window_causal_mask_function(3), given.blockwise_overlay(BLOCKS)),
}
PADDINGS = {
    "no-mask": None,
    "real": torch.ones(BATCH, LENGTH, dtype=torch.bool),
    "left": torch.tensor([[0] * 3 + [1] * 8, [1] * 11]).bool(),
    "right": torch.tensor([[1] * 7 + [0] * 4, [1] * 11]).bool(),
    "holes": torch.tensor([[1, 0] * 5 + [1], [1] * 11]).bool(),
    "one-empty": torch.tensor([[0] * 11, [1] * 11]).bool(),
    "short": torch.ones(BATCH, 4, dtype=torch.bool),
}
PLACES = {  # q_len, kv_len, q_offset, kv_offset
    "prefill": (LENGTH, LENGTH, 0, 0),
    "middle": (4, LENGTH, 7, 0),
    "sliding-cache": (1, 5, 10, 6),
    "static-cache": (3, 9, torch.tensor(2), 0),
    "empty-static-cache": (4, 9, 0, 0),
}


def made(function, real, place, **rest):
    q_len, kv_len, q_offset, kv_offset = place
    call = dict(
        batch_size=BATCH, q_length=q_len, kv_length=kv_len, q_offset=q_offset, kv_offset=kv_offset,
        mask_function=function, attention_mask=real, **rest,
    )  # fmt: skip
    table = given.sdpa_mask(**{"allow_is_causal_skip": False, **call})
    return ours.attention_mask(**call), table


READ = [
    (name, real, place)
    for name, real, place in itertools.product(FUNCTIONS, PADDINGS, PLACES)
    if place == "prefill" or not name.startswith("packed")  # transformers packs whole sequences alone
]


@pytest.mark.parametrize("name, real, place", READ, ids=map("-".join, READ))
def test_a_mask_function_becomes_the_mask_it_says(name, real, place):
    mask, table = made(FUNCTIONS[name], PADDINGS[real], PLACES[place])
    assert isinstance(mask, ModelMask) and mask.shape == table.shape
    assert torch.equal(mask.table(), table)
    assert not any(isinstance(atom, masks.Dense) for atom in mask.mask.atoms())


def test_nothing_hidden_is_no_mask():
    place = PLACES["prefill"]
    for real in ("no-mask", "real"):
        assert made(FUNCTIONS["full"], PADDINGS[real], place, allow_is_bidirectional_skip=True)[0] is None
    assert made(FUNCTIONS["full"], PADDINGS["left"], place, allow_is_bidirectional_skip=True)[0] is not None


STRANGE = {
    "equal": lambda b, h, q, k: q != k,
    "parity": lambda b, h, q, k: (q + k) % 2 == 0,
    "heads": lambda b, h, q, k: (k <= q) & (h >= 0),
    "table": lambda b, h, q, k: torch.ones(LENGTH, LENGTH).tril().bool()[q, k],
    "order-of-ids": lambda b, h, q, k: POSITIONS[b, k] <= POSITIONS[b, q],
}


@pytest.mark.parametrize("real", ["no-mask", "left"])
@pytest.mark.parametrize("name", STRANGE)
def test_a_function_without_a_rule_becomes_its_table(name, real):
    mask, table = made(STRANGE[name], PADDINGS[real], PLACES["prefill"])
    assert isinstance(mask.mask, masks.Dense) and torch.equal(mask.table(), table)


@pytest.mark.parametrize("which", ["or", "and", "both"])
def test_functions_that_a_model_adds_to_its_mask(which):
    """As Gemma 3 adds the tokens of an image: transformers asks with arguments of its own."""

    def square(batch_idx, head_idx, q_idx, kv_idx):
        return (q_idx < 3) & (kv_idx < 3) & (q_idx != kv_idx * kv_idx + 7)

    extra = {f"{name}_mask_function": square for name in (("or", "and") if which == "both" else (which,))}
    config = transformers.LlamaConfig(hidden_size=16, num_attention_heads=2)
    tables = {}
    for name in ("sdpa", "fastattn"):
        config._attn_implementation = name
        real = torch.tensor([[0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
        tables[name] = given.create_causal_mask(
            config=config, inputs_embeds=torch.zeros(2, 6, 16), attention_mask=real, past_key_values=None, **extra
        )
    want = tables["sdpa"]
    got = tables["fastattn"].mask.dense(6, 6).expand(want.shape)
    assert torch.equal(got[:, :, 1:], want[:, :, 1:]) and want.any() and not want.all()


ORDER, PART = torch.tensor([[4, 0, 3, 1, 2, 9, 7, 8, 6, 5, 10]] * BATCH), torch.tensor([[0] * 4 + [1] * 7] * BATCH)
SQUARES = torch.arange(LENGTH) ** 2
OWN = {  # a function of somebody's own: whether its rule is read
    "compares": (lambda b, h, q, k: (k <= q) & (q - k < 5), True),
    "images-in-a-window": (
        given.and_masks(
            given.or_masks(given.causal_mask_function, given.blockwise_overlay(BLOCKS)), given.sliding_window_overlay(4)
        ),
        True,
    ),
    "computes": (lambda b, h, q, k: (k <= q) & ((q - k) % 3 == 0), False),
    "looks up": (lambda b, h, q, k: SQUARES[k] <= q, False),
    "is-equal": (lambda b, h, q, k: (k <= q) & (q == k), False),
    "is-not-equal": (lambda b, h, q, k: (k <= q) & (q != k + 1), False),
    "a-head": (lambda b, h, q, k: (h >= 1) | (k <= q), False),
    "torchs": (lambda b, h, q, k: torch.logical_or(k <= q, k < 3), False),
    "all": (lambda b, h, q, k: torch.tensor(True), False),
    "orders-a-table": (lambda b, h, q, k: (ORDER[b, q] >= ORDER[b, k]) & (PART[b, q] == PART[b, k]), False),
    "not": (lambda b, h, q, k: ~(k <= q), False),
}


@pytest.mark.parametrize("name", OWN)
def test_somebodys_own_function_is_read_or_drawn(name):
    function, is_read = OWN[name]
    mask, table = made(function, PADDINGS["right"], PLACES["prefill"], use_vmap=True)
    assert isinstance(mask.mask, masks.Dense) != is_read
    assert torch.equal(mask.table().expand(table.shape), table)


@pytest.mark.parametrize("decide", [
    lambda q, k: (q >= k) and (q - k < 5),
    lambda q, k: (q >= k) or (k < 3),
    lambda q, k: k <= q if q else k >= q,
    lambda q, k: not (k > q),
    lambda q, k: q // 3 == k // 3 if q // 3 else k <= q,
])  # fmt: skip
def test_what_decides_by_a_symbol_is_not_read(decide):
    """Python would take any object for true."""
    with pytest.raises(Unreadable, match="a decision by a"):
        read(lambda b, h, q, k: decide(q, k), Call(LENGTH, LENGTH, 0, 0, torch.device("cpu")))


def test_padding_says_lengths_where_it_can():
    assert padding(PADDINGS["real"], 3) is None
    assert isinstance(padding(PADDINGS["left"], 3), masks.Lengths)
    assert isinstance(padding(PADDINGS["holes"], 3), masks.Segments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_code_that_computes_with_its_mask_gets_eagers(dtype):
    mask, _ = made(FUNCTIONS["causal"], PADDINGS["left"], PLACES["prefill"], dtype=dtype)
    call = {"mask_function": FUNCTIONS["causal"], "attention_mask": PADDINGS["left"], "dtype": dtype}
    table = given.eager_mask(BATCH, LENGTH, LENGTH, **call)
    assert mask.dim() == mask.ndim == 4 and mask.dtype == dtype and mask.size(2) == LENGTH
    assert mask[:, :, :, :LENGTH] is mask and mask.contiguous() is mask and mask.to("cpu") is mask
    scores = torch.randn(BATCH, 3, LENGTH, LENGTH, generator=torch.Generator().manual_seed(0)).to(dtype)
    same = {
        "row": (mask[:, :, -1], table[:, :, -1]),
        "first": (mask[0], table[0]),
        "added": (scores + mask, scores + table),
        "added to": (mask + scores, table + scores),
        "less": (mask < 0, table < 0),
        "equal": (mask == 0, table == 0),
        "twice": (mask * 2, table * 2),
        "bool": (mask.bool(), table.bool()),
        "cast": (mask.to(torch.float64), table.to(torch.float64)),
        "method": (mask.expand(2, 3, -1, -1), table.expand(2, 3, -1, -1)),
        "where": (torch.where(mask == 0, 1.0, 0.0), torch.where(table == 0, 1.0, 0.0)),
        "cat": (torch.cat([mask, mask], -1), torch.cat([table, table], -1)),
        "fill": (scores.masked_fill(mask != 0, 1.0), scores.masked_fill(table != 0, 1.0)),
    }
    for name, (got, want) in same.items():
        assert got.dtype == want.dtype and torch.equal(got, want), name
    for index in (
        (..., slice(5)),
        (slice(None), slice(None), slice(2, 7)),
        (slice(1), slice(None), slice(3), slice(4)),
    ):
        part = mask[index]
        assert isinstance(part, ModelMask) and part.shape == table[index].shape
        assert torch.equal(part.tensor(), table[index])
    with pytest.raises(TypeError):
        mask.__invert__()  # floats have none
