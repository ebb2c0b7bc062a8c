"""The forward kernels in the simulator against float64: every mask and feature, every width, random schedules, poisoned
memory, the same bits whatever the schedule.
"""

import dataclasses

import pytest
import torch

from fastattn.backends import cuda
from fastattn.building import cuda_library
from fastattn.masks import Causal, Chunked, Dense, Full, Lengths, Packed, Prefix, Segments, Window
from fastattn.masks.program import INTERVAL, REACH
from fastattn.testing import CASES, Case, check_close, make_inputs, with_dtype
from fastattn.testing.nan_padding import PADDED, hidden_pair, with_junk

HALVES = (torch.bfloat16, torch.float16)
WIDTHS = ((64, 64), (96, 96), (128, 128), (192, 128), (192, 192), (256, 256))


def same(left, right):
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


@pytest.mark.parametrize("dtype", HALVES, ids=["bf16", "fp16"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_every_row_is_within_the_tolerance_and_keeps_its_bits_under_any_schedule(case, dtype, backend):
    bias_dtype = torch.float32 if case.bias_dtype == torch.float32 else dtype
    problem = make_inputs(dataclasses.replace(with_dtype(case, dtype), bias_dtype=bias_dtype))
    results = backend.forward(problem)
    check_close(problem, results)
    same(results, backend.forward(problem, seed=1))
    same(results, backend.forward(problem, fixed_order=True))


MASKS = {
    "full": lambda q, kv: None,
    "causal": lambda q, kv: Causal(),
    "window": lambda q, kv: Window(40, 7),
    "lengths": lambda q, kv: Lengths(torch.tensor([kv - 40]), torch.tensor([q - 3]), torch.tensor([70])),
    "chunked": lambda q, kv: Chunked(50, 1, offset=torch.tensor([30])),
    "prefix": lambda q, kv: Prefix(torch.tensor([90])),
    "segments": lambda q, kv: Segments(torch.arange(q)[None] * 3 // q, torch.arange(kv)[None] * 3 // kv, sorted=True),
    "packed": lambda q, kv: Packed(torch.tensor([0, 50, q]), torch.tensor([0, 90, kv - 9])),
    "two-intervals": lambda q, kv: Window(30, 0) | Lengths(torch.tensor([4])),
    "scattered": lambda q, kv: Segments(torch.arange(q)[None] % 3, torch.arange(kv)[None] % 3),
    "table": lambda q, kv: Dense(torch.arange(kv)[None] * 5 % (torch.arange(q)[:, None] + 2) < 40),
    "joined": lambda q, kv: Dense(torch.arange(kv) % 7 != 2) & (Window(90, 5) | Chunked(64)) & Causal(),
}
"""By (q_len, kv_len): every way to walk the keys, several tiles a side."""


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("width", WIDTHS, ids=lambda pair: "x".join(map(str, pair)))
def test_every_mask_at_every_width(width, mask, backend):
    """Odd lengths of several tiles a side, narrower heads than the kernel's, more tiles than blocks."""
    dtype = HALVES[list(MASKS).index(mask) % 2]
    head_dim, head_dim_v = width[0] - 8 * (width[0] > 64), width[1]
    q_len, kv_len = 203, 391
    case = Case(mask, q_len, kv_len, 1, 2, 1, head_dim, head_dim_v, dtype, lambda *_: MASKS[mask](q_len, kv_len))
    problem = make_inputs(case)
    results = backend.forward(problem)
    check_close(problem, results)
    same(results, backend.forward(problem, seed=1))


LARGE_OFFSETS = torch.tensor([2**40, -(2**40)])
REACHES = {
    "offsets": lambda: Causal(offset=torch.tensor([170, 30])),
    "offsets-int32": lambda: Window(60, 3, offset=torch.tensor([170, -100], dtype=torch.int32)),
    "one-of-a-batch": lambda: Causal(offset=torch.tensor([200])) & Lengths(torch.tensor([280])),
    "held": lambda: (
        Window(90, 0, offset=torch.tensor([97, 30]))
        & Lengths(torch.tensor([300, 233]), kv_starts=torch.tensor([0, 50]))
    ),
    "one-offset": lambda: (lambda offset: Causal(offset=offset) & Window(40, None, offset=offset))(
        torch.tensor([97, 3])
    ),
    "far": lambda: Window(9, None, offset=LARGE_OFFSETS) & Lengths(LARGE_OFFSETS.abs()),
    "far-open": lambda: Window(None, None, offset=LARGE_OFFSETS),
    "scattered-numbers": lambda: Lengths(torch.arange(100, 300).view(2, 100)[:, 5], kv_starts=torch.arange(40)[::20]),
}


@pytest.mark.parametrize("name", REACHES)
def test_what_a_batch_item_sees_needs_no_table(name, backend):
    """Offsets, lengths and starts of a batch are read as they are: nothing is made of them for a call."""
    mask = REACHES[name]()
    found = cuda._launch(make_inputs(Case(name, 203, 300, 2, 2, 1, 64, mask=lambda *_: mask)).spec).mask_program
    assert found.words[0] == REACH and {each.data_ptr() for each in found.tensors} <= {
        each.data_ptr() for each in mask.tensors
    }
    problem = make_inputs(Case(name, 203, 300, 2, 2, 1, 64, mask=lambda *_: mask))
    results = backend.forward(problem)
    check_close(problem, results)
    same(results, backend.forward(problem, seed=1))


def test_two_offsets_at_once_are_a_table(backend):
    mask = Causal(offset=torch.tensor([90, 0])) & Window(20, None, offset=torch.tensor([80, 3]))
    problem = make_inputs(Case("two", 103, 200, 2, 2, 1, 64, mask=lambda *_: mask))
    assert cuda._launch(problem.spec).mask_program.words == [INTERVAL]
    check_close(problem, backend.forward(problem))


def test_uneven_tiles_need_a_counter_and_do_without(backend, monkeypatch):
    """With one, who is ready takes the next; without, each has a block of its own: the same bits."""
    problem = make_inputs(Case("counter", 300, 300, 1, 4, 2, 64, mask=lambda *_: Causal()))
    known, tiles = cuda._launch(problem.spec), cuda_library.Operators.tiles
    assert backend.library.tiles(known.sizes, known.variant, known.by_head, -1).counts
    assert not backend.library.tiles(known.sizes, cuda.PLAIN, known.by_head, -1).counts
    results = backend.forward(problem)
    monkeypatch.setattr(cuda_library.Operators, "tiles", lambda *given: tiles(*given)._replace(counts=0))
    same(results, backend.forward(problem))


@pytest.mark.parametrize("imagined", [1, 8, 200])
@pytest.mark.parametrize("lengths", [(1, 1300), (700, 700)], ids=str)
def test_a_plan_for_another_number_of_blocks_is_carried_out(lengths, imagined, backend, monkeypatch):
    """Of a device with more or fewer multiprocessors, which a process may have beside this one."""
    for mask in (Full(), Causal()):
        problem = make_inputs(Case("imagined", *lengths, 1, 2, 1, 64, mask=lambda *_, mask=mask: mask))
        monkeypatch.setattr(cuda_library.Operators, "multiprocessors", lambda *_: imagined)
        check_close(problem, backend.forward(problem))


FEATURES = Case("features", 150, 330, 1, 4, 2, bias=(1, 4, 150, 330), softcap=9.0, sinks=True, dropout_p=0.2)


@pytest.mark.parametrize("dtype", HALVES, ids=["bf16", "fp16"])
@pytest.mark.parametrize("width", WIDTHS, ids=lambda pair: "x".join(map(str, pair)))
def test_every_feature_at_every_width(width, dtype, backend):
    mask = Causal() & Lengths(torch.tensor([300]))
    case = dataclasses.replace(FEATURES, head_dim=width[0], head_dim_v=width[1], dtype=dtype, mask=lambda *_: mask)
    problem = make_inputs(case)
    check_close(problem, backend.forward(problem, seed=2))


@pytest.mark.parametrize("q_len, kv_len", [(20, 50), (8, 50), (150, 170), (200, 300)], ids=str)
@pytest.mark.parametrize("mask", PADDED)
def test_what_nobody_sees_may_hold_anything(mask, q_len, kv_len, backend):
    """Keys, values and queries that no partner sees, in tiles that are visited and tiles that are not."""
    clean, dirty = hidden_pair(mask, q_len, kv_len, "cpu")
    want = backend.forward(clean)
    same(want, backend.forward(dirty, seed=1))
    check_close(clean, want)


@pytest.mark.parametrize("shape", [(40,), (33, 1), (33, 40), (4, 1, 40)], ids=str)
def test_what_a_bias_hides_from_all_may_hold_anything(shape, backend):
    bias = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    if shape[-1] > 1:
        bias[..., 3:30] = -torch.inf
    if shape[-2:-1] > (1,):
        bias[..., 5, :] = -torch.inf
    clean = make_inputs(Case("bias", 33, 40, 2, 4, 2, bias=shape))
    clean = dataclasses.replace(clean, inputs=clean.inputs._replace(bias=bias))
    dirty = with_junk(clean, (bias > -torch.inf).expand(2, 4, 33, 40))
    want = backend.forward(clean)
    same(want, backend.forward(dirty))
    check_close(clean, want)


def test_a_value_that_is_seen_spreads(backend):
    """Not only to whom it is visible, maybe, but at least to them."""
    problem = make_inputs(Case("seen", 40, 50, mask=lambda *_: Causal() & Lengths(torch.tensor([30, 45]))))
    problem.inputs.value[0, 0, 7] = torch.nan
    out = backend.forward(problem)["out"]
    table = problem.mask.dense(40, 50)[0, 0, :, 7]
    assert out[0, 0][table].isnan().all()
    assert out[1].isfinite().all()


DECODE = (
    Case("one-query", 1, 900, 1, 8, 2, 64),
    Case("few", 5, 900, 1, 8, 2, 128, mask=lambda *_: Causal()),
    Case("lengths", 1, 700, 3, 4, 1, 128, mask=lambda *_: Lengths(torch.tensor([700, 9, 0]))),
    Case("sinks", 3, 900, 1, 6, 2, 64, sinks=True, mask=lambda *_: Window(300, 0)),
    Case("everything", 2, 900, 1, 4, 2, 96, bias=(1, 4, 2, 900), softcap=9.0, dropout_p=0.3, sinks=True),
    Case("groups-left-over", 50, 600, 1, 3, 1, 64),
    Case("table", 4, 900, 1, 2, 2, 64, mask=lambda *_: Dense(torch.arange(900) % 400 < 100)),
    Case("one-head", 33, 900, 1, 1, 1, 192, 128, layout="blhd"),
)


@pytest.mark.parametrize("dtype", HALVES, ids=["bf16", "fp16"])
@pytest.mark.parametrize("case", DECODE, ids=lambda case: case.id)
def test_a_split_walk_is_put_together(case, dtype, backend):
    problem = make_inputs(with_dtype(case, dtype))
    assert backend.splits(problem) > 1
    results = backend.forward(problem)
    check_close(problem, results)
    same(results, backend.forward(problem, seed=1))


STRIDES = {
    "as-it-is": lambda tensor: tensor,
    "heads-last": lambda tensor: tensor.transpose(1, 2).contiguous().transpose(1, 2),
    "columns-first": lambda tensor: tensor.mT.contiguous().mT,
    "every-second": lambda tensor: torch.stack([tensor, tensor], -1).flatten(-2)[..., ::2],
    "off-by-one": lambda tensor: torch.cat([tensor[..., :1], tensor], -1)[..., 1:],
    "one-head": lambda tensor: tensor[:, :1].expand(-1, tensor.shape[1], -1, -1),
    "one-of-a-batch": lambda tensor: tensor[:1].expand(tensor.shape[0], -1, -1, -1),
    "one-row": lambda tensor: tensor[:, :, :1].expand(-1, -1, tensor.shape[2], -1),
    "negative": lambda tensor: torch._neg_view(tensor),
}


@pytest.mark.parametrize("strides", STRIDES)
@pytest.mark.parametrize("dim", [64, 20], ids=["64", "20"])
def test_any_strides(strides, dim, backend):
    problem = make_inputs(Case(strides, 37, 60, 2, 2, 2, dim))
    inputs = problem.inputs._replace(
        **{name: STRIDES[strides](getattr(problem.inputs, name)) for name in ("query", "key", "value")}
    )
    problem = dataclasses.replace(problem, inputs=inputs)
    check_close(problem, backend.forward(problem))


@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("key", range(8))
def test_a_score_that_is_nan_is_seen_whichever_way_it_is_exponentiated(key, width, backend):
    """A share of the exponentials is a polynomial at width 64."""
    problem = make_inputs(Case("nan", 20, 140, 1, 1, 1, width))
    problem.inputs.key[0, 0, 128 + key, 3] = torch.nan
    results = backend.forward(problem)
    assert results["out"].isnan().all() and results["lse"].isnan().all()


@pytest.mark.parametrize("scale", [0.1, 7.9, 64.0])
def test_scales_of_any_size(scale, backend):
    """A product of a large score and its factor has a rounding error of its own: those scores are subtracted first."""
    mask = Window(54, 0, align="top-left")
    problem = make_inputs(Case("scale", 200, 127, 1, 2, 2, 64, dtype=torch.float16, scale=scale, mask=lambda *_: mask))
    check_close(problem, backend.forward(problem))


def test_scores_of_any_size(backend):
    """The maximum is subtracted before the factor, and a bias of -1e30 is padding."""
    problem = make_inputs(Case("large", 40, 70, 1, scale=300.0, bias=(40, 70)))
    problem.inputs.bias[:, 50:] = -1e30
    check_close(problem, backend.forward(problem))
