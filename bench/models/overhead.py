"""What the way in costs: the host's time for a module, a patch or an interface, over the function behind it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn

import fastattn
from fastattn.nn import MultiheadAttention

ROUNDS, CALLS = 31, 100
HEADS, DIM = 2, 8
Call = Callable[[], object]


@dataclass(frozen=True)
class Overhead:
    """One way in, the function it leads to, and a call's microseconds of each in every round, taken in turn."""

    way: str
    bare: str
    way_us: list[float] = field(default_factory=list)
    bare_us: list[float] = field(default_factory=list)

    @property
    def more_us(self) -> float:
        """What the way costs over the function: the median over the rounds."""
        return statistics.median(way - bare for way, bare in zip(self.way_us, self.bare_us, strict=True))

    @property
    def interval_us(self) -> tuple[float, float]:
        """Where the middle 60% of the rounds lie."""
        more = sorted(way - bare for way, bare in zip(self.way_us, self.bare_us, strict=True))
        fifth = len(more) // 5
        return more[fifth], more[-1 - fifth]


def measured(rounds: int = ROUNDS, calls: int = CALLS) -> list[Overhead]:
    """Every way in, on one query and one key, on a CPU without gradients."""
    found = []
    with torch.no_grad():
        for way, bare, call, plain in _ways():
            row = Overhead(way, bare)
            for each in (call, plain):
                _time(each, calls)  # warms up
            for _ in range(rounds):
                row.bare_us.append(_time(plain, calls))
                row.way_us.append(_time(call, calls))
            found.append(row)
    return found


def _time(call: Call, calls: int) -> float:
    start = time.thread_time()  # of this thread alone, so that who else keeps the machine busy counts little
    for _ in range(calls):
        call()
    return 1e6 * (time.thread_time() - start) / calls


def _ways() -> Iterator[tuple[str, str, Call, Call]]:
    x = torch.randn(1, 1, HEADS * DIM)
    module = MultiheadAttention(HEADS * DIM, HEADS).eval()
    weights = (
        HEADS * DIM, HEADS, module.in_proj_weight, module.in_proj_bias, None, None, False, 0.0,
        module.out_proj.weight, module.out_proj.bias, False,
    )  # fmt: skip
    mha = "fastattn.multi_head_attention_forward"

    def function() -> object:
        return fastattn.multi_head_attention_forward(x, x, x, *weights, need_weights=False)

    yield "fastattn.nn.MultiheadAttention", mha, lambda: module(x, x, x, need_weights=False), function
    replaced = nn.MultiheadAttention(HEADS * DIM, HEADS).eval()
    fastattn.replace_attention(replaced)
    yield "replace_attention(nn.MultiheadAttention)", mha, lambda: replaced(x, x, x, need_weights=False), function
    q = torch.randn(1, HEADS, 1, DIM)
    attention = "fastattn.attention"

    def bare() -> object:
        return fastattn.attention(q, q, q)

    def patched() -> object:
        with fastattn.patch():
            return F.scaled_dot_product_attention(q, q, q)

    yield (
        "fastattn.scaled_dot_product_attention",
        attention,
        lambda: fastattn.scaled_dot_product_attention(q, q, q),
        bare,
    )
    yield "patch() around F.scaled_dot_product_attention", attention, patched, bare
    try:
        from fastattn.integrations import transformers
    except ImportError:
        return
    owner = nn.Module()
    yield (
        "transformers' attention interface",
        attention,
        lambda: transformers.attention_forward(owner, q, q, q, None),
        bare,
    )
