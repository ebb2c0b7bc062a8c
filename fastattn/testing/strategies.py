"""Problems drawn at random, for Hypothesis: `@given(cases())`. Needs the package hypothesis (extra `test`)."""

from __future__ import annotations

from typing import Any

import torch

from fastattn.masks import Causal, Chunked, Dense, Full, Lengths, Mask, Prefix, Segments, Window
from fastattn.testing.cases import LAYOUTS, Case

CLOSED_FORMS = ("Full", "Causal", "Window", "Lengths")
ALL_FORMS = (*CLOSED_FORMS, "Chunked", "Prefix", "Segments", "Dense")


def cases(
    max_len: int = 200,
    *,
    masks: tuple[str, ...] = ALL_FORMS,
    unions: bool = True,
    features: bool = True,
    max_dim: int = 48,
) -> Any:
    """A strategy of `testing.Case`.

    Args:
        max_len: lengths are drawn from 0 to this many tokens.
        masks: the classes that masks and their combinations are made of.
        unions: combine by `|` too, not only `&`.
        features: draw bias, soft cap, sinks, dropout, another value dim; False leaves them out.
        max_dim: head dims are drawn from 1 to this.
    """
    from hypothesis import strategies as st

    @st.composite
    def case(draw: Any) -> Case:
        q_len, kv_len = draw(st.integers(0, max_len)), draw(st.integers(0, max_len))
        batch, group, kv_heads = draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.integers(1, 2))
        heads = group * kv_heads
        dim = draw(st.integers(1, max_dim))
        mask = draw(_masks(st, batch, heads, q_len, kv_len, masks, unions))
        extra: dict[str, Any] = {}
        if features:
            shape = tuple(draw(st.sampled_from((1, size))) for size in (batch, heads, q_len, kv_len))
            extra = {
                "head_dim_v": draw(st.none() | st.integers(1, max_dim)),
                "bias": draw(st.none() | st.just(shape)),
                "softcap": draw(st.none() | st.floats(0.5, 50)),
                "sinks": draw(st.booleans()),
                "dropout_p": draw(st.sampled_from((0.0, 0.0, 0.3, 1.0))),
            }
        return Case(
            "drawn",
            q_len,
            kv_len,
            batch=batch,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=dim,
            dtype=draw(st.sampled_from((torch.float16, torch.bfloat16, torch.float32))),
            layout=draw(st.sampled_from(sorted(LAYOUTS))),
            mask=lambda case, device: mask,
            **extra,
        )

    return case()


def _masks(st: Any, batch: int, heads: int, q_len: int, kv_len: int, names: tuple[str, ...], unions: bool) -> Any:
    """Masks of one problem's sizes: single ones, and up to three of them combined."""
    reach = st.none() | st.integers(0, kv_len + 3)
    placed = {
        "align": st.sampled_from(("bottom-right", "top-left")),
        "offset": st.none() | st.integers(-5, kv_len + 5) | _ints(st, batch, -5, kv_len + 5),
    }
    single = {
        "Full": st.builds(Full),
        "Causal": st.builds(Causal, **placed),
        "Window": st.builds(Window, reach, reach, **placed),
        "Chunked": st.builds(
            Chunked, st.integers(1, 40), st.none() | st.integers(0, 3), st.none() | st.integers(0, 3), **placed
        ),
        "Lengths": st.builds(
            Lengths,
            _ints(st, batch, 0, kv_len + 2),
            q_lengths=st.none() | _ints(st, batch, 0, q_len + 2),
            kv_starts=st.none() | _ints(st, batch, 0, kv_len + 2),
        ),
        "Prefix": st.builds(Prefix, _ints(st, batch, 0, kv_len + 2), **placed),
        "Segments": st.builds(_segments, st.just(batch), st.just(q_len), st.just(kv_len), st.integers(0, 2**31)),
        "Dense": st.builds(
            _table,
            st.sampled_from(((1, 1), (batch, 1), (batch, heads))),
            st.just((q_len, kv_len)),
            st.integers(0, 2**31),
        ),
    }
    atoms = st.one_of(*(single[name] for name in names))

    def combine(inner: Any) -> Any:
        both = st.builds(lambda a, b: a & b, inner, inner)
        return both | st.builds(lambda a, b: a | b, inner, inner) if unions else both

    return st.recursive(atoms, combine, max_leaves=3)


def _ints(st: Any, batch: int, low: int, high: int) -> Any:
    return st.lists(st.integers(low, high), min_size=batch, max_size=batch).map(torch.tensor)


def _segments(batch: int, q_len: int, kv_len: int, seed: int) -> Mask:
    generator = torch.Generator().manual_seed(seed)
    q_ids, kv_ids = (torch.randint(-1, 3, (batch, length), generator=generator) for length in (q_len, kv_len))
    return Segments(q_ids, kv_ids)


def _table(shape: tuple[int, int], sizes: tuple[int, int], seed: int) -> Mask:
    return Dense(torch.rand(*shape, *sizes, generator=torch.Generator().manual_seed(seed)) < 0.5)
