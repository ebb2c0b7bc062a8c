"""Keys and values in blocks, read in place by the kernels in the simulator: every size of a block, every mask that a
cache can carry, junk in all that is not held.
"""

import dataclasses

import pytest
import torch

from fastattn import KVCache, attention
from fastattn.backends import cuda
from fastattn.cache.base import placed
from fastattn.masks import Causal, Chunked, Dense, Prefix, Window
from fastattn.masks.paged import Paged
from fastattn.spec import AttnInputs, AttnSpec
from fastattn.testing import HALF, Case, check_close
from fastattn.testing.nan_padding import in_blocks

SIZES = (1, 3, 16, 48, 64, 128, 256)
HELD = (290, 129, 0)
DECODE = Case("decode", 1, 300, 3, 4, 2, 128)
PREFILL = Case("prefill", 70, 300, 3, 4, 2, 64, dtype=torch.float16)


def same(left, right):
    for name in left:
        assert torch.equal(left[name], right[name]), name


def offsets(q_len):
    return torch.tensor(HELD) - q_len


@pytest.mark.parametrize("heads_in_rows", [False, True], ids=["heads-first", "heads-within-rows"])
@pytest.mark.parametrize("case", [DECODE, PREFILL], ids=lambda case: case.id)
@pytest.mark.parametrize("size", SIZES)
def test_blocks_of_any_size_are_read_in_place(size, case, heads_in_rows, backend, monkeypatch):
    whole, paged = in_blocks(case, Causal(offset=offsets(case.q_len)), HELD, size, heads_in_rows=heads_in_rows)
    monkeypatch.setattr(Paged, "laid_out", None)  # what would copy them
    results = backend.forward(paged)
    check_close(whole, results)
    same(results, backend.forward(paged, seed=1))
    same(results, backend.forward(paged, fixed_order=True))


MASKS = {
    "none": lambda q: None,
    "window": lambda q: Window(90, 0, offset=offsets(q)),
    "chunked": lambda q: Chunked(50, 1, offset=offsets(q)) & Causal(offset=offsets(q)),
    "prefix": lambda q: Prefix(torch.tensor([40, 129, 7]), offset=offsets(q)),
    "two-intervals": lambda q: Window(30, 0, offset=offsets(q)) | Window(2, 1, align="top-left"),
    "table": lambda q: Dense(torch.arange(300) % 7 != 2),
}


@pytest.mark.parametrize("q_len", [1, 9], ids=str)
@pytest.mark.parametrize("name", MASKS)
def test_masks_of_a_cache(name, q_len, backend):
    case = dataclasses.replace(PREFILL, q_len=q_len, head_dim=96, head_dim_v=80)
    whole, paged = in_blocks(case, MASKS[name](q_len), HELD, 20)  # 300 is whole blocks: a table fits
    results = backend.forward(paged)
    check_close(whole, results)
    same(results, backend.forward(paged, seed=1))


@pytest.mark.parametrize("width", [(64, 64), (96, 96), (128, 128), (192, 128), (192, 192), (256, 256)], ids=str)
@pytest.mark.parametrize("size", [12, 64])
def test_features_at_every_width(width, size, backend):
    case = Case("features", 5, 300, 3, 4, 2, *width, dtype=HALF, bias=(3, 1, 5, 300), softcap=9.0, sinks=True)
    whole, paged = in_blocks(case, Causal(offset=offsets(5)), HELD, size)
    check_close(whole, backend.forward(paged))
    plain = dataclasses.replace(case, bias=None, softcap=None, sinks=False)
    whole, paged = in_blocks(plain, None, HELD, size)
    check_close(whole, backend.forward(paged))


@pytest.mark.parametrize("size", [1, 16, 48, 256])
@pytest.mark.parametrize("q_len", [1, 150])
def test_every_access_is_ordered(size, q_len, checked):
    case = Case("checked", q_len, 300, 2, 4, 2, 128, dtype=HALF)
    whole, paged = in_blocks(case, None, HELD[:2], size)
    check_close(whole, checked.forward(paged, seed=3))


def test_entries_that_are_seen_are_clamped_to_the_pool(backend):
    """As everywhere: what is wrong in a table reads some block, never beyond the pool."""
    _, paged = in_blocks(DECODE, None, HELD, 16)
    inputs = paged.inputs._replace(
        **{name: torch.nan_to_num(getattr(paged.inputs, name), nan=0.5) for name in ("key", "value")}
    )
    table = paged.mask.table.clone()
    table[0, 2], table[0, 5], table[1, 0] = -7, 2**30, len(inputs.key)
    mask = dataclasses.replace(paged.mask, table=table)
    key, value = (mask.laid_out(pool) for pool in inputs[1:3])
    whole = dataclasses.replace(paged, inputs=inputs._replace(key=key, value=value), mask=mask.inside)
    check_close(whole, backend.forward(dataclasses.replace(paged, inputs=inputs, mask=mask)))


def test_one_block_and_no_other(backend):
    """A pool of one block: its axis repeats."""
    case = Case("one", 1, 7, 1, 2, 1, 64, dtype=HALF)
    whole, paged = in_blocks(case, None, (7,), 7)
    block = paged.mask.table[0, 0]
    inputs = paged.inputs._replace(key=paged.inputs.key[block][None], value=paged.inputs.value[block][None])
    check_close(whole, backend.forward(dataclasses.replace(paged, inputs=inputs)))


POOLS = {
    "every-second-column": lambda pool: torch.stack([pool, pool], -1).flatten(-2)[..., ::2],
    "off-by-one": lambda pool: torch.cat([pool[..., :1], pool], -1)[..., 1:],
    "negative": lambda pool: torch._neg_view(-pool),
}


@pytest.mark.parametrize("name", POOLS)
def test_pools_that_the_copy_engine_cannot_read_are_laid_out(name, backend):
    whole, paged = in_blocks(DECODE, None, HELD, 16)
    inputs = paged.inputs._replace(**{each: POOLS[name](getattr(paged.inputs, each)) for each in ("key", "value")})
    check_close(whole, backend.forward(dataclasses.replace(paged, inputs=inputs)))


def test_heads_of_odd_widths_are_left_to_others():
    """A pool is as large as memory: rows that the copy engine cannot take would be copied at every call."""
    _, paged = in_blocks(dataclasses.replace(DECODE, head_dim=20), None, HELD, 16)
    assert "heads of 20 and 20 in blocks" in cuda.feature_reason(dataclasses.replace(paged.spec, needs_grad=False))


@pytest.mark.parametrize("make", [
    lambda: KVCache.paged(2, 2, 64, blocks=40, block_size=16, dtype=HALF),
    lambda: KVCache.paged(2, 2, 64, blocks=400, block_size=1, dtype=HALF),
], ids=["16", "1"])  # fmt: skip
def test_a_cache_decodes(make, backend):
    """Through KVCache's own spec: what `attention` gives the backends."""
    cache, generator = make(), torch.Generator().manual_seed(0)
    draw = lambda heads, n: torch.randn(2, heads, n, 64, generator=generator).to(HALF)
    for new in (37, 1, 1, 100, 1):
        cache.update(draw(2, new), draw(2, new), new_lengths=[new, max(new // 2, 1)])
        query = draw(4, new)
        key, value, mask = placed(query, cache.key, cache.value, Causal())
        inputs = AttnInputs(query, key, value)
        out, lse = cuda.run(backend.library, AttnSpec.of(inputs, mask=mask), inputs)
        want, want_lse = attention(query, cache.key, cache.value, mask=Causal(), backend="reference", return_lse=True)
        torch.testing.assert_close(out, want, atol=2e-2, rtol=2e-2)
        torch.testing.assert_close(lse, want_lse, atol=1e-3, rtol=1e-3)
