"""Arguments that are whole numbers: floats, complex numbers and bools are refused; batches of one and of many mix."""

import dataclasses
import itertools

import pytest
import torch

from fastattn import KVCache, attention, attention_weights, dropout_mask, varlen_attention
from fastattn.integrations.flash_attn import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache
from fastattn.masks import Causal, Chunked, Lengths, Packed, Prefix, Segments, Window

B, L, N = 3, 5, 7
Q, K = torch.randn(B, 2, L, 8), torch.randn(B, 2, N, 8)
POOL, TABLE = torch.randn(2, 4, 2, 8), torch.zeros(1, 1, dtype=torch.int32)
FLAT = torch.randn(L, 2, 8)
CACHE = torch.randn(1, N, 2, 8)

# name: a call, and a good number or list of them
TENSORS = {
    "rows": (lambda x: attention_weights(Q, K, rows=x), [1, 0]),
    "Lengths, kv_lengths": (Lengths, [1, 2, 3]),
    "Lengths, q_lengths": (lambda x: Lengths(torch.tensor([1]), q_lengths=x), [1, 2, 3]),
    "Lengths, kv_starts": (lambda x: Lengths(torch.tensor([1]), kv_starts=x), [1, 2, 3]),
    "Prefix": (Prefix, [1, 2, 3]),
    "Causal, offset": (lambda x: Causal(offset=x), [1, 2, 3]),
    "Window, offset": (lambda x: Window(1, 1, offset=x), [1, 2, 3]),
    "Chunked, offset": (lambda x: Chunked(2, offset=x), [1, 2, 3]),
    "Segments": (Segments, [[1, 1, 0]]),
    "Segments, kv_ids": (lambda x: Segments(torch.zeros(1, 3, dtype=torch.int64), x), [[1, 1, 0]]),
    "Packed": (lambda x: Packed(x, torch.tensor([0, 5])), [0, 5]),
    "Packed, cu_kv": (lambda x: Packed(torch.tensor([0, 5]), x), [0, 5]),
    "varlen_attention": (lambda x: varlen_attention(FLAT, FLAT, FLAT, x), [0, 5]),
    "flash, varlen": (lambda x: flash_attn_varlen_func(FLAT, FLAT, FLAT, x, x, 5, 5), [0, 5]),
    "flash, lengths": (lambda x: flash_attn_with_kvcache(CACHE, CACHE, CACHE, cache_seqlens=x), [3]),
    "flash, rows": (lambda x: flash_attn_with_kvcache(CACHE, CACHE, CACHE, cache_batch_idx=x), [0]),
    "flash, left padding": (lambda x: flash_attn_with_kvcache(CACHE, CACHE, CACHE, cache_leftpad=x), [1]),
    "blocks, lengths": (lambda x: KVCache.from_blocks(POOL, POOL, TABLE, x), [3]),
    "cache, starts": (lambda x: KVCache.growing(1, 2, 8, starts=x), [1]),
    "cache, new lengths": (
        lambda x: KVCache.static(1, 2, 9, 8).update(K[:1], K[:1], new_lengths=x), [1],
    ),
    "dropout_seed": (lambda x: attention(Q, K, K, dropout_p=0.5, dropout_seed=x), [1]),
    "dropout_mask, seed": (lambda x: dropout_mask(1, 1, 2, 2, p=0.5, seed=x), [1]),
}  # fmt: skip
NUMBERS = {
    "Window": lambda x: Window(x, 0),
    "Window, right": lambda x: Window(0, x),
    "Window, offset": lambda x: Window(1, 1, offset=x),
    "Causal, offset": lambda x: Causal(offset=x),
    "Chunked": lambda x: Chunked(x),
    "Chunked, left": lambda x: Chunked(2, x),
    "flash, window": lambda x: flash_attn_func(CACHE, CACHE, CACHE, window_size=(x, 1)),
    "flash, window, right": lambda x: flash_attn_func(CACHE, CACHE, CACHE, window_size=(1, x)),
    "flash, length": lambda x: flash_attn_with_kvcache(CACHE, CACHE, CACHE, cache_seqlens=x),
    "dropout_mask": lambda x: dropout_mask(1, 1, x, 2, p=0.5, seed=torch.tensor([1])),
    "cache": lambda x: KVCache.static(1, 2, x, 8),
    "rows": lambda x: attention_weights(Q, K, rows=[x]),
    "new lengths": lambda x: KVCache.static(1, 2, 9, 8).update(K[:1], K[:1], new_lengths=[x]),
}
KINDS = {"float": torch.float32, "half": torch.float16, "complex": torch.complex64, "bool": torch.bool}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", TENSORS)
def test_tensors_of_other_numbers_are_refused(name, kind):
    call, good = TENSORS[name]
    call(torch.tensor(good))
    with pytest.raises((TypeError, ValueError), match=r"(int|needed).*got"):
        call(torch.tensor(good).to(KINDS[kind]))


@pytest.mark.parametrize("value", [1.0, 1 + 0j, True, "1"], ids=repr)
@pytest.mark.parametrize("name", NUMBERS)
def test_other_numbers_are_refused(name, value):
    NUMBERS[name](1)
    with pytest.raises((TypeError, ValueError), match=r"(int|number|needed).*got"):
        NUMBERS[name](value)


def some(batch, low, high, seed):
    return torch.randint(low, high, (batch,), generator=torch.Generator().manual_seed(seed + batch))


def ids(batch, length, ordered=False):
    found = torch.randint(-1, 2, (batch, length), generator=torch.Generator().manual_seed(7 * batch + length))
    return found.abs().sort(-1)[0] if ordered else found


# a mask of two or three tensors, each for one batch item or for all; None: none
MIXED = {
    "lengths": (lambda a, b, c: Lengths(some(a, 2, 8, 1), b and some(b, 1, 6, 2), c and some(c, 0, 4, 3)), 3),
    "prefix": (lambda a, b: Prefix(some(a, 0, 6, 1), offset=some(b, -2, 3, 2)), 2),
    "segments": (lambda a, b: Segments(ids(a, L), ids(b, N)), 2),
    "sorted segments": (lambda a, b: Segments(ids(a, L, True), ids(b, N, True), sorted=True), 2),
    "causal & lengths": (lambda a, b: Causal(offset=some(a, 0, 3, 2)) & Lengths(some(b, 2, 8, 1)), 2),
    "window | lengths": (lambda a, b: Window(1, 0, offset=some(a, 0, 3, 2)) | Lengths(some(b, 1, 3, 1)), 2),
    "chunked & window": (lambda a, b: Chunked(2, offset=some(a, 0, 3, 2)) & Window(2, 1, offset=some(b, 0, 3, 5)), 2),
}
ROWS = [
    (name, sizes)
    for name, (_, count) in MIXED.items()
    for sizes in itertools.product((1, B), *[(None, 1, B) if name == "lengths" else (1, B)] * (count - 1))
]


@pytest.mark.parametrize("backend", ["reference", None])
@pytest.mark.parametrize(("name", "sizes"), ROWS, ids=str)
def test_batches_of_one_and_of_many_mix(name, sizes, backend):
    make = MIXED[name][0]
    with torch.no_grad():
        mask = make(*sizes)
        table = torch.stack([make_one(make, sizes, item).dense(L, N).expand(1, 1, L, N)[0] for item in range(B)])
    want = attention(q := Q.clone().requires_grad_(), K, K, mask=table, backend="reference")
    (grad,) = torch.autograd.grad(want.sum(), q)
    have = attention(q, K, K, mask=mask, backend=backend)
    torch.testing.assert_close(have, want)
    torch.testing.assert_close(torch.autograd.grad(have.sum(), q)[0], grad)
    assert torch.equal(mask.dense(L, N).expand(B, 1, L, N), table)


def make_one(make, sizes, item):
    """The mask of one batch item alone: every tensor cut down to that item's part."""

    def cut(part):
        if dataclasses.is_dataclass(part):
            changed = {field.name: cut(getattr(part, field.name)) for field in dataclasses.fields(part)}
            return dataclasses.replace(part, **changed)
        if isinstance(part, torch.Tensor):
            return part[min(item, part.shape[0] - 1)][None]
        return part

    return cut(make(*sizes))


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Lengths(some(2, 1, 3, 1), kv_starts=some(3, 0, 2, 1)), "Lengths: .* kv_lengths 2, kv_starts 3"),
        (lambda: Lengths(some(2, 1, 3, 1), q_lengths=some(3, 0, 2, 1)), "Lengths: .* q_lengths 3"),
        (lambda: Lengths(some(1, 1, 3, 1), some(2, 0, 2, 1), some(3, 0, 2, 1)), "Lengths: batch sizes that are equal"),
        (lambda: Prefix(some(2, 1, 3, 1), offset=some(3, 0, 2, 1)), "Prefix: .* lengths 2, offset 3"),
        (lambda: Segments(ids(2, 4), ids(3, 4)), "Segments: .* q_ids 2, kv_ids 3"),
        (lambda: attention(Q, K, K, mask=Lengths(some(2, 1, 3, 1))), r"kv_lengths must be \[3\]"),
        (lambda: attention(Q, K, K, mask=Lengths(some(1, 1, 3, 1), kv_starts=some(2, 0, 1, 1))), "kv_starts must be"),
    ],
    ids=["starts", "q_lengths", "three", "prefix", "segments", "another batch", "another batch of starts"],
)
def test_other_batches_are_refused(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()
