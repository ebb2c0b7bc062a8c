"""flash-attn's functions against their description, written out: layouts, windows, ALiBi, packing, caches."""

import inspect
import math

import pytest
import torch

from fastattn import varlen_attention
from fastattn.integrations.flash_attn import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache
from fastattn.masks import Causal, Chunked, Full, Lengths, Window

# flash-attn 2.8's signatures: names in order, with defaults
NOTHING = inspect.Parameter.empty
SHARED = {
    "dropout_p": 0.0, "softmax_scale": None, "causal": False, "window_size": (-1, -1), "softcap": 0.0,
    "alibi_slopes": None, "deterministic": False, "return_attn_probs": False,
}  # fmt: skip
QKV = dict.fromkeys(("q", "k", "v"), NOTHING)
SIGNATURES = {
    flash_attn_func: {**QKV, **SHARED},
    flash_attn_varlen_func: {
        **QKV,
        **dict.fromkeys(("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"), NOTHING),
        **SHARED,
        "block_table": None,
    },
    flash_attn_with_kvcache: {
        **dict.fromkeys(("q", "k_cache", "v_cache"), NOTHING),
        **dict.fromkeys(("k", "v", "rotary_cos", "rotary_sin", "cache_seqlens", "cache_batch_idx"), None),
        **dict.fromkeys(("cache_leftpad", "block_table", "softmax_scale"), None),
        "causal": False, "window_size": (-1, -1), "softcap": 0.0, "rotary_interleaved": True, "alibi_slopes": None,
        "num_splits": 0, "return_softmax_lse": False,
    },
}  # fmt: skip


@pytest.mark.parametrize("function", SIGNATURES, ids=lambda f: f.__name__)
def test_signatures_are_flash_attns(function):
    have = {name: p.default for name, p in inspect.signature(function).parameters.items()}
    assert list(have.items()) == list(SIGNATURES[function].items())


def draw(*shape, dtype=torch.float32):
    x = torch.randn(shape, dtype=torch.float64)
    x.view(-1)[:: max(1, x.numel() // 3)] *= 6  # outliers
    return x.to(dtype).requires_grad_()


def definition(q, k, v, *, scale=None, causal=False, window=(-1, -1), softcap=0.0, slopes=None, first=0, end=None):
    """One item, [length, heads, dim], in float64: flash-attn's own words turned into sums."""
    q, k, v = (tensor.double() for tensor in (q, k, v))
    k, v = (tensor.repeat_interleave(q.shape[1] // k.shape[1], 1) for tensor in (k, v))
    end = k.shape[0] if end is None else end
    scores = torch.einsum("ihd,jhd->hij", q, k) * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    row, key = torch.arange(q.shape[0])[:, None] + end - q.shape[0], torch.arange(k.shape[0])[None]
    if slopes is not None:
        scores = scores - slopes.double()[:, None, None] * (row - key).abs()
    left, right = window
    right = 0 if causal else right
    seen = (key >= first) & (key < end)
    seen = seen & ((key >= row - left) if left >= 0 else True) & ((key <= row + right) if right >= 0 else True)
    scores = scores.masked_fill(~seen, float("-inf"))
    lse = scores.logsumexp(-1)
    weights = torch.where(seen.any(-1)[None, :, None], (scores - lse[..., None]).exp(), 0.0)
    weights = torch.where(torch.isnan(weights), 0.0, weights)
    return torch.einsum("hij,jhd->ihd", weights, v), lse


def close(have, want, dtype=torch.float32):
    tolerance = 2e-5 if dtype == torch.float32 else 2e-2
    finite = want[torch.isfinite(want)].abs()
    largest = finite.max().item() if finite.numel() else 1.0
    torch.testing.assert_close(have.double(), want, rtol=tolerance, atol=tolerance * max(1.0, largest))


OPTIONS = {
    "plain": {},
    "scale": {"scale": 0.3},
    "causal": {"causal": True},
    "window": {"window": (2, 1)},
    "window, left alone": {"window": (3, -1)},
    "window, right alone": {"window": (-1, 2)},
    "causal window": {"window": (2, 5), "causal": True},
    "soft cap": {"softcap": 3.0, "causal": True},
    "alibi, causal": {"slopes": True, "causal": True},
    "alibi": {"slopes": True},
    "alibi, window": {"slopes": True, "window": (3, 0)},
}
NAMES = {"scale": "softmax_scale", "window": "window_size", "slopes": "alibi_slopes"}


def theirs(options):
    return {NAMES.get(name, name): value for name, value in options.items()}


@pytest.mark.parametrize("lengths", [(5, 5), (3, 8), (8, 3), (0, 4), (4, 0)], ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_flash_attn_func(name, lengths):
    options = dict(OPTIONS[name])
    if "slopes" in options:
        options["slopes"] = torch.rand(2, 4)
    q_len, kv_len = lengths
    q, k, v = draw(2, q_len, 4, 16), draw(2, kv_len, 2, 16), draw(2, kv_len, 2, 16)
    out, lse, weights = flash_attn_func(q, k, v, **theirs(options), return_attn_probs=True)
    assert out.shape == q.shape and out.is_contiguous() and lse.shape == (2, 4, q_len) and weights is None
    wants = []
    for b in range(2):
        each = options | ({"slopes": options["slopes"][b]} if "slopes" in options else {})
        wants.append(definition(q[b], k[b], v[b], **each))
    want = torch.stack([each for each, _ in wants])
    close(out, want), close(lse, torch.stack([each for _, each in wants]))
    if q_len and kv_len:
        for have, need in zip(*(torch.autograd.grad(o.square().sum(), (q, k, v)) for o in (out, want)), strict=True):
            close(have, need.double())
    assert torch.equal(flash_attn_func(q, k, v, **theirs(options)), out)


CU_Q, CU_K = (torch.tensor(cu, dtype=torch.int32) for cu in ([0, 3, 3, 8, 9], [0, 5, 7, 12, 12]))


def by_sequence(q, k, v, cu_q, cu_k, options):
    outs, rows = [], []
    for one in range(len(cu_q) - 1):
        each = options | ({"slopes": options["slopes"][one]} if "slopes" in options else {})
        q_part, kv_part = slice(cu_q[one], cu_q[one + 1]), slice(cu_k[one], cu_k[one + 1])
        out, lse = definition(q[q_part], k[kv_part], v[kv_part], **each)
        outs.append(out), rows.append(lse)
    return torch.cat(outs), torch.cat(rows, -1)


@pytest.mark.parametrize("blocks", [False, True], ids=["packed", "blocks"])
@pytest.mark.parametrize("name", OPTIONS)
def test_flash_attn_varlen_func(name, blocks):
    options = dict(OPTIONS[name])
    if "slopes" in options:
        options["slopes"] = torch.rand(4, 4)
    q, k, v = draw(9, 4, 16), draw(12, 2, 16), draw(12, 2, 16)
    want, want_lse = by_sequence(q, k, v, CU_Q, CU_K, options)
    given, more = (k, v), {}
    if blocks:
        table = torch.randperm(12, dtype=torch.int32).view(4, 3)
        pools = torch.full((2, 12, 2, 2, 16), float("nan"))
        for one in range(4):
            for token in range(CU_K[one + 1] - CU_K[one]):
                for pool, tensor in zip(pools, (k, v), strict=True):
                    pool[table[one, token // 2], token % 2] = tensor[CU_K[one] + token].detach()
        given, more = pools, {"block_table": table}
    out, lse, _ = flash_attn_varlen_func(q, *given, CU_Q, CU_K, 5, 5, **theirs(options), return_attn_probs=True, **more)
    assert out.is_contiguous()
    close(out, want), close(lse, want_lse)
    if not blocks:
        for have, need in zip(*(torch.autograd.grad(o.square().sum(), (q, k, v)) for o in (out, want)), strict=True):
            close(have, need.double())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    q, k, v = (draw(2, 7, 4, 16, dtype=dtype) for _ in range(3))
    want = torch.stack([definition(q[b], k[b], v[b], causal=True)[0] for b in range(2)])
    close(flash_attn_func(q, k, v, causal=True), want, dtype)


def test_dropout_and_its_signed_weights():
    q, k, v = (draw(2, 6, 4, 16) for _ in range(3))
    torch.manual_seed(3)
    out, _, signed = flash_attn_func(q, k, v, dropout_p=0.4, causal=True, return_attn_probs=True)
    torch.manual_seed(3)
    assert torch.equal(flash_attn_func(q, k, v, dropout_p=0.4, causal=True), out)
    weights = signed.abs()
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 6))
    kept = weights * (signed >= 0) / 0.6
    torch.testing.assert_close(out, torch.einsum("bhij,bjhd->bihd", kept, v), rtol=1e-4, atol=1e-4)


def rotate(x, cos, sin, places, interleaved):
    """[length, heads, dim] turned by places [length], one pair at a time."""
    x, half = x.clone().double(), cos.shape[1]
    for pair in range(half):
        a, b = (2 * pair, 2 * pair + 1) if interleaved else (pair, pair + half)
        c, s = cos[places, pair].double()[:, None], sin[places, pair].double()[:, None]
        x[..., a], x[..., b] = x[..., a] * c - x[..., b] * s, x[..., a] * s + x[..., b] * c
    return x


CACHES = {
    "reading alone": {"new": 0},
    "all of it": {"new": 0, "held": None},
    "a number": {"new": 2, "held": 4},
    "writing": {},
    "causal": {"causal": True},
    "causal window": {"causal": True, "window": (2, 0)},
    "window": {"window": (3, 1)},
    "left padding": {"starts": True, "causal": True},
    "rows": {"rows": True, "causal": True},
    "blocks": {"blocks": True, "causal": True},
    "blocks, rotary": {"blocks": True, "causal": True, "rotary": True},
    "rotary, halves": {"causal": True, "rotary": False},
    "rotary, no order": {"rotary": True},
    "alibi": {"causal": True, "alibi": True},
    "alibi, no order": {"alibi": True},
    "soft cap": {"softcap": 2.0},
}


@pytest.mark.parametrize("name", CACHES)
def test_flash_attn_with_kvcache(name):
    row = dict(CACHES[name])
    batch, capacity, new, q_len = 3, 12, row.pop("new", 2), 2
    held = row.pop("held", torch.tensor([3, 0, 7], dtype=torch.int32))
    rows = torch.tensor([4, 0, 2], dtype=torch.int32) if row.pop("rows", False) else None
    starts = torch.tensor([1, 0, 3], dtype=torch.int32) if row.pop("starts", False) else None
    blocks, rotary, alibi = row.pop("blocks", False), row.pop("rotary", None), row.pop("alibi", False)
    with torch.no_grad():
        q, k, v = (draw(batch, n, heads, 16).detach() for n, heads in ((q_len, 4), (new, 2), (new, 2)))
        cache = [draw(5 if rows is not None else batch, capacity, 2, 16).detach() for _ in range(2)]
    counts = [capacity if held is None else int(held if isinstance(held, int) else held[b]) for b in range(batch)]
    at = rows.tolist() if rows is not None else range(batch)
    given, more = [tensor.clone() for tensor in cache], {}
    for b, place in enumerate(at):
        for tensor in given:
            tensor[place, counts[b] + new :] = float("nan")  # nobody may look there
    if blocks:
        table = torch.randperm(9, dtype=torch.int32).view(3, 3)
        pools = [torch.full((9, 4, 2, 16), float("nan")) for _ in range(2)]
        for pool, tensor in zip(pools, given, strict=True):
            pool[table.long().flatten()] = tensor.view(9, 4, 2, 16)
        given, more["block_table"] = pools, table
    if rotary is not None:
        cos, sin = torch.randn(20, 6), torch.randn(20, 6)
        more |= {"rotary_cos": cos, "rotary_sin": sin, "rotary_interleaved": rotary}
    if alibi:
        more["alibi_slopes"] = torch.rand(4)
    out, lse = flash_attn_with_kvcache(
        q, *given, *((k, v) if new else ()), cache_seqlens=held, cache_batch_idx=rows, cache_leftpad=starts,
        **theirs(row), **more, return_softmax_lse=True,
    )  # fmt: skip
    ordered = row.get("causal", False) or "window" in row
    for b, place in enumerate(at):
        end = counts[b] + new
        k_all, v_all = (tensor[place].double().clone() for tensor in cache)
        query, key = q[b], k[b]
        if rotary is not None:
            key = rotate(key, cos, sin, torch.arange(counts[b], end), rotary)
            steps = torch.arange(q_len) if ordered else torch.zeros(q_len, dtype=torch.long)
            query = rotate(query, cos, sin, counts[b] + steps, rotary)
        k_all[counts[b] : end], v_all[counts[b] : end] = key.double(), v[b].double()
        slopes = more.get("alibi_slopes")
        first = 0 if starts is None else int(starts[b])
        want, want_lse = definition(query, k_all[:end], v_all[:end], first=first, slopes=slopes, **row)
        close(out[b], want), close(lse[b], want_lse)
        for tensor, written in zip(given, (k_all, v_all), strict=True):
            found = tensor[table[b].long()].flatten(0, 1) if blocks else tensor[place]
            close(found[:end], written[:end])


REFUSED = {
    "layout": (lambda q: flash_attn_func(q[0], q, q), r"q: \[batch, length, heads, head_dim\] is needed, got shape"),
    "window": (lambda q: flash_attn_func(q, q, q, window_size=3), "window_size: ints .left, right. are needed, -1 for"),
    "no tensor": (lambda q: flash_attn_func([1], q, q), "q: a tensor is needed, got list"),
    "packed layout": (lambda q: flash_attn_varlen_func(q, q[0], q[0], CU_Q, CU_Q, 9, 9), r"q: \[tokens, heads"),
    "cache too small": (
        lambda q: flash_attn_with_kvcache(q, q.clone(), q.clone(), q, q, cache_seqlens=1),
        "k: 9 new tokens do not fit behind .1, 1. in a cache for 9",
    ),
    "no place": (lambda q: flash_attn_with_kvcache(q, q, q, q, q), "cache_seqlens: it must be given with k and v"),
    "k alone": (lambda q: flash_attn_with_kvcache(q, q, q, q, cache_seqlens=0), "k, v: both are needed"),
    "two ways": (
        lambda q: flash_attn_with_kvcache(q, q, q, cache_batch_idx=CU_Q[:2], block_table=CU_Q[None]),
        "block_table, cache_batch_idx: only one",
    ),
    "rows": (lambda q: flash_attn_with_kvcache(q, q[:1], q[:1]), "k_cache: 2 rows are needed for a batch of 2, got 1"),
    "lengths": (lambda q: flash_attn_with_kvcache(q, q, q, cache_seqlens=CU_Q), r"a number or int32 \[2\] is needed"),
    "rotary": (
        lambda q: flash_attn_with_kvcache(q, q, q, rotary_cos=torch.ones(9, 16)), "rotary_cos, rotary_sin: both",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_are_sentences(name):
    call, text = REFUSED[name]
    with pytest.raises((TypeError, ValueError), match=text):
        call(torch.randn(2, 9, 4, 16))


def test_nothing_is_recorded_for_deterministic_algorithms():
    q = draw(1, 4, 2, 16)
    torch.use_deterministic_algorithms(True)
    try:
        torch.autograd.grad(flash_attn_func(q, q, q, deterministic=False).sum(), q)
    finally:
        torch.use_deterministic_algorithms(False)


INSIDE = {
    "full": (None, {}),
    "causal": (Causal(), {"causal": True}),
    "window": (Window(2, 0), {"window": (2, 0)}),
    "both": (Window(2, 3) & Causal(), {"window": (2, 0)}),
}


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("kind", [torch.int32, torch.int64])
@pytest.mark.parametrize("name", INSIDE)
def test_varlen_attention(name, kind, backend):
    mask, options = INSIDE[name]
    q, k, v = draw(11, 4, 16), draw(14, 2, 16), draw(14, 2, 8)  # two tokens of each behind the last sequence
    cu_q, cu_k = CU_Q.to(kind), CU_K.to(kind)
    out, lse = varlen_attention(q, k, v, cu_q, cu_k, mask=mask, return_lse=True, backend=backend)
    assert out.shape == (11, 4, 8) and lse.shape == (4, 11)
    want, want_lse = by_sequence(q, k, v, cu_q, cu_k, options)
    close(out[:9], want), close(lse[:, :9], want_lse)
    assert not out[9:].any() and torch.isneginf(lse[:, 9:]).all()
    for have, need in zip(*(torch.autograd.grad(o.square().sum(), (q, k, v)) for o in (out, want)), strict=True):
        close(have, need.double())
    assert torch.equal(varlen_attention(q, q, q, cu_q), varlen_attention(q, q, q, cu_q, cu_q, mask=Full()))


def test_varlen_attention_of_nothing():
    q = torch.randn(0, 2, 8)
    for cu in ([0], [0, 0, 0]):
        assert varlen_attention(q, q, q, torch.tensor(cu)).shape == (0, 2, 8)
    k = torch.randn(3, 2, 8)
    assert not varlen_attention(k, k, k, torch.tensor([0])).any()


def test_varlen_attention_compiles_in_one_graph():
    def step(q, k, v, cu_q, cu_k):
        return varlen_attention(q, k, v, cu_q, cu_k, mask=Causal())

    given = (torch.randn(9, 4, 16), torch.randn(12, 2, 16), torch.randn(12, 2, 16), CU_Q, CU_K)
    torch._dynamo.reset()
    close(torch.compile(step, fullgraph=True, backend="aot_eager")(*given), step(*given).double())


@pytest.mark.parametrize(
    "call, text",
    [
        (lambda q: varlen_attention(q[None], q, q, CU_Q), r"query: packed tokens \[tokens, heads, head_dim\]"),
        (lambda q: varlen_attention(q, 3, q, CU_Q), "key: a tensor is needed, got int"),
        (lambda q: varlen_attention(q, q, q, CU_Q, CU_Q[:3]), "cu_q and cu_kv must both be"),
        (lambda q: varlen_attention(q, q, q, CU_Q.flip(0)), "must start at 0 and never decrease"),
        (lambda q: varlen_attention(q, q, q, CU_Q, mask=Lengths(CU_Q)), "inside must be made of Full, Causal"),
        (lambda q: varlen_attention(q[:8], q, q, CU_Q, CU_Q), "cu_q ends at 9, and there are 8 tokens"),
        (lambda q: varlen_attention(q, q[:5], q[:5], CU_Q, CU_Q), "cu_kv ends at 9, and there are 5 tokens"),
        (lambda q: flash_attn_varlen_func(q[:4], q, q, CU_Q, CU_Q, 9, 9), "cu_q ends at 9, and there are 4 tokens"),
    ],
    ids=["rank", "kind", "sequences differ", "order", "mask", "too few queries", "too few keys", "flash-attn's"],
)
def test_varlen_attention_refuses_in_sentences(call, text):
    with pytest.raises((TypeError, ValueError), match=text):
        call(torch.randn(9, 2, 8))


def test_chunks_inside_sequences():
    q = draw(9, 4, 16)
    out = varlen_attention(q, q, q, CU_Q, mask=Chunked(2))
    first = definition(q[3:5], q[3:5], q[3:5])[0]
    close(out[3:5], first)
