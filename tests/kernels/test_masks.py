"""The conformance test: every Triton rule against the mask's table, by element and by tile, forward and mirrored."""

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed")

import triton.language as tl  # noqa: E402

from fastattn import dispatch  # noqa: E402
from fastattn.kernels import masks as rules  # noqa: E402
from fastattn.kernels.tiles import walk  # noqa: E402
from fastattn.masks import Causal, Full, Lengths, Window  # noqa: E402
from fastattn.spec import AttnInputs, AttnSpec  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BATCH = 2
LENGTHS = ((1, 1), (5, 5), (37, 53), (53, 37), (33, 1), (1, 40))
BLOCKS = ((16, 16), (32, 16), (16, 32))


def ints(*values):
    return torch.tensor(values, device=DEVICE)


def some(n):
    return ints(n // 2, n)


def zoo(q_len, kv_len):
    """Every class with a rule, in every form, and intersections."""
    return {
        "full": Full(),
        "causal": Causal(),
        "causal-top-left": Causal(align="top-left"),
        "causal-offset": Causal(offset=-3),
        "causal-far": Causal(offset=2**40),
        "causal-offsets": Causal(offset=ints(7, -50)),
        "causal-offset-shared": Causal(offset=ints(4)),
        "window": Window(5, 2),
        "window-0": Window(0, 0),
        "window-17": Window(17, 0, align="top-left"),
        "window-40": Window(40, 40),
        "window-open-left": Window(None, 3),
        "window-open-right": Window(3, None),
        "window-open": Window(None, None),
        "window-far": Window(2**35, 3),
        "window-outside": Window(1, 1, offset=500),
        "window-offsets": Window(9, 1, offset=ints(20, -4)),
        "window-offsets-far": Window(None, 2, offset=ints(2**63 - 1, -(2**63))),
        "lengths": Lengths(some(kv_len)),
        "lengths-32": Lengths(some(kv_len).int()),
        "lengths-0": Lengths(ints(0, 1)),
        "lengths-beyond": Lengths(ints(1000, 3)),
        "lengths-all": Lengths(some(kv_len), q_lengths=some(q_len), kv_starts=ints(2, kv_len // 3)),
        "lengths-shared": Lengths(ints(kv_len // 2)),
        "causal-lengths": Causal() & Lengths(some(kv_len), q_lengths=some(q_len)),
        "causal-window-lengths": Causal(offset=ints(3, 9))
        & Window(11, 4)
        & Lengths(some(kv_len), kv_starts=ints(1, 0)),
    }


ZOO = sorted(zoo(4, 4))


@triton.jit
def conformance_kernel(
    table_ptr, spans_ptr, q_len, kv_len, mask_args, MASK: tl.constexpr, MIRROR: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Writes the whole table by `keep`, and each tile's span, raw and cut into edge, full, edge."""
    batch, tile = tl.program_id(1), tl.program_id(0)
    numbers = rules.read_numbers(MASK, mask_args, batch, q_len, kv_len)
    if MIRROR:
        lo = tile * BLOCK_N
        span = rules.q_span(MASK, lo, tl.minimum(lo + BLOCK_N, kv_len), numbers)
        cut = walk(span, BLOCK_M)
    else:
        lo = tile * BLOCK_M
        span = rules.kv_span(MASK, lo, tl.minimum(lo + BLOCK_M, q_len), numbers)
        cut = walk(span, BLOCK_N)
        q_idx = lo + tl.arange(0, BLOCK_M)
        for start_n in range(0, kv_len, BLOCK_N):
            kv_idx = start_n + tl.arange(0, BLOCK_N)
            kept = rules.keep(MASK, q_idx[:, None], kv_idx[None, :], numbers)
            inside = (q_idx < q_len)[:, None] & (kv_idx < kv_len)[None, :]
            at = table_ptr + (batch * q_len + q_idx)[:, None] * kv_len + kv_idx[None, :]
            tl.store(at, kept.to(tl.int8), mask=inside)
    spans_ptr += (batch * tl.num_programs(0) + tile) * 8
    for n in tl.static_range(4):
        tl.store(spans_ptr + n, span[n])
        tl.store(spans_ptr + 4 + n, cut[n])


def run(mask, q_len, kv_len, block_m, block_n, mirror):
    query, key = (torch.empty(BATCH, 1, length, 16, device=DEVICE) for length in (q_len, kv_len))
    lowered, args = rules.lower(AttnSpec.of(AttnInputs(query, key, key), mask=mask))
    tiles = triton.cdiv(kv_len, block_n) if mirror else triton.cdiv(q_len, block_m)
    table = torch.full((BATCH, q_len, kv_len), -1, dtype=torch.int8, device=DEVICE)
    spans = torch.full((BATCH, tiles, 8), -(2**31), dtype=torch.int32, device=DEVICE)
    conformance_kernel[(tiles, BATCH)](
        table, spans, q_len, kv_len, args, MASK=lowered, MIRROR=mirror, BLOCK_M=block_m, BLOCK_N=block_n
    )
    return table, spans.tolist()


@pytest.mark.parametrize(("block_m", "block_n"), BLOCKS, ids=str)
@pytest.mark.parametrize("name", ZOO)
def test_rules_agree_with_the_table(name, block_m, block_n):
    for q_len, kv_len in LENGTHS:
        mask = zoo(q_len, kv_len)[name]
        table = mask.dense(q_len, kv_len, device=DEVICE).expand(BATCH, 1, q_len, kv_len)[:, 0]
        kept, spans = run(mask, q_len, kv_len, block_m, block_n, mirror=False)
        assert torch.equal(kept, table.to(torch.int8)), (q_len, kv_len)
        hold(table, spans, block_m, block_n)
        _, mirrored = run(mask, q_len, kv_len, block_m, block_n, mirror=True)
        hold(table.mT, mirrored, block_n, block_m)


def hold(table, spans, block_rows, block_columns):
    """Nothing visible outside a span, everything visible inside its full part, and tiles that cover it exactly once."""
    for batch, tiles in enumerate(spans):
        for tile, (lo, full_lo, full_hi, hi, *cut) in enumerate(tiles):
            rows = table[batch, tile * block_rows : (tile + 1) * block_rows]
            width = rows.shape[1]
            seen = rows.any(0)
            assert not seen[: max(lo, 0)].any()
            assert not seen[max(hi, 0) :].any()
            assert rows[:, max(full_lo, 0) : max(full_hi, 0)].all()
            edge_lo, cut_lo, cut_hi, edge_hi = cut
            visited = torch.zeros(width + 2 * block_columns, dtype=torch.int32, device=table.device)
            for begin, end, full in ((edge_lo, cut_lo, False), (cut_lo, cut_hi, True), (cut_hi, edge_hi, False)):
                for start in range(begin, end, block_columns):
                    assert start % block_columns == 0
                    visited[start : start + block_columns] += 1
                    if full:
                        assert start + block_columns <= width
                        assert rows[:, start : start + block_columns].all()
            assert visited.max() <= 1
            assert visited[:width][seen].eq(1).all()


@pytest.mark.parametrize("name", ["causal", "window", "lengths-all"])
def test_the_conformance_test_sees_a_wrong_rule(name, monkeypatch):
    """Any one of a rule's functions replaced by another rule's is noticed."""
    kind = {"causal": "Causal", "window": "Window", "lengths-all": "Lengths"}[name]
    arguments, rule = rules.RULES[kind]
    for function in ("keep", "kv_span", "q_span"):
        wrong = rule._replace(**{function: WRONG[function]})
        monkeypatch.setitem(rules.RULES, kind, (arguments, wrong))
        with pytest.raises(AssertionError):
            test_rules_agree_with_the_table(name, 16, 16)


@triton.jit
def _wrong_keep(q_idx, kv_idx, numbers):
    return kv_idx <= q_idx + 1


@triton.jit
def _wrong_span(lo, hi, numbers):
    return lo, lo, hi + 1, hi + 1


WRONG = {"keep": _wrong_keep, "kv_span": _wrong_span, "q_span": _wrong_span}


def test_the_door_lets_in_what_has_a_rule():
    """It names the masks itself, so that a refusal does not import triton."""
    assert ("Full", *rules.RULES) == dispatch.room("triton").MASKS
