"""Plans are met again by their key: what a key finds must be what would be made anew, whatever has changed."""

import itertools
import random

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from fastattn.backends import triton as backend
from fastattn.kernels.host import launch, mask_lowering, run
from fastattn.masks import Causal, Chunked, Dense, Lengths, Packed, Prefix, Segments, Window
from fastattn.masks.paged import Paged
from fastattn.spec import AttnInputs, AttnSpec

BF16, F32 = torch.bfloat16, torch.float32
CALLS = 600
"""Of each target. A call differs from the one before in a few draws, so that keys come again."""


class Draws:
    """Choices that are mostly those of the last time."""

    def __init__(self, seed):
        self.random, self.last, self.place = random.Random(seed), [], 0

    def begin(self, anew):
        self.last, self.place = [] if anew else self.last, 0

    def __call__(self, *options):
        if self.place == len(self.last) or self.random.random() < 0.05:
            self.last[self.place : self.place + 1] = [self.random.random()]
        self.place += 1
        return options[int(self.last[self.place - 1] * len(options))]


LAYOUTS = {
    "contiguous": lambda *shape, **how: torch.zeros(*shape, **how),
    "heads after the length": lambda b, h, n, d, **how: torch.zeros(b, n, h, d, **how).transpose(1, 2),
    "rows apart": lambda b, h, n, d, **how: torch.zeros(b, h, n, d + 8, **how)[..., :d],
    "odd rows": lambda b, h, n, d, **how: torch.zeros(b, h, n, d + 1, **how)[..., :d],
    "odd address": lambda *shape, **how: (
        torch.zeros(shape[0] + 1, *shape[1:], **how).flatten()[3:][: torch.Size(shape).numel()].view(shape)
    ),
    "one for all heads": lambda b, h, n, d, **how: torch.zeros(b, 1, n, d, **how).expand(b, h, n, d),
}


def mask_of(draw, batch, heads, q_len, kv_len):
    def ints(most):
        numbers = torch.randint(0, most + 1, (draw(1, batch) + 1,), dtype=draw(torch.int32, torch.int64))
        return numbers[1:] if draw(True, False) else numbers[:-1]

    def alone():
        ids = lambda n: torch.randint(0, 3, (draw(1, batch), n)).sort()[0]
        return draw(
            lambda: Causal(offset=draw(None, 0, 3)),
            lambda: Window(draw(0, 4, None), draw(0, 4)),
            lambda: Chunked(draw(4, 16), draw(0, 1)),
            lambda: Causal(offset=ints(5)),
            lambda: Lengths(ints(kv_len), draw(None, ints(q_len).expand(batch).contiguous())),
            lambda: Prefix(ints(kv_len)),
            lambda: Segments(ids(q_len), ids(kv_len), sorted=draw(True, False)),
            lambda: Dense(torch.rand(draw(1, batch), draw(1, heads), q_len, kv_len) < 0.5),
            lambda: Packed(torch.tensor([0, q_len]), torch.tensor([0, kv_len])) if batch == 1 else Causal(),
        )()

    return draw(lambda: None, alone, lambda: alone() & alone(), lambda: alone() | alone())()


def draw_call(draw):
    """spec, inputs, d_out, d_lse and whether the bias's gradient is wanted."""
    batch, kv_heads, group = draw(1, 2), draw(1, 2), draw(1, 4)
    q_len, kv_len, dim, dtype = draw(0, 1, 16, 65), draw(16, 65, 2000), draw(64, 80), draw(BF16, BF16, F32)
    heads, lay = kv_heads * group, lambda *shape: LAYOUTS[draw(*LAYOUTS)](*shape, dtype=dtype)
    mask, keys = mask_of(draw, batch, heads, q_len, kv_len), (batch, kv_heads, kv_len)
    if draw(*[False] * 3, True):
        table = torch.zeros(batch, kv_len // 16 + draw(0, 2), dtype=torch.int32)[:, : kv_len // 16]
        inside = mask_of(draw, batch, heads, q_len, kv_len // 16 * 16)
        mask, keys = Paged(inside or Causal(), table, 16), (draw(3, 8), kv_heads, 16)
    paged = isinstance(mask, Paged)
    bias = draw(None, None, (1, heads, q_len, 1), (batch, 1, 1, kv_len), (q_len, kv_len)) if not paged else None
    dropout_p = draw(0.0, 0.0, 0.1)
    inputs = AttnInputs(
        lay(batch, heads, q_len, dim),
        lay(*keys, dim),
        lay(*keys, draw(dim, 64)),
        None if bias is None else torch.zeros(bias, dtype=draw(dtype, F32)),
        draw(None, None, torch.zeros(heads)),
        torch.zeros(1, dtype=torch.int64) if dropout_p else None,
    )
    spec = AttnSpec.of(inputs, mask=mask, scale=draw(None, 0.5, -1.0), softcap=draw(None, 9.0), dropout_p=dropout_p)
    d_out = lay(batch, heads, q_len, spec.head_dim_v)
    return spec, inputs, d_out, draw(None, torch.zeros(batch, heads, q_len)), draw(True, False)


def told(plan):
    """A plan by value."""
    return [each._replace(kernel=each.kernel.__name__) for each in plan.launches], plan.splits, plan.reads_mask


@pytest.mark.parametrize("target", ["sm90", "sm80"])
def test_a_plan_that_is_met_again_is_the_one_that_would_be_made(target, monkeypatch):
    """And the tensors that it lowers anew, block lists too, have the dtypes and alignments of the first time."""
    counts = {"again": 0, "new": 0}

    class Compared(run.ReadyPlan):
        def __init__(self, plan):
            super().__init__(plan)
            self.first = None

        def run(self, spec, tensors, addresses):
            make = launch.plan_backward if "d_out" in tensors else launch.plan_forward
            assert told(self.plan) == told(make(spec, tensors, target))
            more = self.plan.more_tensors(spec, tensors)
            lists = [each.launch.block_lists(spec) for each in self.launches]
            every = [*(tensors | more).items(), *itertools.chain(*(each.items() for each in lists))]
            now = [(name, each.dtype, each.data_ptr() % 16 == 0) for name, each in every]
            counts["new" if self.first is None else "again"] += 1
            assert self.first in (None, now)
            self.first = now

    monkeypatch.setattr(run, "ReadyPlan", Compared)
    monkeypatch.setattr(run, "_PLANS", {})
    monkeypatch.setattr(launch, "target_for", lambda device: target)
    monkeypatch.setattr(mask_lowering, "_MADE", type(mask_lowering._MADE)())
    draw = Draws(seed=len(target))
    for turn in range(CALLS):
        draw.begin(anew=turn % 12 == 0)
        spec, inputs, d_out, d_lse, wants_dbias = draw_call(draw)
        out, lse = backend.forward(spec, inputs)
        if spec.pages is None:
            backend.backward(spec, inputs, out, lse, d_out, d_lse, wants_dbias=wants_dbias)
    assert counts["again"] > CALLS / 4 and counts["new"] > CALLS / 4
