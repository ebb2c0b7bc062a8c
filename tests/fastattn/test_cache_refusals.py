"""What a KVCache refuses, in sentences; where attention refuses one; how its views look."""

import pytest
import torch
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.nn.attention.flex_attention import create_block_mask

from fastattn import KVCache, attention
from fastattn.cache import CacheView
from fastattn.masks import Chunked, Packed

BATCH, HEADS, DIM, DIM_V = 2, 2, 16, 24
KINDS = {
    "static": lambda **more: KVCache.static(BATCH, HEADS, 40, DIM, head_dim_v=DIM_V, **more),
    "growing": lambda **more: KVCache.growing(BATCH, HEADS, DIM, head_dim_v=DIM_V, **more),
    "sliding": lambda **more: KVCache.sliding(BATCH, HEADS, 4, DIM, head_dim_v=DIM_V, **more),
    "paged-3": lambda **more: KVCache.paged(BATCH, HEADS, DIM, blocks=30, block_size=3, head_dim_v=DIM_V, **more),
}


def tokens(n, dtype=torch.float32):
    draw = lambda heads, dim: torch.randn(BATCH, heads, n, dim).to(dtype)
    return draw(2 * HEADS, DIM), draw(HEADS, DIM), draw(HEADS, DIM_V)


def test_a_view_looks_like_a_tensor():
    cache = KINDS["sliding"]()
    _, key, value = tokens(9)
    keys, values = cache.update(key, value)
    assert isinstance(keys, CacheView) and keys.shape == (BATCH, HEADS, 9, DIM) and values.shape[3] == DIM_V
    assert keys.dtype == torch.float32 and keys.device.type == "cpu" and "key of SlidingCache" in repr(keys)


def updated(kind, n=4, **more):
    cache = KINDS[kind](**more)
    query, key, value = tokens(n)
    cache.update(key, value)
    return cache, query, key, value


def wrong_update(change, **keywords):
    def attempt():
        cache, _, key, value = updated("growing")
        cache.update(*change(key, value), **keywords)

    return attempt


def wrong_call(arguments, **keywords):
    def attempt():
        cache, query, key, value = updated(keywords.pop("kind", "growing"), keywords.pop("n", 4))
        attention(query, *arguments(cache, key, value), **keywords)

    return attempt


def causal_blocks(q_len, kv_len):
    return create_block_mask(lambda b, h, q, kv: q >= kv, None, None, q_len, kv_len, device="cpu")


def blocks(lengths, heads=2, dtype=torch.float32):
    table = torch.zeros(1, 2, dtype=torch.int32)
    return KVCache.from_blocks(torch.zeros(2, 4, 2, 8), torch.zeros(2, 4, heads, 8, dtype=dtype), table, lengths)


REFUSED = {
    "heads": (wrong_update(lambda k, v: (k[:, :1], v)), ValueError, "key: .*= \\[2, 2, new, 16\\]"),
    "dim": (wrong_update(lambda k, v: (k, k)), ValueError, "value: .*\\[2, 2, new, 24\\]"),
    "dtype": (wrong_update(lambda k, v: (k.half(), v)), ValueError, "holds torch.float32 on cpu, got torch.float16"),
    "grad": (wrong_update(lambda k, v: (k.requires_grad_(), v)), ValueError, "gives no gradients"),
    "tokens": (wrong_update(lambda k, v: (k, v[:, :, :1])), ValueError, "same tokens are needed, got 4 and 1"),
    "ragged": (wrong_update(lambda k, v: (k, v), new_lengths=[1, 4]), ValueError, "keeps sequences of one length"),
    "too-long": (wrong_update(lambda k, v: (k, v), new_lengths=[5, 4]), ValueError, "2 ints from 0 to 4 .* got .5"),
    "one-view": (wrong_call(lambda c, k, v: (c.key, v)), TypeError, "needed together"),
    "swapped": (wrong_call(lambda c, k, v: (c.value, c.key)), ValueError, "cache.key is needed, got cache.value"),
    "packed": (
        wrong_call(lambda c, k, v: (c.key, c.value), mask=Packed(torch.tensor([0, 4]), torch.tensor([0, 4]))),
        ValueError, "packed sequences have no cache",
    ),
    "chunks": (
        wrong_call(lambda c, k, v: c.update(k[:, :, :1], v[:, :, :1]), mask=Chunked(2), kind="sliding", n=9),
        ValueError, "lost where chunks begin",
    ),
    "query": (lambda: attention(None, *updated("growing")[0].update(*tokens(1)[1:])), ValueError, "query: "),
    "full": (lambda: updated("static", 41), ValueError, "41 more tokens do not fit, 0 of 40 are held"),
    "no-blocks": (lambda: updated("paged-3", 50), ValueError, "34 more blocks are needed and 30 are free"),
    "narrow-table": (lambda: updated("paged-3", 9, table_width=2), ValueError, "wider than table_width=2"),
    "capacity": (lambda: KVCache.static(2, 2, 0, 8), ValueError, "capacity: an int of at least 1"),
    "batch": (lambda: KVCache.growing(0, 2, 8), ValueError, "batch: an int of at least 1"),
    "block-size": (lambda: KVCache.paged(1, 2, 8, blocks=3, block_size=0), ValueError, "block_size: an int"),
    "starts": (lambda: KVCache.growing(2, 2, 8, starts=torch.zeros(3)), ValueError, "starts: int32 or int64 \\[2\\]"),
    "written": (
        lambda: KVCache.from_blocks(*[torch.zeros(2, 4, 2, 8)] * 2, torch.zeros(1, 1, dtype=torch.int32), [3]).update(
            torch.zeros(1, 2, 1, 8), torch.zeros(1, 2, 1, 8)),
        ValueError, "read and never written",
    ),
    "no-block": (
        lambda: KVCache.from_blocks(*[torch.zeros(0, 4, 2, 8)] * 2, torch.zeros(1, 1, dtype=torch.int32), [3]),
        ValueError, "at least one block of at least one token",
    ),
    "no-column": (lambda: two_views(torch.zeros(1, 0, dtype=torch.int32)), ValueError, "table: at least one column"),
    "float-lengths": (
        lambda: KVCache.from_blocks(*[torch.zeros(2, 4, 2, 8)] * 2, torch.zeros(1, 1, dtype=torch.int32), [1.5]),
        ValueError, "lengths: ints \\[1\\] are needed, got torch.float32",
    ),
    "inference-mode": (lambda: made_under_inference().update(*tokens(1)[1:]), ValueError, "made under torch.inference"),
    "table-dtype": (
        lambda: two_views(torch.zeros(1, 1, dtype=torch.int64)),
        ValueError, "table: int32 .* is needed, got torch.int64",
    ),
    "item": (lambda: updated("paged-3")[0].free(-1), ValueError, "item: a sequence from 0 to 1 is needed, got -1"),
    "item-beyond": (lambda: updated("paged-3")[0].free(5), ValueError, "item: .* got 5"),
    "item-float": (lambda: updated("paged-3")[0].free(0.0), ValueError, "item: .* got 0.0"),
    "half-a-token": (wrong_update(lambda k, v: (k, v), new_lengths=[1.5, 2]), ValueError, "new_lengths: 2 ints"),
    "one-length": (wrong_update(lambda k, v: (k, v), new_lengths=1), ValueError, "new_lengths: 2 ints .* got 1"),
    "nested": (wrong_update(lambda k, v: (k, v), new_lengths=[[1]]), ValueError, "new_lengths: 2 ints"),
    "true": (lambda: KVCache.growing(True, 2, 8), ValueError, "batch: an int of at least 1 is needed, got True"),
    "dim-v": (lambda: KVCache.growing(1, 2, 8, head_dim_v=0), ValueError, "head_dim_v: an int of at least 1"),
    "dim-v-text": (lambda: KVCache.static(1, 2, 4, 8, head_dim_v="8"), ValueError, "head_dim_v: an int"),
    "starts-list": (lambda: KVCache.growing(1, 2, 8, starts=[3]), ValueError, "starts: .* got list"),
    "starts-below-0": (
        lambda: KVCache.growing(1, 2, 8, starts=torch.tensor([-3])), ValueError, "starts: .* got \\[-3\\]",
    ),
    "ints": (lambda: KVCache.static(1, 2, 4, 8, dtype=torch.int32), ValueError, "dtype: one of .* got torch.int32"),
    "lengths-beyond": (lambda: blocks([9]), ValueError, "table: .* lengths from 0 to 8, got \\[9\\]"),
    "lengths-below-0": (lambda: blocks([-1]), ValueError, "table: .* lengths from 0 to 8, got \\[-1\\]"),
    "pools-differ": (lambda: blocks([3], heads=1), ValueError, "the same blocks, block_size and num_kv_heads"),
    "pools-dtypes": (lambda: blocks([3], dtype=torch.half), ValueError, "value_pool: torch.float32 on cpu is needed"),
    "text": (wrong_call(lambda c, k, v: (c.key, c.value), mask="causal"), TypeError, "mask: a fastattn.masks.Mask"),
    "causal-bias": (
        wrong_call(lambda c, k, v: (c.key, c.value), mask=causal_lower_right(4, 9), kind="static"),
        ValueError, "made for 4 queries and 9 keys, got 4 and 4",
    ),
    "block-mask": (
        wrong_call(lambda c, k, v: (c.key, c.value), mask=causal_blocks(4, 4), kind="sliding"),
        ValueError, "mask BlockMask: it numbers keys from the first, which a sliding cache has lost",
    ),
    "block-mask-lengths": (
        wrong_call(lambda c, k, v: (c.key, c.value), mask=causal_blocks(4, 4), kind="static"),
        ValueError, "made for 4 queries and 4 keys, got 4 and 40",
    ),
    "reset": (lambda: made_under_inference().reset(), ValueError, "made under torch.inference_mode"),
}  # fmt: skip


def made_under_inference():
    with torch.inference_mode():
        cache = KINDS["growing"]()
        cache.update(*tokens(2)[1:])
        return cache


def two_views(table: Tensor):
    cache = KVCache.from_blocks(*[torch.zeros(2, 4, 2, 8)] * 2, table, [3])
    return cache.key, cache.value


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused(name):
    attempt, kind, words = REFUSED[name]
    with pytest.raises(kind, match=words):
        attempt()


def test_autocast_copies_no_cache():
    cache, query, *_ = updated("growing")
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match=r"make it with dtype=torch\.bfloat16"):
        attention(query, cache.key, cache.value)
    cache = KINDS["growing"](dtype=torch.bfloat16)
    query, key, value = tokens(3, torch.bfloat16)
    cache.update(key, value)
    with torch.autocast("cpu", torch.bfloat16):
        assert attention(query.float(), cache.key, cache.value).dtype == torch.bfloat16
