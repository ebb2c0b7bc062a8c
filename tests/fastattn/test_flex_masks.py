"""torch's CausalBias and FlexAttention's BlockMask as masks: what they say, without a table where there is a rule."""

import subprocess
import sys

import pytest
import torch
from torch.nn.attention.bias import causal_lower_right, causal_upper_left
from torch.nn.attention.flex_attention import BlockMask, and_masks, create_block_mask, create_mask, flex_attention

from fastattn import attention, explain
from fastattn.masks import Causal, Dense, Segments, Window, flex

SHARED = torch.arange(200) // 33 % 4
IDS = torch.tensor([[0] * 70 + [1] * 60 + [2] * 70])


def causal(b, h, q, kv):
    return q >= kv


def near(b, h, q, kv):
    return (kv >= q - 20) & (kv <= q + 20)


def same_document(b, h, q, kv):
    return IDS[b, q] == IDS[b, kv]


def different_documents(b, h, q, kv):
    return (SHARED + 0)[q] == (SHARED * 2)[kv]


def equal_ids(b, h, q, kv):
    return SHARED[q] == SHARED[kv]


def by_head(b, h, q, kv):
    return (q >= kv) & ((q - kv) <= 10 * (h + 1))


def any_rule(b, h, q, kv):
    return (q * 7 + kv * 3) % 5 > 1


# name: mask_mod, heads it tells apart, whether it is read as a rule
RULES = {
    "causal": (causal, None, True),
    "window": (and_masks(causal, near), None, True),
    "documents": (same_document, None, True),
    "documents of all items": (equal_ids, None, True),
    "ids from two tables": (different_documents, None, False),
    "causal documents": (and_masks(causal, same_document), None, True),
    "by head": (by_head, 4, False),
    "arithmetic": (any_rule, None, False),
}


def tensors(q_len=200, kv_len=200):
    return [torch.randn(1, heads, n, 16, requires_grad=True) for heads, n in ((4, q_len), (2, kv_len), (2, kv_len))]


def results(out, given):
    return out, *torch.autograd.grad(out.square().sum(), given)


def same(one, other):
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("lengths", [(200, 200), (64, 200), (1, 128)], ids=str)
@pytest.mark.parametrize("name", RULES)
def test_a_block_mask(name, lengths):
    rule, heads, _ = RULES[name]
    given = tensors(*lengths)
    mask = create_block_mask(rule, None, heads, *lengths, device="cpu")
    table = create_mask(rule, 1, heads or 1, *lengths, device="cpu")
    have = results(attention(*given, mask=mask), given)
    same(have, results(attention(*given, mask=table), given))
    with torch.no_grad():
        same(have[:1], [flex_attention(*(each.detach() for each in given), block_mask=mask, enable_gqa=True)])


@pytest.mark.parametrize("name", RULES)
def test_what_has_a_rule_is_no_table(name):
    rule, heads, readable = RULES[name]
    mask = create_block_mask(rule, None, heads, 200, 200, device="cpu")
    found = flex.as_mask(mask, *tensors()[:2])
    assert any(isinstance(atom, Dense) for atom in found.atoms()) == (not readable)
    assert torch.equal(
        found.dense(200, 200).expand(1, heads or 1, -1, -1), create_mask(rule, 1, heads or 1, 200, 200, device="cpu")
    )
    assert flex.as_mask(mask, *tensors()[:2]) is found


def blocks(**more):
    """Two tiles a side: the first sees itself in part, the second both, the first of them wholly."""
    partly = {"kv_num_blocks": torch.tensor([[[1, 1]]], dtype=torch.int32)}
    partly["kv_indices"] = torch.tensor([[[[0, 1], [1, 0]]]], dtype=torch.int32)
    fully = {"full_kv_num_blocks": torch.tensor([[[0, 1]]], dtype=torch.int32)}
    fully["full_kv_indices"] = torch.tensor([[[[0, 1], [0, 1]]]], dtype=torch.int32)
    return BlockMask.from_kv_blocks(**partly, **fully, BLOCK_SIZE=16, seq_lengths=(24, 24), **more)


def test_blocks_count_beside_the_rule():
    """A mask_mod says nothing about a tile that is listed as full, and nothing is seen in one that is not listed."""
    given = tensors(24, 24)
    row, column = torch.arange(24)[:, None], torch.arange(24)[None]
    tiles = torch.tensor([[1, 0], [1, 1]]).bool().repeat_interleave(16, 0).repeat_interleave(16, 1)[:24, :24]
    whole = (row >= 16) & (column < 16)
    for rule, want in (
        (None, tiles),
        (causal, tiles & (whole | (row >= column))),
        (near, tiles & (whole | ((row - column).abs() <= 20))),
        (lambda b, h, q, kv: q < kv, tiles & (whole | (row < column))),
    ):
        mask = blocks(mask_mod=rule)
        found = flex.as_mask(mask, *given[:2])
        assert torch.equal(found.dense(24, 24).expand(1, 1, 24, 24)[0, 0], want)
        same([attention(*given, mask=mask)], [attention(*given, mask=want)])
    assert isinstance(flex.as_mask(blocks(mask_mod=causal), *given[:2]), Causal)  # here the two agree


def test_block_masks_are_read_as_what_they_say():
    query, key, _ = tensors()

    def read(*rules):
        return flex.as_mask(create_block_mask(and_masks(*rules), None, None, 200, 200, device="cpu"), query, key)

    assert {type(atom) for atom in read(causal, near).atoms()} <= {Causal, Window}
    assert Segments in {type(atom) for atom in read(same_document).atoms()}
    assert "mask" not in str(
        explain(query, key, key, mask=create_block_mask(causal, None, None, 200, 200, device="cpu"))
    )


def test_a_block_mask_compiles_in_one_graph():
    given, mask = tensors(), create_block_mask(causal, None, None, 200, 200, device="cpu")
    torch._dynamo.reset()
    compiled = torch.compile(lambda *qkv: attention(*qkv, mask=mask), fullgraph=True, backend="aot_eager")
    same([compiled(*given)], [attention(*given, mask=Causal())])


@pytest.mark.parametrize("lengths", [(5, 5), (3, 7), (7, 3)], ids=str)
@pytest.mark.parametrize("make", [causal_upper_left, causal_lower_right])
@pytest.mark.filterwarnings("ignore:Lower right causal bias will produce NaNs")
def test_a_causal_bias(make, lengths):
    given = tensors(*lengths)
    align = "top-left" if make is causal_upper_left else "bottom-right"
    want = attention(*given, mask=Causal(align=align))
    assert torch.equal(attention(*given, mask=make(*lengths)), want)
    assert isinstance(flex.as_mask(make(*lengths), *given[:2]), Causal)


def documents(ids):
    """A mask_mod that refers to the tensor through another function, as those that libraries make do."""

    def same(b, h, q, kv):
        return ids[q] == ids[kv]

    return and_masks(same, causal)


@pytest.mark.parametrize("inference", [False, True])
def test_what_a_block_mask_refers_to_may_change(inference):
    """It is read again when a tensor was written to or its function replaced, and only then."""
    given = [each.detach() for each in tensors()]
    with torch.inference_mode(inference):
        ids = torch.zeros(200, dtype=torch.int64)
        mask = create_block_mask(documents(ids), None, None, 200, 200, device="cpu")

        def both():
            return attention(*given, mask=mask), flex_attention(*given, block_mask=mask, enable_gqa=True)

        same(*([each] for each in both()))
        read = flex.as_mask(mask, *given[:2])
        assert flex.as_mask(mask, *given[:2]) is read
        ids[90:] = 1
        same(*([each] for each in both()))
        mask.mask_mod = and_masks(causal, near)
        same(*([each] for each in both()))
        assert flex.as_mask(mask, *given[:2]) is not read


class Model(torch.nn.Module):
    """Whose mask_mod names `self`, behind which everything lies."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(16, 16)
        self.wide, self.data, self.ids = 30, [{"items": [n]} for n in range(100_000)], SHARED.clone()
        chain = self.chain = []
        for _ in range(5000):
            chain.append([])
            chain = chain[0]
        self.mask = create_block_mask(
            lambda b, h, q, kv: (q - kv <= self.wide) & (q >= kv) & (self.ids[q] == self.ids[kv]),
            None, None, 200, 200, device="cpu",
        )  # fmt: skip


def test_a_rule_that_is_not_what_the_function_says_is_not_taken(monkeypatch):
    """Whatever reads it wrongly."""
    mask = create_block_mask(causal, None, None, 200, 200, device="cpu")
    monkeypatch.setattr("fastattn.masks.mask_mod.read", lambda *_: Causal() & Window(150, 0))
    assert isinstance(flex.as_mask(mask, *tensors()[:2]), Dense)


@pytest.mark.parametrize("inference", [False, True])
def test_only_the_tensors_that_were_read_are_watched(inference):
    with torch.inference_mode(inference):
        model, given = Model(), [each.detach() for each in tensors()]
        read = flex.as_mask(model.mask, *given[:2])
        [watched] = flex._READ[model.mask].tensors
        assert watched is model.ids
        model.linear.weight.data.add_(1)
        model.linear.weight = torch.nn.Parameter(model.linear.weight * 2)
        assert flex.as_mask(model.mask, *given[:2]) is read


def test_other_lengths_and_other_things_are_refused():
    given = tensors(24, 24)
    with pytest.raises(ValueError, match="the BlockMask was made for 200 queries and 200 keys, got 24 and 24"):
        attention(*given, mask=create_block_mask(causal, None, None, 200, 200, device="cpu"))
    with pytest.raises(ValueError, match="the causal bias was made for 5 queries and 7 keys, got 24 and 24"):
        attention(*given, mask=causal_lower_right(5, 7))
    with pytest.raises(TypeError, match="or torch's CausalBias or BlockMask is needed, got function"):
        attention(*given, mask=causal)


def test_nobody_pays_for_them_who_has_none(tmp_path):
    code = (
        "import sys, torch, fastattn; q = torch.randn(1, 1, 4, 8); fastattn.attention(q, q, q, backend='reference'); "
        "assert not {'torch._dynamo', 'torch.nn.attention.flex_attention'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


DOCS = torch.tensor([5, 5, 5, 2, 2, 0, 0, 0, 0, -1, -1, 3])
BY_ITEM = torch.stack([DOCS, DOCS.flip(0)])
RANK, PLACES = torch.tensor([7, 2, 9, 0, 4, 11, 1, 3, 8, 10, 5, 6]), torch.tensor([0, 1, 2, 0, 1, 0, 1, 2, 3, 0, 1, 0])
SHIFTS, OTHERS = torch.tensor([1, 3]), torch.tensor([2, 3])
WEIGHTS = torch.tensor([0.5, 0.25, 0.5, 0.0]).repeat(3)


@pytest.mark.parametrize(
    "mask_mod",
    [
        pytest.param(lambda b, h, q, kv: DOCS[q] == DOCS[kv] + 2, id="ids moved apart"),
        pytest.param(lambda b, h, q, kv: BY_ITEM[b, q] == BY_ITEM[b, kv] - 2, id="ids of items moved apart"),
        pytest.param(lambda b, h, q, kv: DOCS[q] + 1 == DOCS[kv] + 1, id="ids moved alike"),
        pytest.param(lambda b, h, q, kv: (DOCS[q] - 3 >= 0) & (DOCS[q] == DOCS[kv]), id="a sign of moved ids"),
        pytest.param(lambda b, h, q, kv: (DOCS[q] == DOCS[kv]) & (RANK[q] >= RANK[kv]), id="ranks"),
        pytest.param(lambda b, h, q, kv: (DOCS[q] == DOCS[kv]) & (PLACES[q] >= PLACES[kv]), id="places, ids unsorted"),
        pytest.param(lambda b, h, q, kv: (DOCS[q] == DOCS[kv]) & (DOCS[q] >= DOCS[kv]), id="ids in order"),
        pytest.param(lambda b, h, q, kv: (DOCS[q] == DOCS[kv]) & (2 * PLACES)[q].le(3), id="tensor methods"),
        pytest.param(lambda b, h, q, kv: (q + SHIFTS[b]) // 4 == (kv + SHIFTS[b]) // 4, id="groups moved alike"),
        pytest.param(lambda b, h, q, kv: (q + SHIFTS[b]) // 4 == (kv + OTHERS[b]) // 4, id="groups moved apart"),
        pytest.param(lambda b, h, q, kv: (q - SHIFTS[b]) // 4 == (kv + SHIFTS[b]) // 4, id="groups moved either way"),
        pytest.param(lambda b, h, q, kv: q // 2.5 == kv // 2.5, id="groups of a broken size"),
        pytest.param(lambda b, h, q, kv: WEIGHTS[q] == WEIGHTS[kv], id="equal floats"),
    ],
)
@pytest.mark.parametrize("block", [4, 128])
def test_what_a_table_says_is_never_taken_for_more(mask_mod, block):
    query, key, value = torch.randn(3, 2, 2, 12, 16)
    mask = create_block_mask(mask_mod, 2, 2, 12, 12, device="cpu", BLOCK_SIZE=block)
    want = attention(query, key, value, mask=create_mask(mask_mod, 2, 2, 12, 12, device="cpu"))
    torch.testing.assert_close(attention(query, key, value, mask=mask), want)
