"""What flash_attn_with_kvcache refuses: in a sentence, and before anything is written."""

import pytest
import torch

from fastattn.integrations.flash_attn import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache


def ints(*values, dtype=torch.int32):
    return torch.tensor(values, dtype=dtype)


BATCH, CAPACITY = 2, 16
R = torch.randn
NEW = {"k": R(2, 1, 2, 8), "v": R(2, 1, 2, 8), "cache_seqlens": ints(3, 5)}
TABLE = ints([0, 1], [2, 3])
TURN = {"rotary_cos": R(20, 4), "rotary_sin": R(20, 4)}

# name: what differs from a good call, the sentence
REFUSED = {
    "k of one item": ({"k": R(1, 1, 2, 8)}, r"k: \[batch, new, num_kv_heads, head_dim\] = \[2, 1, 2, 8\]"),
    "k of one head": ({"k": R(2, 1, 1, 8)}, r"k: .* = \[2, 1, 2, 8\] is needed, got \[2, 1, 1, 8\]"),
    "v of one dim": ({"v": R(2, 1, 2, 1)}, r"v: .* = \[2, 1, 2, 8\] is needed, got \[2, 1, 2, 1\]"),
    "v longer": ({"v": R(2, 2, 2, 8)}, r"v: .* = \[2, 1, 2, 8\] is needed"),
    "k a list": ({"k": [1]}, r"k: .* is needed, got list"),
    "k of ints": ({"k": NEW["k"].int()}, "k: the cache holds torch.float32 on cpu, got torch.int32"),
    "v of half": ({"v": NEW["v"].half()}, "v: the cache holds torch.float32 on cpu, got torch.float16"),
    "v alone": ({"k": None}, "k, v: both are needed"),
    "k alone": ({"v": None}, "k, v: both are needed"),
    "sin alone": ({"rotary_sin": TURN["rotary_sin"]}, "rotary_cos, rotary_sin: both"),
    "nothing to turn": ({**TURN, "k": None, "v": None}, "they turn new tokens; k and v are needed with them"),
    "too few positions": (
        {"rotary_cos": R(5, 4), "rotary_sin": R(5, 4)}, "rotary_cos: 6 positions are needed.*got 5",
    ),
    "q of half": ({"q": R(2, 1, 4, 8).half()}, "k_cache: q's dtype and device are needed, torch.float16"),
    "q of other heads": ({"q": R(2, 1, 3, 8)}, "heads"),
    "q of another dim": ({"q": R(2, 1, 4, 4)}, "head_dim"),
    "soft cap": ({"softcap": -1.0}, "softcap: a positive finite number"),
    "scale": ({"softmax_scale": float("nan")}, "scale: a finite number"),
    "slopes": ({"alibi_slopes": R(3)}, r"alibi_slopes: .* = \[4\] or \[batch, num_heads\] = \[2, 4\]"),
    "one slope": ({"alibi_slopes": R(1)}, r"alibi_slopes: .* got torch.float32 \[1\]"),
    "slopes in a list": ({"alibi_slopes": [1.0] * 4}, "alibi_slopes: .* got list"),
    "left padding too short": ({"cache_leftpad": ints(1)}, r"cache_leftpad: int32 \[2\] is needed"),
    "left padding of floats": ({"cache_leftpad": torch.ones(2)}, r"cache_leftpad: int32 \[2\] .* got torch.float"),
    "left padding below 0": ({"cache_leftpad": ints(0, -1)}, "cache_leftpad: 0 to 16, .* got"),
    "lengths of floats": ({"cache_seqlens": torch.ones(2)}, "cache_seqlens: a number or int32"),
    "lengths in a list": ({"cache_seqlens": [3, 5]}, "cache_seqlens: a number or an int tensor .* got list"),
    "a length that is true": ({"cache_seqlens": True}, "cache_seqlens: a number or an int tensor .* got bool"),
    "lengths below 0": ({"cache_seqlens": ints(-3, 5)}, r"cache_seqlens: 0 to 16, .* got \[-3, 5\]"),
    "lengths beyond": ({"k": None, "v": None, "cache_seqlens": 50}, r"cache_seqlens: 0 to 16, .* got \[50, 50\]"),
    "no space": ({"cache_seqlens": 16}, "k: 1 new tokens do not fit behind"),
    "rows too few": ({"cache_batch_idx": ints(0)}, r"cache_batch_idx: int32 \[2\] is needed"),
    "rows in a list": ({"cache_batch_idx": [0, 1]}, "cache_batch_idx: an int tensor .* got list"),
    "rows of floats": ({"cache_batch_idx": torch.tensor([0.7, 1.2])}, "cache_batch_idx: int32"),
    "rows beyond": ({"cache_batch_idx": ints(0, 9)}, "cache_batch_idx: 0 to 1, the last row of k_cache"),
    "rows below 0": ({"cache_batch_idx": ints(0, -1)}, r"cache_batch_idx: 0 to 1, .* got \[0, -1\]"),
    "a flat table": ({"block_table": ints(0, 1)}, r"block_table: int32 \[2, blocks of an item\] is needed"),
    "a table of floats": ({"block_table": torch.zeros(2, 2)}, "block_table: int32"),
    "a table beyond": ({"block_table": TABLE + 1}, r"block_table: blocks from 0 to 1 are there, got \[3\]"),
    "a table below 0": ({"block_table": ints([-1, 0], [0, 1])}, r"block_table: .* got \[-1\] where tokens lie"),
    "values shorter": ({"v_cache": R(2, 8, 2, 8)}, "k_cache, v_cache: the same rows, capacity and heads"),
    "a cache in a list": ({"k_cache": [1]}, "k_cache: .* got list"),
    "window": ({"window_size": 3}, "window_size"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused_before_anything_is_written(name):
    changed, text = REFUSED[name]
    given = {"q": R(2, 1, 4, 8), "k_cache": R(2, CAPACITY, 2, 8), "v_cache": R(2, CAPACITY, 2, 8), **NEW, **changed}
    kept = {
        key: each.clone() for key, each in given.items() if key.endswith("_cache") and isinstance(each, torch.Tensor)
    }
    with pytest.raises((TypeError, ValueError), match=text):
        flash_attn_with_kvcache(**given)
    assert all(torch.equal(given[key], each) for key, each in kept.items())


def test_entries_of_a_table_that_hold_nothing_may_be_anything():
    pools = R(2, 4, 8, 2, 8)
    table = ints([0, -1], [2, 99])
    out = flash_attn_with_kvcache(R(2, 1, 4, 8), *pools, **{**NEW, "cache_seqlens": ints(3, 7)}, block_table=table)
    assert out.isfinite().all()
    torch.testing.assert_close(pools[0][2, 7], NEW["k"][1, 0])


@pytest.mark.parametrize("shape", [(3, 2), (1,), (4,)], ids=str)
def test_slopes_of_other_shapes_are_refused(shape):
    q, cu = R(5, 2, 8), ints(0, 2, 5)
    with pytest.raises(
        ValueError, match=r"= \[2\] or \[sequences, num_heads\] = \[2, 2\] is needed, got torch.float32"
    ):
        flash_attn_varlen_func(q, q, q, cu, cu, 3, 3, alibi_slopes=R(shape))
    with pytest.raises(ValueError, match=r"= \[2\] or \[batch, num_heads\] = \[1, 2\] is needed"):
        flash_attn_func(q[None], q[None], q[None], alibi_slopes=R(shape))
