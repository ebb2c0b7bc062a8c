"""Scores of any size, as models make them that mask by large numbers: nothing is NaN, and rows are averages."""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from fastattn import attention
from fastattn.masks import Causal, Window

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LARGEST = torch.finfo(torch.float32).max
SIZES = {"-1e9": -1e9, "-1e10": -1e10, "-1e30": -1e30, "lowest": -LARGEST, "1e30": 1e30}


def definition(query, key, value, bias, visible, scale=0.25):
    """In float64, row by row less its maximum."""
    logits = (query.double() @ key.double().mT * scale).float().double() + (0 if bias is None else bias.double())
    logits = logits.float().double().masked_fill(~visible, -torch.inf)  # a float32 sum, as every backend makes it
    return torch.softmax(logits, -1).nan_to_num(0) @ value.double()


def tensors(q_len=19, kv_len=23):
    return tuple(torch.randn(1, 2, n, 16, device=DEVICE) for n in (q_len, kv_len, kv_len))


@pytest.mark.parametrize("q_len", [19, 2], ids=["", "few-queries"])
@pytest.mark.parametrize("mask", [None, Causal(offset=-3), Window(4, 2)], ids=["", "causal", "window"])
@pytest.mark.parametrize("size", SIZES)
def test_rows_under_a_large_bias_are_averages_of_what_they_see(size, mask, q_len):
    """Whole rows, as of a padded query, and half of the others, as of padded keys."""
    query, key, value = tensors(q_len)
    bias = torch.zeros(2, q_len, 23, device=DEVICE)
    bias[:, ::3] = SIZES[size]
    bias[:, :, 12:] = SIZES[size]
    visible = torch.ones(1, 1, q_len, 23, dtype=torch.bool, device=DEVICE)
    if mask is not None:
        visible = mask.dense(q_len, 23, device=torch.device(DEVICE))
    out, lse = attention(query, key, value, bias=bias, mask=mask, backend="triton", return_lse=True)
    torch.testing.assert_close(out.double(), definition(query, key, value, bias, visible), atol=1e-4, rtol=1e-4)
    seen = visible.expand(1, 2, q_len, 23).any(-1)
    assert (lse.isfinite() == seen).all()


@pytest.mark.parametrize("size", SIZES)
def test_gradients_under_a_large_bias_are_finite_and_those_of_other_rows_right(size):
    query, key, value = (each.requires_grad_() for each in tensors())
    bias = torch.zeros(2, 19, 23, device=DEVICE)
    bias[:, 10:] = SIZES[size]
    d_out = torch.randn(1, 2, 19, 16, device=DEVICE)
    out = attention(query, key, value, bias=bias.requires_grad_(), backend="triton")
    grads = torch.autograd.grad(out, (query, key, value, bias), d_out, retain_graph=True)
    assert all(grad.isfinite().all() for grad in grads)
    d_out[:, :, 10:] = 0  # as of rows that no loss looks at
    got = torch.autograd.grad(out, (query, key, value, bias), d_out)
    alone = attention(query[:, :, :10], key, value, bias=bias[:, :10], backend="triton")
    want = torch.autograd.grad(alone, (query, key, value, bias), d_out[:, :, :10])
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("scale", [1e3, 1e10, -1e10])
def test_a_scale_that_leaves_one_key_to_each_row(scale):
    query, key, value = tensors()
    out = attention(query, key, value, scale=scale, backend="triton")
    best = (query @ key.mT * scale).argmax(-1)
    want = torch.take_along_dim(value, best[..., None], 2)
    assert out.isfinite().all() and (out - want).abs().median() < 1e-5


def test_a_sink_of_nothing_beside_rows_that_see_nothing():
    query, key, value = tensors()
    sinks = torch.tensor([-torch.inf, 0.5], device=DEVICE)
    out, lse = attention(query, key, value, sinks=sinks, mask=Causal(offset=-5), backend="triton", return_lse=True)
    assert (out[:, :, :5] == 0).all() and (lse[:, :, :5] == -torch.inf).all() and out.isfinite().all()
