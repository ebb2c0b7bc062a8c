"""Every call that takes keys and values in blocks checks them alike: none repeats, clamps or rounds in silence."""

import inspect

import pytest
import torch

from fastattn import KVCache, attention
from fastattn.integrations.flash_attn import flash_attn_varlen_func, flash_attn_with_kvcache
from fastattn.integrations.torch import registry
from fastattn.masks import Causal

BATCH, BLOCKS, SIZE, WIDTH = 2, 6, 4, 2


def ints(values, dtype=torch.int32):
    return torch.tensor(values, dtype=dtype)


def good():
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(BATCH, 1, 2, 8, generator=generator)
    pools = [torch.randn(BLOCKS, SIZE, 2, 8, generator=generator) for _ in "kv"]
    return {
        "query": query,
        "keys": pools[0],
        "values": pools[1],
        "table": ints([[4, 1], [0, -7]]),
        "used": ints([7, 4]),
    }


def ends(counts):
    return torch.nn.functional.pad(counts.cumsum(0), (1, 0)).int()


def varlen(query, keys, values, table, used):
    return flash_attn_varlen_func(
        query[:, 0], keys, values, ints([0, 1, 2]), ends(used), 1, 8, causal=True, block_table=table
    ).unsqueeze(1)


def with_kvcache(query, keys, values, table, used):
    return flash_attn_with_kvcache(query, keys, values, cache_seqlens=used, causal=True, block_table=table)


def in_registry(query, keys, values, table, used):
    given = (query[:, 0], keys, values, ints([0, 1, 2]), None, 1, 8, 0.0, True, False)
    return registry._packed(*given, seqused_k=used, block_table=table)[0].unsqueeze(1)


def from_blocks(query, keys, values, table, used):
    cache = KVCache.from_blocks(keys, values, table, used)
    return attention(query.transpose(1, 2), cache.key, cache.value, mask=Causal()).transpose(1, 2)


def from_blocks_changed_since(query, keys, values, table, used):
    """Whose owner writes into the table and the lengths after the cache was made."""
    start = good()
    cache = KVCache.from_blocks(keys, values, start["table"], start["used"])
    cache.table.copy_(table)
    cache.lengths.copy_(used)
    return attention(query.transpose(1, 2), cache.key, cache.value, mask=Causal()).transpose(1, 2)


ENTRANCES = {
    "flash_attn_varlen_func": varlen,
    "flash_attn_with_kvcache": with_kvcache,
    "torch's varlen_attn": in_registry,
    "KVCache.from_blocks": from_blocks,
    "KVCache.from_blocks, changed since": from_blocks_changed_since,
}
# name: what differs from a good call, the sentence, whether it is about numbers in tensors
FAULTS = {
    "longer than its row": ({"used": ints([9, 4])}, r"lengths? from 0 to 8|0 to 8, tokens .* got \[9, 4\]", True),
    "longer by far": ({"used": ints([7, 5000])}, r"lengths? from 0 to 8|0 to 8, tokens .* got \[7, 5000\]", True),
    "beyond the pool": ({"table": ints([[4, 6], [0, 0]])}, r"blocks from 0 to 5 are there, got \[6\]", True),
    "below the pool": ({"table": ints([[-1, 1], [0, 0]])}, r"blocks from 0 to 5 are there, got \[-1\]", True),
    "of floats": ({"table": torch.tensor([[4.0, 1.5], [0.0, 0.0]])}, r"int32 .* got torch.float32", False),
    "of bools": ({"table": torch.ones(2, 2, dtype=torch.bool)}, r"int32 .* got torch.bool", False),
    "of int64": ({"table": ints([[4, 1], [0, 0]], torch.int64)}, r"int32 .* got torch.int64", False),
    "flat": ({"table": ints([4, 1])}, r"int32 .* is needed, got torch.int32, shape \[2\]", False),
    "in a list": ({"table": [[4, 1], [0, 0]]}, r"int32 .* is needed, got list", False),
    "of one row": ({"table": ints([[4, 1]])}, r"\[2\b|\[1\]", False),
    "other blocks of values": ({"values": torch.randn(5, SIZE, 2, 8)}, "the same (blocks|rows)", False),
    "another block_size of values": ({"values": torch.randn(BLOCKS, 3, 2, 8)}, "the same (blocks|rows)", False),
    "other heads of values": ({"values": torch.randn(BLOCKS, SIZE, 1, 8)}, "the same (blocks|rows)", False),
    "a flat pool": ({"keys": torch.randn(BLOCKS, SIZE, 8)}, r"(is|are) needed, got shape \[6, 4, 8\]", False),
    "no block": (
        {"keys": torch.randn(0, SIZE, 2, 8), "values": torch.randn(0, SIZE, 2, 8)}, "at least one block of", False,
    ),
    "lengths of floats": ({"used": torch.tensor([7.5, 4.0])}, "got torch.float32", False),
}  # fmt: skip


def wanted():
    """By the definition, item by item."""
    given = good()
    outs = []
    for item, count in enumerate((7, 4)):
        tokens = [(int(given["table"][item, place // SIZE]), place % SIZE) for place in range(count)]
        key, value = (torch.stack([pool[at] for at in tokens]).double() for pool in (given["keys"], given["values"]))
        scores = torch.einsum("hd,nhd->hn", given["query"][item, 0].double(), key) / 8**0.5
        outs.append(torch.einsum("hn,nhd->hd", scores.softmax(-1), value))
    return torch.stack(outs)[:, None].float()


@pytest.mark.parametrize("name", ENTRANCES)
def test_good_blocks_are_taken(name):
    """Also with an entry that holds nothing and names no block."""
    with torch.no_grad():
        torch.testing.assert_close(ENTRANCES[name](**good()), wanted())


CALLS = [
    (name, fault)
    for name in ENTRANCES
    for fault, (_, _, numbers) in FAULTS.items()
    if (numbers or "changed since" not in name)  # copying into a tensor does not change what kind of tensor it is
    and (name, fault) != ("flash_attn_varlen_func", "lengths of floats")  # its lengths are where sequences begin
]


@pytest.mark.parametrize(("name", "fault"), CALLS)
def test_bad_blocks_are_refused_alike(name, fault):
    changed, sentence, _ = FAULTS[fault]
    with pytest.raises((TypeError, ValueError), match=sentence):
        ENTRANCES[name](**{**good(), **changed})


@pytest.mark.parametrize("name", ENTRANCES)
def test_a_gpus_numbers_are_not_looked_at(name, monkeypatch):
    """What is not a CPU's would be waited for: there the kernels clamp, and nothing is read out of bounds."""
    from fastattn.masks import paged

    monkeypatch.setattr(paged, "may_look", lambda *_: False)
    monkeypatch.setattr("fastattn.integrations.flash_attn.cache.Cache._looked_at", False)
    for fault in ("beyond the pool", "below the pool"):
        with torch.no_grad():
            assert ENTRANCES[name](**{**good(), **FAULTS[fault][0]}).isfinite().all()


def test_these_are_all_the_entrances():
    """A new function with a table of blocks belongs in ENTRANCES."""
    from fastattn.integrations import flash_attn

    found = [
        name
        for module in (flash_attn, registry)
        for name, function in inspect.getmembers(module, inspect.isfunction)
        if function.__module__.startswith(module.__name__) and "block_table" in inspect.signature(function).parameters
    ]
    assert found == ["flash_attn_varlen_func", "flash_attn_with_kvcache", "_packed"]


@pytest.mark.parametrize("cu", [[0, 3, 2], [1, 2, 4], [0, 2, 50]], ids=str)
def test_torchs_varlen_attn_checks_where_sequences_begin(cu):
    x = torch.randn(4, 2, 8)
    with pytest.raises(ValueError, match="Packed: cu_q"):
        registry._packed(x, x, x, ints(cu), ints(cu), 2, 2, 0.0, False, False)
