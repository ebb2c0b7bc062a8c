"""Problems whose first query's scores leave float32's range, and the one answer that every backend gives. Each one's
tests run `check` with a call of their own.

A score below the range, -inf, hides its key, as a mask does: a row of such scores gives out 0 and lse -inf. A score
above it has no weights beside it: out is NaN and lse inf. A soft cap bounds both.
"""

from dataclasses import dataclass, field
from typing import Any

import torch

from fastattn import attention
from fastattn.masks import Dense

HUGE, HEAD_DIM, HEADS = 1e25, 16, 2
SHAPES = {"tiles": (70, 70), "few-queries": (1, 70), "split-keys": (1, 600)}
DTYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class Row:
    """The first query holds HUGE in its first place, the others 0; `keys` there say which scores overflow."""

    id: str
    answer: str  # of the first query: hidden, visible (as the keys with 0 there give it), mean, nan
    keys: tuple[tuple[Any, float], ...]  # (index, number there)
    named: dict[str, Any] = field(default_factory=dict)
    bias: float | None = None  # of the first query
    small: float = 1.0  # the other numbers of the queries are times this


EVERY = slice(None)
ROWS = (
    Row("products-below", "hidden", ((EVERY, -1e14),)),
    Row("products-below-but-some", "visible", ((EVERY, -1e14), (slice(1, None, 3), 0.0))),
    Row("products-below-but-the-last", "visible", ((EVERY, -1e14), (-1, 0.0))),
    Row("products-below-in-the-scale", "hidden", ((EVERY, -1.0),), {"scale": 1e20}, small=1e-20),
    Row("products-below-a-soft-cap", "mean", ((EVERY, -1e14),), {"softcap": 5.0}),
    Row("products-below-with-a-bias", "hidden", ((EVERY, -8e13),), {"scale": 0.25}, bias=-2e38),
    Row("products-below-though-the-scale-is-small", "hidden", ((EVERY, -1e14),), {"scale": 1e-20}, small=1e20),
    Row("a-product-above", "nan", ((3, 1e14),)),
    Row("the-last-product-above", "nan", ((-1, 1e14),)),
    Row("two-products-above", "nan", ((5, 1e14), (-2, 1e14))),
    Row("one-below-and-one-above", "nan", ((5, -1e14), (-2, 1e14))),
    Row("products-above-in-the-scale", "nan", ((EVERY, 1.0),), {"scale": 1e20}, small=1e-20),
    Row("products-above-a-soft-cap", "mean", ((EVERY, 1e14),), {"softcap": 5.0}),
    Row("products-above-with-a-bias", "nan", ((EVERY, 8e13),), {"scale": 0.25}, bias=2e38),
)


def problem(row, q_len, kv_len, dtype, device="cpu"):
    """query, key, value, what `attention` takes besides, and the mask that hides the first row's keys in its place."""
    query, key, value = (torch.randn(1, HEADS, n, HEAD_DIM) for n in (q_len, kv_len, kv_len))
    query *= row.small
    query[..., 0] = 0.0
    query[:, :, 0, 0] = HUGE
    key[..., 0] = 0.0
    for index, number in row.keys:
        key[:, :, index, 0] = number
    keep = torch.ones(q_len, kv_len, dtype=torch.bool)
    if row.answer in ("hidden", "visible", "nan"):
        keep[0] = (key[0, 0, :, 0] == 0) & (row.answer == "visible")
    named = dict(row.named)
    if row.bias is not None:
        named["bias"] = torch.zeros(q_len, kv_len)
        named["bias"][0] = row.bias
    tensors = [each.to(device, dtype).requires_grad_() for each in (query, key, value)]
    named = {name: each.to(device) if isinstance(each, torch.Tensor) else each for name, each in named.items()}
    return tensors, named, Dense(keep.to(device))


def check(row, call, q_len, kv_len, dtype, device="cpu", gradients=True):
    """Run `call(query, key, value, **named)`, which gives out and lse, and compare with a mask in the place of the
    overflow.
    """
    (query, key, value), named, mask = problem(row, q_len, kv_len, dtype, device)
    out, lse = call(query, key, value, **named)
    assert bool((out[:, :, 0].isnan() == (row.answer == "nan")).all())
    if row.answer in ("hidden", "nan"):
        assert bool((lse[:, :, 0] == (torch.inf if row.answer == "nan" else -torch.inf)).all())
    if row.answer == "hidden":
        assert bool((out[:, :, 0] == 0).all())
    loose = {"atol": 2e-2, "rtol": 2e-2} if dtype != torch.float32 else {"atol": 1e-5, "rtol": 1e-4}
    if row.answer == "mean":
        torch.testing.assert_close(out[:, :, 0].float(), value.float().mean(2), **loose)
    safe = query.detach().clone()
    safe[:, :, 0, 0] = 0.0  # the mask hides what it met, and in a soft cap's reach all keys were alike
    plain = {name: each for name, each in named.items() if name != "bias"}
    first = 1 if row.answer in ("mean", "nan") else 0
    leaves = [each.detach().clone().requires_grad_() for each in (safe, key, value)]
    expected, expected_lse = attention(*leaves, mask=mask, backend="reference", return_lse=True, **plain)
    torch.testing.assert_close(out[:, :, first:].float(), expected[:, :, first:].float(), **loose)
    torch.testing.assert_close(lse[:, :, first:], expected_lse[:, :, first:], **loose)
    if not gradients:
        return
    d_out = torch.randn_like(out)
    grads = torch.autograd.grad(out, (query, key, value), d_out)
    if row.answer == "nan":
        assert bool(grads[0][:, :, 0].isnan().all() and grads[0][:, :, 1:].isfinite().all())
        seen = key[0, 0, :, 0] >= 0  # not below
        assert bool(grads[1].isnan().any() and grads[2][:, :, seen].isnan().all())
    elif row.answer in ("hidden", "visible"):
        want = torch.autograd.grad(expected, leaves, d_out)
        scale = named.get("scale", HEAD_DIM**-0.5)
        terms = (scale * key[..., 1:].abs().max(), scale * query[..., 1:].abs().max(), d_out.abs().max())
        for got, other, size in zip(grads, want, terms, strict=True):
            got, other = (each.float().clone() for each in (got, other))
            got[..., 0] = other[..., 0] = 0.0  # there HUGE and its partners multiply rounding errors
            size = float(size.detach())
            torch.testing.assert_close(got / size, other / size, atol=3e-2 if dtype != torch.float32 else 1e-4, rtol=0)
