"""What the modules of fastattn.nn add to torch's: windows, fewer key heads, a backend by name."""

import pytest
import torch
import torch.nn.functional as F

from fastattn import nn as ours

WIDTH, HEADS, INNER = 24, 4, 32


def same(one, other):
    torch.testing.assert_close([*one], [*other], rtol=1e-3, atol=1e-4)


def definition(module, x, hidden):
    """Self-attention of a batch_first module with grouped heads, written out; `hidden` is True where nobody looks."""
    heads, kv_heads = module.num_heads, module.num_kv_heads or module.num_heads
    dim = module.embed_dim // heads
    q, k, v = F.linear(x, module.in_proj_weight, module.in_proj_bias).split(
        [heads * dim, kv_heads * dim, kv_heads * dim], -1
    )
    q, k, v = (t.unflatten(-1, (-1, dim)).transpose(1, 2) for t in (q, k, v))
    k, v = (t.repeat_interleave(heads // kv_heads, 1) for t in (k, v))
    scores = (q @ k.transpose(-1, -2) / dim**0.5).masked_fill(hidden, -1e30)
    weights = scores.softmax(-1) * ~hidden.all(-1, keepdim=True)
    return module.out_proj((weights @ v).transpose(1, 2).flatten(2)), weights


@pytest.mark.parametrize("window", [None, 1, (2, 0), (None, 0), (0, None)])
@pytest.mark.parametrize("kv_heads", [None, 1, 2, 4])
def test_windows_and_fewer_key_heads(kv_heads, window):
    torch.manual_seed(0)
    module = ours.MultiheadAttention(WIDTH, HEADS, batch_first=True, window=window, num_kv_heads=kv_heads)
    assert module.in_proj_weight.shape == (WIDTH + 2 * (kv_heads or HEADS) * WIDTH // HEADS, WIDTH)
    x = torch.randn(3, 5, WIDTH)
    left, right = (window, window) if isinstance(window, int) else window or (None, None)
    place = torch.arange(5)
    away = place[None] - place[:, None]
    hidden = (away < -(9 if left is None else left)) | (away > (9 if right is None else right))
    padding = torch.zeros(3, 5, dtype=torch.bool)
    padding[0, 4:] = True
    out, weights = module(x, x, x, key_padding_mask=padding, average_attn_weights=False)
    want, want_weights = definition(module, x, hidden | padding[:, None, None])
    same([out, weights], [want, want_weights])
    grads = [torch.autograd.grad(o.square().sum(), [*module.parameters()]) for o in (out, want)]
    same(*grads)


def test_a_window_spares_the_keys_that_the_module_adds():
    torch.manual_seed(0)
    arguments = {"batch_first": True, "add_bias_kv": True, "add_zero_attn": True}
    windowed, plain = (ours.MultiheadAttention(WIDTH, HEADS, **arguments, **more) for more in ({"window": (1, 0)}, {}))
    plain.load_state_dict(windowed.state_dict())
    keys = torch.randn(3, 5, WIDTH)
    for length in (5, 3, 7):  # the last query sits at the last key
        queries = torch.randn(3, length, WIDTH)
        away = torch.arange(5)[None] - (torch.arange(length)[:, None] + 5 - length)
        hidden = (away < -1) | (away > 0)
        same(windowed(queries, keys, keys), plain(queries, keys, keys, attn_mask=hidden))


def test_separate_projections_with_fewer_key_heads():
    module = ours.MultiheadAttention(WIDTH, HEADS, kdim=10, vdim=14, add_bias_kv=True, num_kv_heads=2, batch_first=True)
    assert module.k_proj_weight.shape == (12, 10) and module.v_proj_weight.shape == (12, 14)
    assert module.bias_k.shape == (1, 1, 12) and module.in_proj_bias.shape == (48,)
    out, weights = module(torch.randn(3, 5, WIDTH), torch.randn(3, 7, 10), torch.randn(3, 7, 14))
    assert out.shape == (3, 5, WIDTH) and weights.shape == (3, 5, 8)


@pytest.mark.parametrize("wrong", [0, 3, 8, -1])
def test_a_wrong_number_of_key_heads_is_refused(wrong):
    with pytest.raises(ValueError, match=rf"num_kv_heads: num_heads \(4\) must be a multiple of it, got {wrong}"):
        ours.MultiheadAttention(WIDTH, HEADS, num_kv_heads=wrong)


@pytest.mark.parametrize("wrong", ["2", (1,), (1, 2, 3), (-1, 0), (1.5, 0)])
def test_a_wrong_window_is_refused(wrong):
    with pytest.raises(ValueError, match=r"[wW]indow"):
        ours.TransformerEncoderLayer(WIDTH, HEADS, window=wrong)
