"""Every tensor that a call takes gets its gradient, held against finite differences, or a refusal; none is detached in
silence.
"""

import inspect
import typing

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastattn import KVCache, attention, attention_weights, patch, replace_attention, varlen_attention
from fastattn.functional import all_weights
from fastattn.integrations import diffusers, flash_attn
from fastattn.integrations.flash_attn import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache
from fastattn.integrations.torch import registry
from fastattn.masks import Causal
from fastattn.nn import MultiheadAttention
from fastattn.torch_api import mha, sdpa

B, L, N, H, D = 2, 3, 5, 2, 4
CU_Q, CU_K = torch.tensor([0, 1, 3]), torch.tensor([0, 3, 5])
TABLE = torch.tensor([[1, 0], [2, 3]], dtype=torch.int32)


def r(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def heads_first():
    return {"query": r(B, H, L, D), "key": r(B, H, N, D), "value": r(B, H, N, D)}


def heads_last():
    return {"q": r(B, L, H, D), "k": r(B, N, H, D), "v": r(B, N, H, D)}


def packed():
    return {"q": r(3, H, D), "k": r(5, H, D), "v": r(5, H, D)}


def projected():
    e = H * D
    weights = {
        "in_proj_weight": r(3 * e, e),
        "in_proj_bias": r(3 * e),
        "out_proj_weight": r(e, e),
        "out_proj_bias": r(e),
    }
    return {"query": r(L, B, e), "key": r(N, B, e), "value": r(N, B, e), **weights}


def module_call(query, key, value, **given):
    rest = {
        "bias_k": None,
        "bias_v": None,
        "in_proj_bias": None,
        "out_proj_bias": None,
        "in_proj_weight": None,
        **given,
    }
    more = {"key_padding_mask": rest.pop("key_padding_mask", None)}
    return mha.multi_head_attention_forward(
        query, key, value, H * D, H, add_zero_attn=True, dropout_p=0.0, **rest, **more, average_attn_weights=False
    )


def separate():
    given = projected()
    del given["in_proj_weight"]
    e = H * D
    return {**given, "q_proj_weight": r(e, e), "k_proj_weight": r(e, e), "v_proj_weight": r(e, e)}


def static():
    given = projected()
    return {**given, "key": r(N, B, H * D), "static_k": r(B * H, N, D), "static_v": r(B * H, N, D)}


def patched(query, key, value, attn_mask):
    with patch():
        return F.scaled_dot_product_attention(query, key, value, attn_mask)


def active(query, key, value, attn_mask):
    registry.register()
    torch.nn.attention.activate_flash_attention_impl("fastattn")
    try:
        return F.scaled_dot_product_attention(query, key, value, attn_mask)
    finally:
        torch.nn.attention.restore_flash_attention_impl()


def swin(**given):
    library = pytest.importorskip("torchvision.models.swin_transformer", exc_type=(ImportError, RuntimeError))
    torch.manual_seed(1)
    module = library.ShiftedWindowAttentionV2(8, [2, 2], [1, 1], 2).double()
    names = {name.replace(".", "_"): name for name, _ in module.named_parameters()}

    def call(x, **parameters):
        return torch.func.functional_call(module, {names[name]: each for name, each in parameters.items()}, (x,))

    replace_attention(module)
    return call(**given)


def attend(**given):
    Attend = pytest.importorskip("x_transformers.attend").Attend
    module = Attend(heads=H, flash=True)
    replace_attention(module)
    return module(**given)[0]


# name: the function whose arguments these are, the call, what makes the tensors. Each of them gets a gradient
GIVEN = {
    "attention": (attention, lambda **x: attention(**x, return_lse=True),
                  lambda: heads_first() | {"bias": r(1, H, L, N), "sinks": r(H)}),
    "attention, numbers by key": (attention, attention, lambda: heads_first() | {"bias": r(B, 1, 1, N)}),
    "weights": (attention_weights, attention_weights,
                lambda: {"query": r(B, H, L, D), "key": r(B, H, N, D), "bias": r(H, 1, N), "sinks": r(H)}),
    "weights, lse": (all_weights, attention_weights,
                     lambda: {"query": r(B, H, L, D), "key": r(B, H, N, D), "lse": r(B, H, L)}),
    "varlen": (varlen_attention, lambda q, k, v, **x: varlen_attention(q, k, v, CU_Q, CU_K, **x, mask=Causal()),
               lambda: packed() | {"bias": r(1, H, 3, 5), "sinks": r(H)}),
    "torch's sdpa": (sdpa.scaled_dot_product_attention, sdpa.scaled_dot_product_attention,
                     lambda: heads_first() | {"attn_mask": r(L, N)}),
    "torch's sdpa, patched": (sdpa.route, patched, lambda: heads_first() | {"attn_mask": r(B, 1, 1, N)}),
    "torch's sdpa, in the registry": (sdpa.route, active, lambda: heads_first() | {"attn_mask": r(B, 1, 1, N)}),
    "torch's mha": (mha.multi_head_attention_forward, module_call,
                    lambda: projected() | {"bias_k": r(1, 1, H * D), "bias_v": r(1, 1, H * D),
                                           "attn_mask": r(L, N), "key_padding_mask": r(B, N)}),
    "torch's mha, apart": (mha.multi_head_attention_forward,
                           lambda **x: module_call(**x, use_separate_proj_weight=True), separate),
    "torch's mha, static": (mha.multi_head_attention_forward,
                            lambda key, **x: module_call(key=key, value=key, **x),
                            lambda: {name: each for name, each in static().items() if name != "value"}),
    "diffusers": (diffusers.attention, diffusers.attention,
                  lambda: {"query": r(B, L, H, D), "key": r(B, N, H, D), "value": r(B, N, H, D), "attn_mask": r(B, N)}),
    "x-transformers": (None, attend, lambda: {"q": r(B, H, L, D), "k": r(B, H, N, D), "v": r(B, H, N, D),
                                              "attn_bias": r(H, L, N)}),
    "torchvision": (None, swin, lambda: {"x": r(1, 4, 4, 8), "logit_scale": r(2, 1, 1), "qkv_weight": r(24, 8),
                                         "proj_bias": r(8)}),
    "flash": (flash_attn_func, flash_attn_func, lambda: heads_last() | {"alibi_slopes": r(H)}),
    "flash, causal": (flash_attn_func, lambda **x: flash_attn_func(**x, causal=True, return_attn_probs=True)[:2],
                      lambda: heads_last() | {"alibi_slopes": r(B, H)}),
    "flash, window and soft cap": (
        flash_attn_func, lambda **x: flash_attn_func(**x, window_size=(1, 0), softcap=1.5, softmax_scale=0.3),
        lambda: heads_last() | {"alibi_slopes": r(H)},
    ),
    "flash, window ahead": (flash_attn_func, lambda **x: flash_attn_func(**x, window_size=(1, 1)),
                            lambda: heads_last() | {"alibi_slopes": r(B, H)}),
    "flash, grouped heads": (
        flash_attn_func, lambda **x: flash_attn_func(**x, causal=True),
        lambda: {"q": r(B, L, 4, D), "k": r(B, N, 2, D), "v": r(B, N, 2, D), "alibi_slopes": r(4)},
    ),
    "flash, more queries": (
        flash_attn_func, lambda **x: flash_attn_func(**x, causal=True),
        lambda: {"q": r(B, N, H, D), "k": r(B, L, H, D), "v": r(B, L, H, D), "alibi_slopes": r(H)},
    ),
    "flash, packed": (flash_attn_varlen_func,
                      lambda **x: flash_attn_varlen_func(**x, cu_seqlens_q=CU_Q, cu_seqlens_k=CU_K, max_seqlen_q=2,
                                                         max_seqlen_k=3, causal=True, return_attn_probs=True)[:2],
                      lambda: packed() | {"alibi_slopes": r(2, H)}),
    "flash, blocks": (flash_attn_varlen_func,
                      lambda **x: flash_attn_varlen_func(**x, cu_seqlens_q=CU_Q, cu_seqlens_k=CU_K, max_seqlen_q=2,
                                                         max_seqlen_k=3, block_table=TABLE),
                      lambda: {"q": r(3, H, D), "k": r(4, 2, H, D), "v": r(4, 2, H, D), "alibi_slopes": r(H)}),
    "flash, cache read": (flash_attn_with_kvcache, lambda **x: flash_attn_with_kvcache(**x, causal=True),
                          lambda: {"q": r(B, L, H, D), "k_cache": r(B, N, H, D), "v_cache": r(B, N, H, D)}),
}  # fmt: skip


@pytest.mark.parametrize("name", GIVEN)
def test_each_tensor_gets_its_gradient(name):
    _, call, make = GIVEN[name]
    torch.manual_seed(0)
    given = make()

    def function(*tensors):
        return call(**dict(zip(given, tensors, strict=True)))

    assert torch.autograd.gradcheck(function, [each.requires_grad_() for each in given.values()], fast_mode=False)


def new_tokens(**changed):
    given = {"q": r(B, 1, H, D), "k_cache": r(B, N, H, D), "v_cache": r(B, N, H, D), "k": r(B, 1, H, D),
             "v": r(B, 1, H, D), "rotary_cos": r(N, D // 2), "rotary_sin": r(N, D // 2)}  # fmt: skip
    return flash_attn_with_kvcache(**{**given, **changed}, cache_seqlens=torch.tensor([1, 2]), causal=True)


def updated(**changed):
    given = {"key": r(1, H, L, D), "value": r(1, H, L, D), **changed}
    return KVCache.growing(1, H, D, dtype=torch.float64).update(**given)


def flash(**x):
    return flash_attn_func(**heads_last(), **x)


# name: the function, its argument, a call with it, and the sentence
REFUSED = {
    "flash, cache: k": (flash_attn_with_kvcache, "k", new_tokens, r(B, 1, H, D), "k: it requires a gradient"),
    "flash, cache: v": (flash_attn_with_kvcache, "v", new_tokens, r(B, 1, H, D), "v: it requires a gradient"),
    "flash, cache: k_cache": (flash_attn_with_kvcache, "k_cache", new_tokens, r(B, N, H, D), "k_cache: it requires"),
    "flash, cache: v_cache": (flash_attn_with_kvcache, "v_cache", new_tokens, r(B, N, H, D), "v_cache: it requires"),
    "flash, cache: cos": (flash_attn_with_kvcache, "rotary_cos", new_tokens, r(N, D // 2), "rotary_cos: it requires"),
    "flash, cache: sin": (flash_attn_with_kvcache, "rotary_sin", new_tokens, r(N, D // 2), "rotary_sin: it requires"),
    "flash, cache: slopes": (flash_attn_with_kvcache, "alibi_slopes", new_tokens, r(H), "alibi_slopes: it requires"),
    "flash, cache: scale": (flash_attn_with_kvcache, "softmax_scale", new_tokens, r(()), "scale: a Python number"),
    "flash: scale": (flash_attn_func, "softmax_scale", flash, r(()), "scale: a Python number .* learned factor"),
    "flash: soft cap": (flash_attn_func, "softcap", flash, r(()).abs(), "softcap: a Python number"),
    "flash: dropout": (flash_attn_func, "dropout_p", flash, torch.rand(()), "dropout_p: a Python number"),
    "attention: scale": (attention, "scale", lambda **x: attention(**heads_first(), **x), r(()), "scale: a Python"),
    "attention: soft cap": (attention, "softcap", lambda **x: attention(**heads_first(), **x), r(()), "softcap: a Py"),
    "sdpa: scale": (sdpa.scaled_dot_product_attention, "scale",
                    lambda **x: sdpa.scaled_dot_product_attention(**heads_first(), **x), r(()), "'scale' must be"),
    "sdpa: dropout": (sdpa.scaled_dot_product_attention, "dropout_p",
                      lambda **x: sdpa.scaled_dot_product_attention(**heads_first(), **x), r(()), "must be float"),
    "diffusers: scale": (diffusers.attention, "scale",
                         lambda **x: diffusers.attention(r(B, L, H, D), r(B, N, H, D), r(B, N, H, D), **x), r(()),
                         "'scale' must be float"),
    "registry: slopes": (registry._packed, "alibi_slopes",
                         lambda **x: registry._packed(r(3, H, D), r(5, H, D), r(5, H, D), CU_Q, CU_K, 2, 3, 0.0, False,
                                                      False, **x), r(H), "alibi_slopes: the flash-attention"),
    "cache: key": (KVCache.update, "key", updated, r(1, H, L, D), "key: a cache gives no gradients back"),
    "cache: value": (KVCache.update, "value", updated, r(1, H, L, D), "value: a cache gives no gradients back"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_gets_none_is_refused(name):
    _, argument, call, tensor, sentence = REFUSED[name]
    with pytest.raises((TypeError, ValueError, NotImplementedError), match=sentence):
        call(**{argument: tensor.clone().requires_grad_()})
    if "it requires" in sentence:  # what the sentence says would work
        call(**{argument: tensor.clone()})
        with torch.no_grad():
            call(**{argument: tensor.clone().requires_grad_()})


NEVER = {  # whole numbers and bools
    "mask", "rows", "dropout_seed", "cu_seqlens_q", "cu_seqlens_k", "cache_seqlens", "cache_batch_idx", "cache_leftpad",
    "block_table", "cum_seq_q", "cum_seq_k", "seqused_k", "philox_seed", "philox_offset", "rng_state", "unused",
}  # fmt: skip
PUBLIC = [attention, attention_weights, varlen_attention, sdpa.scaled_dot_product_attention,
         mha.multi_head_attention_forward, diffusers.attention, KVCache.update,
         *(getattr(flash_attn, name) for name in flash_attn.__all__)]  # fmt: skip


@pytest.mark.parametrize("function", PUBLIC, ids=lambda function: function.__qualname__)
def test_no_tensor_is_left_out(function):
    """A new tensor argument needs a row above."""
    hints = typing.get_type_hints(function, {**function.__globals__, "Tensor": Tensor})
    takes = {name for name in inspect.signature(function).parameters if "Tensor" in str(hints.get(name, ""))} - {
        "return"
    }
    given = {name for known, _, make in GIVEN.values() if known is function for name in make()}
    if function is attention_weights:
        given |= {"lse"}
    if function is varlen_attention:
        given |= {"query", "key", "value"}
    given |= {argument for known, argument, *_ in REFUSED.values() if known is function}
    assert takes - NEVER - {"new_lengths"} <= given


def test_modules_keep_their_parameters():
    module = MultiheadAttention(H * D, H, add_bias_kv=True).double()
    x = r(L, B, H * D)
    module(x, x, x)[0].sum().backward()
    assert all(each.grad is not None for each in module.parameters())


# --- learned slopes: at lengths where a difference of large sums would be noise


def defined(q, k, v, slopes, first=0):
    """By the definition in float64, causal and aligned bottom-right: out and lse."""
    i = torch.arange(q.shape[1])[:, None] + k.shape[1] - q.shape[1]
    away = (i - torch.arange(k.shape[1])).double()
    scores = torch.einsum("bihd,bjhd->bhij", q.double(), k.double()) / q.shape[-1] ** 0.5
    scores = (scores - slopes[:, None, None] * away.abs()).masked_fill(away < 0, -torch.inf)
    return torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v.double()), scores.logsumexp(-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("at_once", [None, 3 * 2 * 700], ids=["all at once", "three rows at once"])
def test_slopes_at_length(dtype, at_once, monkeypatch):
    from fastattn.integrations.flash_attn import alibi

    if at_once is not None:
        monkeypatch.setattr(alibi, "AT_ONCE", at_once)
    torch.manual_seed(0)
    q, k, v, grad = (torch.randn(1, 700, 2, 16).to(dtype) for _ in range(4))
    slopes = torch.tensor([0.5, 0.02], requires_grad=True)
    out, lse, _ = flash_attn_func(q, k, v, causal=True, alibi_slopes=slopes, return_attn_probs=True)
    d_lse = torch.randn(lse.shape)
    torch.autograd.backward([out, lse], [grad, d_lse])
    exact = slopes.detach().double().requires_grad_()
    want, want_lse = defined(q, k, v, exact)
    torch.autograd.backward([want, want_lse], [grad.double(), d_lse.double()])
    torch.testing.assert_close(slopes.grad.double(), exact.grad, rtol=1e-5, atol=1e-3)


def test_slopes_with_dropout_are_those_of_the_kept_weights():
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 70, 2, 16) for _ in range(3))
    slopes = torch.tensor([0.3, 0.1], requires_grad=True)
    out, _, weights = flash_attn_func(q, k, v, 0.4, causal=True, alibi_slopes=slopes, return_attn_probs=True)
    (have,) = torch.autograd.grad(out.square().sum(), slopes, retain_graph=True)
    kept = (weights > 0).double()
    exact = slopes.detach().double().requires_grad_()
    away = torch.arange(70)[:, None] - torch.arange(70)
    scores = torch.einsum("bihd,bjhd->bhij", q.double(), k.double()) / 4 - exact[:, None, None] * away.abs()
    shares = scores.masked_fill(away < 0, -torch.inf).softmax(-1)
    want = torch.einsum("bhij,bjhd->bihd", shares * kept / 0.6, v.double())
    torch.testing.assert_close(out.double(), want, rtol=1e-4, atol=1e-5)
    (need,) = torch.autograd.grad(want.square().sum(), exact, retain_graph=True)
    torch.testing.assert_close(have.double(), need, rtol=1e-4, atol=1e-4)
    (have,) = torch.autograd.grad(weights.abs().square().sum(), slopes)  # the weights know the slopes, too
    (need,) = torch.autograd.grad(shares.square().sum(), exact)
    torch.testing.assert_close(have.double(), need, rtol=1e-4, atol=1e-4)


def test_slopes_where_padding_holds_nan():
    """Tokens after the last sequence, and their output's gradient."""
    torch.manual_seed(0)
    q, k, v, grad = (torch.randn(6, 2, 8) for _ in range(4))
    cu = torch.tensor([0, 2, 5])
    found = []
    for fill in (0.0, float("nan")):
        slopes = torch.tensor([0.3, 0.1], requires_grad=True)
        for each in (q, k, v, grad):
            each[5:] = fill
        flash_attn_varlen_func(q, k, v, cu, cu, 3, 3, causal=True, alibi_slopes=slopes).backward(grad)
        found.append(slopes.grad)
    assert torch.equal(*found) and found[0].isfinite().all() and bool((found[0] != 0).all())


@pytest.mark.parametrize("causal", [True, False])
def test_slopes_under_compilers_and_transforms(causal):
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 9, 2, 8) for _ in range(3))
    slopes = torch.tensor([0.3, 0.1], requires_grad=True)

    def loss(slopes):
        return flash_attn_func(q, k, v, causal=causal, alibi_slopes=slopes).square().sum()

    (want,) = torch.autograd.grad(loss(slopes), slopes)
    torch._dynamo.reset()
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(torch.autograd.grad(compiled(slopes), slopes)[0], want, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.func.grad(loss)(slopes.detach()), want, rtol=1e-4, atol=1e-4)
    again = torch.utils.checkpoint.checkpoint(loss, slopes, use_reentrant=False)
    torch.testing.assert_close(torch.autograd.grad(again, slopes)[0], want, rtol=1e-4, atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        narrow = loss(slopes)
    torch.testing.assert_close(torch.autograd.grad(narrow, slopes)[0], want, rtol=0.05, atol=0.05)
    torch._dynamo.reset()


def test_second_derivatives_of_slopes_are_refused():
    q, slopes = torch.randn(1, 4, 2, 8, requires_grad=True), nn.Parameter(torch.tensor([0.3, 0.1]))
    out = flash_attn_func(q, q, q, causal=True, alibi_slopes=slopes).sum()
    with pytest.raises(RuntimeError, match="alibi_slopes: second derivatives are not there"):
        torch.autograd.grad(out, q, create_graph=True)
    out = flash_attn_func(q, q, q, causal=True, alibi_slopes=slopes.detach()).sum()
    assert torch.autograd.grad(out, q, create_graph=True)[0].requires_grad
