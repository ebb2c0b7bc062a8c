"""KVCache: what attention sees of it, against the same tokens laid end to end; every kind, every backend that runs."""

import pytest
import torch
import torch._dynamo.testing
from torch.nn.attention.bias import causal_lower_right, causal_upper_left
from torch.nn.attention.flex_attention import create_block_mask

import fastattn
from fastattn import KVCache, attention, attention_weights, explain
from fastattn.masks import Causal, Chunked, Full, Lengths, Prefix, Segments, Window

BATCH, HEADS, GROUP, DIM, DIM_V = 2, 2, 2, 16, 24
WINDOW = 4
BACKENDS = ["reference", "cpu", "triton"]
KINDS = {
    "static": lambda **more: KVCache.static(BATCH, HEADS, 40, DIM, head_dim_v=DIM_V, **more),
    "growing": lambda **more: KVCache.growing(BATCH, HEADS, DIM, head_dim_v=DIM_V, **more),
    "sliding": lambda **more: KVCache.sliding(BATCH, HEADS, WINDOW, DIM, head_dim_v=DIM_V, **more),
    "sliding-1": lambda **more: KVCache.sliding(BATCH, HEADS, 1, DIM, head_dim_v=DIM_V, **more),
    "paged-1": lambda **more: KVCache.paged(BATCH, HEADS, DIM, blocks=80, block_size=1, head_dim_v=DIM_V, **more),
    "paged-3": lambda **more: KVCache.paged(BATCH, HEADS, DIM, blocks=30, block_size=3, head_dim_v=DIM_V, **more),
    "paged-64": lambda **more: KVCache.paged(BATCH, HEADS, DIM, blocks=2, block_size=64, head_dim_v=DIM_V, **more),
}
STEPS = (5, 1, 1, 7, 0, 2, 1)


def tokens(n, dtype=torch.float32):
    draw = lambda heads, dim: torch.randn(BATCH, heads, n, dim).to(dtype)
    return draw(HEADS * GROUP, DIM), draw(HEADS, DIM), draw(HEADS, DIM_V)


def runs(backend):
    """The backend's name, or a skip with its reason."""
    query, key, value = tokens(1)
    reason = explain(query, key, value, backend="reference").reasons[backend]
    if reason is not None and backend != "triton":
        pytest.skip(reason)
    try:
        explain(query, key, value, backend=backend)
    except fastattn.BackendUnavailable as refusal:
        pytest.skip(str(refusal))
    return backend


class Beside:
    """A cache, and the same tokens laid end to end."""

    def __init__(self, cache, dtype=torch.float32):
        self.cache, self.dtype = cache, dtype
        self.keys = torch.empty(BATCH, HEADS, 0, DIM, dtype=dtype)
        self.values = torch.empty(BATCH, HEADS, 0, DIM_V, dtype=dtype)

    def add(self, n):
        query, key, value = tokens(n, self.dtype)
        self.keys, self.values = torch.cat([self.keys, key], 2), torch.cat([self.values, value], 2)
        self.cache.update(key, value)
        return query

    def want(self, query, mask):
        return attention(query, self.keys, self.values, mask=mask, backend="reference")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_decoding_sees_what_is_held(kind, backend):
    beside = Beside(KINDS[kind]())
    for n in STEPS:
        query = beside.add(n)
        window = getattr(beside.cache, "window", None)
        causal = Causal() if window is None else Window(window - 1, 0)
        got = attention(query, beside.cache.key, beside.cache.value, mask=Causal(), backend=runs(backend))
        torch.testing.assert_close(got, beside.want(query, causal), atol=1e-5, rtol=1e-4)
    assert beside.cache.held == [sum(STEPS)] * BATCH and beside.cache.lengths.tolist() == beside.cache.held


MASKS = {
    "none": None,
    "full": Full(),
    "window": Window(3, 0),
    "and": Causal() & Window(6, 0),
    "or": Window(2, 0) | Lengths(torch.tensor([2, 3])),
    "top-left": Causal(align="top-left"),
    "offset": Causal(offset=4),
    "offsets": Causal(offset=torch.tensor([4, 9])),
    "prefix": Prefix(torch.tensor([3, 0])),
    "chunked": Chunked(3) & Causal(),
}


@pytest.mark.parametrize("kind", ["static", "growing", "paged-3"])
@pytest.mark.parametrize("name", MASKS)
def test_masks_are_about_what_is_held(name, kind):
    beside = Beside(KINDS[kind]())
    for n in (8, 3):
        query = beside.add(n)
    got = attention(query, beside.cache.key, beside.cache.value, mask=MASKS[name])
    torch.testing.assert_close(got, beside.want(query, MASKS[name]), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["none", "full", "window", "and", "top-left", "offset", "offsets"])
def test_masks_of_a_sliding_cache_count_from_the_sequence(name):
    beside = Beside(KINDS["sliding"]())
    for n in (8, 1, 3):
        query = beside.add(n)
    mask = MASKS[name] or Full()
    got = attention(query, beside.cache.key, beside.cache.value, mask=mask)
    want = beside.want(query, mask & Window(WINDOW - 1, None))
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_table_and_weights_fit_what_is_held(kind):
    beside = Beside(KINDS[kind]())
    for n in (6, 2):
        query = beside.add(n)
    cache, length = beside.cache, beside.cache.key.shape[2]
    weights = attention_weights(query, cache.key, mask=Causal())
    assert weights.shape == (BATCH, HEADS * GROUP, 2, length)
    torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:3]))
    table = torch.ones(2, length, dtype=torch.bool)
    out = attention(query, cache.key, cache.value, mask=table)
    torch.testing.assert_close(out, attention(query, cache.key, cache.value), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["static", "paged-3", "paged-64"])
def test_sequences_of_different_lengths(kind, backend):
    cache = KINDS[kind]()
    rows = [([], []) for _ in range(BATCH)]
    for counts, n in (([5, 2], 5), ([1, 1], 1), ([0, 3], 3), ([2, 1], 2)):
        query, key, value = tokens(n)
        cache.update(key, value, new_lengths=counts)
        got = attention(query, cache.key, cache.value, mask=Causal(), backend=runs(backend))
        for item, count in enumerate(counts):
            rows[item][0].append(key[item, :, :count])
            rows[item][1].append(value[item, :, :count])
            keys, values = (torch.cat(each, 1)[None] for each in rows[item])
            want = attention(query[item : item + 1, :, :count], keys, values, mask=Causal(), backend="reference")
            torch.testing.assert_close(got[item : item + 1, :, :count], want, atol=1e-5, rtol=1e-4)
    assert cache.held == [8, 7]


@pytest.mark.parametrize("kind", ["static", "growing", "sliding", "paged-3"])
def test_left_padding(kind):
    starts = torch.tensor([3, 0])
    beside = Beside(KINDS[kind](starts=starts))
    for n in (6, 1, 2):
        query = beside.add(n)
    window = getattr(beside.cache, "window", 100)
    real = Lengths(torch.full((BATCH,), 9), kv_starts=starts)
    got = attention(query, beside.cache.key, beside.cache.value, mask=Causal())
    torch.testing.assert_close(got, beside.want(query, Window(window - 1, 0) & real), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("size", [1, 5, 64, 128])
def test_long_sequences_in_blocks(dtype, size):
    """Several tiles, and both of the CPU backend's ways through them."""
    cache = KVCache.paged(BATCH, HEADS, DIM, blocks=2 * -(-300 // size), block_size=size, head_dim_v=DIM_V, dtype=dtype)
    beside = Beside(cache, dtype)
    for n in (150, 140, 1, 3):
        query = beside.add(n)
        got = attention(query, cache.key, cache.value, mask=Causal())
        bound = 2e-2 if dtype.itemsize == 2 else 1e-5
        torch.testing.assert_close(got, beside.want(query, Causal()), atol=bound, rtol=bound)
        again = attention(query, cache.key, cache.value, mask=Causal())
        assert torch.equal(got, again)


@pytest.mark.parametrize("layout", ["rows", "columns"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_somebody_elses_blocks(backend, layout):
    """flash-attn's layout; entries past the end of a sequence may be anything."""
    keys, values = torch.randn(7, 4, HEADS, DIM), torch.randn(7, 4, HEADS, DIM_V)
    table = torch.tensor([[5, 0, 3, -9], [2, 6, 10**6, 10**6]], dtype=torch.int32)
    table = table if layout == "rows" else table.T.contiguous().T
    cache = KVCache.from_blocks(keys, values, table, [11, 6])
    assert cache.held == [11, 6]
    query = torch.randn(BATCH, HEADS * GROUP, 1, DIM)
    got = attention(query, cache.key, cache.value, mask=Causal(), backend=runs(backend))
    for item, length in enumerate((11, 6)):
        order = table[item, : -(-length // 4)].long()
        key, value = (pool[order].flatten(0, 1)[:length].transpose(0, 1)[None] for pool in (keys, values))
        want = attention(query[item : item + 1], key, value, backend="reference")
        torch.testing.assert_close(got[item : item + 1], want, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["static", "paged-3", "paged-64"])
def test_a_finished_sequence_takes_no_more_space(kind):
    """40 slots, or 13 blocks of 3 in a row of the table, are full in one sequence; the other goes on."""
    cache = KINDS[kind](**({"table_width": 13} if kind == "paged-3" else {}))
    full = 39 if kind == "paged-3" else 40
    rows = [[], []]
    for counts, n in (([full, 2], full), ([0, 3], 3)):
        query, key, value = tokens(n)
        cache.update(key, value, new_lengths=counts)
        for item, count in enumerate(counts):
            rows[item].append((key[item, :, :count], value[item, :, :count]))
    got = attention(query, cache.key, cache.value, mask=Causal())
    keys, values = (torch.cat(each, 1)[None] for each in zip(*rows[1], strict=True))
    want = attention(query[1:], keys, values, mask=Causal())
    torch.testing.assert_close(got[1:], want, atol=1e-5, rtol=1e-4)
    assert cache.held == [full, 5]


@pytest.mark.parametrize("name", ["prefix", "lengths", "starts", "or"])
def test_counts_of_a_sliding_cache_are_the_sequences(name):
    ten = torch.tensor([10, 25])
    mask = {
        "prefix": Prefix(ten),
        "lengths": Causal() & Lengths(ten + 15),
        "starts": Causal() & Lengths(ten + 90, kv_starts=ten + 2),
        "or": Causal() | Lengths(ten),
    }[name]
    beside = Beside(KVCache.sliding(BATCH, HEADS, 8, DIM, head_dim_v=DIM_V))
    for n in (*[1] * 26, 4):
        query = beside.add(n)
    got = attention(query, beside.cache.key, beside.cache.value, mask=mask)
    torch.testing.assert_close(got, beside.want(query, mask & Window(7, None)), atol=1e-5, rtol=1e-4)


def test_a_static_cache_inside_a_compiled_step():
    beside, other = Beside(KINDS["static"]()), Beside(KINDS["static"]())
    cache = other.cache
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    step = torch.compile(
        lambda q, k, v: attention(q, *cache.update(k, v), mask=Causal()), fullgraph=True, backend=counter
    )
    for _ in range(12):
        query = beside.add(1)
        with torch.no_grad():
            got = step(query, beside.keys[:, :, -1:].clone(), beside.values[:, :, -1:].clone())
        torch.testing.assert_close(got, beside.want(query, Causal()), atol=1e-5, rtol=1e-4)
    assert counter.frame_count == 1 and cache.held == [12, 12]


def test_blocks_are_handed_back():
    cache = KINDS["paged-3"]()
    _, key, value = tokens(9)
    cache.update(key, value)
    first = cache.table[0, :3].tolist()
    assert len(cache.free_blocks) == 24
    cache.free(0)
    assert cache.held == [0, 9] and len(cache.free_blocks) == 27
    query, key, value = tokens(2)
    cache.update(key, value)
    assert cache.table[0, 0].item() in first
    got = attention(query, cache.key, cache.value, mask=Causal())
    want = attention(query[:1], key[:1], value[:1], mask=Causal())
    torch.testing.assert_close(got[:1], want, atol=1e-5, rtol=1e-4)
    cache.reset()
    assert cache.held == [0, 0] and len(cache.free_blocks) == 30


@pytest.mark.parametrize("kind", KINDS)
def test_reset_forgets(kind):
    beside = Beside(KINDS[kind]())
    beside.add(9)
    beside.cache.reset()
    beside = Beside(beside.cache)
    query = beside.add(3)
    window = getattr(beside.cache, "window", 100)
    got = attention(query, beside.cache.key, beside.cache.value, mask=Causal())
    torch.testing.assert_close(got, beside.want(query, Window(window - 1, 0)), atol=1e-5, rtol=1e-4)


def test_growing_copies_little_and_sliding_keeps_little():
    growing, sliding = KINDS["growing"](), KINDS["sliding"]()
    places = set()
    for _ in range(200):
        _, key, value = tokens(1)
        growing.update(key, value)
        sliding.update(key, value)
        places.add(growing.keys.data_ptr())
    assert len(places) <= 5 and growing.slots == 256
    assert sliding.slots == 2 * WINDOW and sliding.kv_len == WINDOW


@pytest.mark.parametrize("kind", ["static", "paged-3"])
def test_nothing_is_copied(kind, monkeypatch):
    """The backend reads the cache's own memory."""
    from fastattn import ops

    beside = Beside(KINDS[kind]())
    query = beside.add(5)
    seen = []
    inner = ops._run_forward
    monkeypatch.setattr(
        ops, "_run_forward", lambda spec, inputs, backend: seen.append(inputs) or inner(spec, inputs, backend)
    )
    attention(query, beside.cache.key, beside.cache.value, mask=Causal())
    assert seen[0].key.data_ptr() == beside.cache.keys.data_ptr()
    assert seen[0].value.data_ptr() == beside.cache.values.data_ptr()


def test_compiled_in_blocks():
    beside = Beside(KINDS["paged-3"]())
    query = beside.add(7)
    cache = beside.cache
    call = lambda q: attention(q, cache.key, cache.value, mask=Causal())
    torch._dynamo.reset()
    with torch.no_grad():
        got = torch.compile(call, fullgraph=True, backend="aot_eager")(query)
    torch.testing.assert_close(got, beside.want(query, Causal()), atol=1e-5, rtol=1e-4)


def test_queries_may_want_gradients_in_the_reference():
    beside = Beside(KINDS["paged-3"]())
    query = beside.add(7).requires_grad_()
    out = attention(query, beside.cache.key, beside.cache.value, mask=Causal())
    (got,) = torch.autograd.grad(out.sum(), query)
    (want,) = torch.autograd.grad(beside.want(query, Causal()).sum(), query)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)
    with pytest.raises(fastattn.BackendUnavailable, match="read forward only here"):
        attention(query, beside.cache.key, beside.cache.value, backend="cpu")


def test_segments_are_the_callers_own():
    cache = KINDS["static"]()
    query, key, value = tokens(4)
    cache.update(key, value)
    ids = torch.zeros(1, 40, dtype=torch.long)
    out = attention(query, cache.key, cache.value, mask=Segments(torch.zeros(1, 4, dtype=torch.long), ids))
    torch.testing.assert_close(out, attention(query, cache.key, cache.value), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sliding_cache_answers_for_the_last_update_alone(backend):
    """Its queries see all they should, fewer of the last as well; older ones would see too little, and are refused."""
    backend = runs(backend)
    beside = Beside(KINDS["sliding"]())
    beside.add(5)
    query = beside.add(5)
    for count in (5, 2, 1):
        last = query[:, :, -count:]
        out = attention(last, beside.cache.key, beside.cache.value, mask=Causal(), backend=backend)
        torch.testing.assert_close(out, beside.want(last, Window(WINDOW - 1, 0)), atol=1e-5, rtol=1e-4)
    ten = tokens(10)[0]
    with pytest.raises(ValueError, match="10 queries at the end of 10 tokens see some that slid away; at most 5"):
        attention(ten, beside.cache.key, beside.cache.value, mask=Causal())
    beside.add(0)  # nothing comes, nothing goes
    out = attention(query, beside.cache.key, beside.cache.value, mask=Causal(), backend=backend)
    torch.testing.assert_close(out, beside.want(query, Window(WINDOW - 1, 0)), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["growing", "sliding", "static", "paged-3"])
def test_a_cache_filled_under_inference_mode_goes_on_outside(kind):
    beside = Beside(KINDS[kind]())
    beside.add(3)
    with torch.inference_mode():
        beside.cache.update(*(each[:, :, 3:] for each in fill(beside, 20)))
    query = beside.add(1)
    window = Window(WINDOW - 1, 0) if kind == "sliding" else Causal()
    out = attention(query, beside.cache.key, beside.cache.value, mask=Causal())
    torch.testing.assert_close(out, beside.want(query, window), atol=1e-5, rtol=1e-4)
    beside.cache.reset()


def fill(beside, n):
    """Keys and values with n more tokens, known to `beside` and not yet to its cache."""
    _, key, value = tokens(n)
    beside.keys, beside.values = torch.cat([beside.keys, key], 2), torch.cat([beside.values, value], 2)
    return beside.keys, beside.values


@pytest.mark.parametrize("make", [causal_lower_right, causal_upper_left], ids=["lower-right", "upper-left"])
@pytest.mark.parametrize("kind", ["growing", "static", "paged-3", "sliding"])
def test_torchs_causal_bias_is_about_what_is_held(kind, make):
    beside = Beside(KINDS[kind]())
    beside.add(10)
    query = beside.add(2)
    out = attention(query, beside.cache.key, beside.cache.value, mask=make(2, 12))
    mask = Causal(align="bottom-right" if make is causal_lower_right else "top-left")
    want = beside.want(query, mask & Window(WINDOW - 1, None) if kind == "sliding" else mask)
    torch.testing.assert_close(out, want, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["growing", "static", "paged-3"])
def test_a_block_mask_is_about_the_keys_that_are_given(kind):
    beside = Beside(KINDS[kind]())
    beside.add(10)
    query = beside.add(2)
    keys = beside.cache.kv_len
    near = create_block_mask(lambda b, h, q, kv: q + 10 - kv <= 3, None, None, 2, keys, device="cpu")
    out = attention(query, beside.cache.key, beside.cache.value, mask=near)
    torch.testing.assert_close(out, beside.want(query, Window(3, None)), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_default_device_elsewhere_changes_nothing(kind):
    beside = Beside(KINDS[kind](device="cpu"))
    _, key, value = tokens(5)
    with torch.device("meta"):
        beside.cache.update(key, value)
    assert torch.equal(
        attention_weights(tokens(1)[0], beside.cache.key)[..., :1].isfinite(), torch.ones(2, 4, 1, 1) > 0
    )
