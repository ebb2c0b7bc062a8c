"""fastattn.nn.MultiheadAttention is torch.nn.MultiheadAttention: parameters, seeds, state, forms of input, errors."""

import copy
import inspect
import io
import pickle

import pytest
import torch
import torch.nn as nn

from fastattn.dispatch import BackendUnavailable
from fastattn.nn import MultiheadAttention

WIDTH, HEADS = 24, 4

CONSTRUCTED = {
    "plain": {},
    "batch_first": {"batch_first": True},
    "no bias": {"bias": False},
    "no bias, batch_first": {"bias": False, "batch_first": True},
    "bias_kv": {"add_bias_kv": True, "batch_first": True},
    "zero_attn": {"add_zero_attn": True, "batch_first": True},
    "kdim": {"kdim": 10, "batch_first": True},
    "vdim": {"vdim": 14},
    "everything": {"kdim": 10, "vdim": 14, "add_bias_kv": True, "add_zero_attn": True, "batch_first": True},
    "float64": {"dtype": torch.float64, "batch_first": True},
}


def pair(seed=0, **arguments):
    """Ours and torch's, made from one seed."""
    modules = []
    for kind in (MultiheadAttention, nn.MultiheadAttention):
        torch.manual_seed(seed)
        modules.append(kind(WIDTH, HEADS, **arguments))
    return modules


def inputs(module, *, q_len=5, kv_len=7, batch=3):
    sizes = ((q_len, WIDTH), (kv_len, module.kdim), (kv_len, module.vdim))
    lead = (lambda n: (batch, n)) if module.batch_first else (lambda n: (n, batch))
    dtype = module.out_proj.weight.dtype
    return [torch.randn(*lead(length), width, dtype=dtype).requires_grad_() for length, width in sizes]


@pytest.mark.parametrize("name", CONSTRUCTED)
def test_same_seed_same_parameters_same_state(name):
    ours, torchs = pair(**CONSTRUCTED[name])
    assert isinstance(ours, nn.MultiheadAttention)
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in torchs.named_parameters()]
    assert list(ours.state_dict()) == list(torchs.state_dict())
    for one, other in zip(ours.state_dict().values(), torchs.state_dict().values(), strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)
    torch.manual_seed(3), ours._reset_parameters()
    torch.manual_seed(3), torchs._reset_parameters()
    assert all(torch.equal(one, other) for one, other in zip(ours.parameters(), torchs.parameters(), strict=True))
    assert type(ours.out_proj) is type(torchs.out_proj)


def test_same_signatures():
    ours, torchs = (inspect.signature(kind).parameters for kind in (MultiheadAttention, nn.MultiheadAttention))
    assert [(p.name, p.default) for p in ours.values()][:-3] == [(p.name, p.default) for p in torchs.values()]
    for name in ("window", "backend", "num_kv_heads"):
        assert ours[name].kind is inspect.Parameter.KEYWORD_ONLY and ours[name].default is None
    ours, torchs = (inspect.signature(kind.forward).parameters for kind in (MultiheadAttention, nn.MultiheadAttention))
    assert [(p.name, p.default) for p in ours.values()] == [(p.name, p.default) for p in torchs.values()]


@pytest.mark.parametrize("mode", ["train", "eval", "eval, no grad"])
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("name", CONSTRUCTED)
def test_same_numbers(name, need_weights, mode):
    ours, torchs = pair(**CONSTRUCTED[name])
    given = inputs(ours)
    padding = torch.zeros(3, 7, dtype=torch.bool)
    padding[0, 4:] = True
    results = []
    for module in (ours, torchs):
        module.train(mode == "train")
        with torch.set_grad_enabled(mode != "eval, no grad"):
            out, weights = module(*given, key_padding_mask=padding, need_weights=need_weights)
        grads = (
            () if mode == "eval, no grad" else torch.autograd.grad(out.square().sum(), [*given, *module.parameters()])
        )
        results.append((out, weights, *grads))
    for one, other in zip(*results, strict=True):
        assert (one is None) == (other is None)
        if other is not None:
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("batch_first", [False, True])
def test_self_attention_where_torch_takes_its_fast_path(batch_first):
    ours, torchs = (module.eval() for module in pair(batch_first=batch_first))
    x = torch.randn(5, 5, WIDTH)
    mask = torch.ones(5, 5, dtype=torch.bool).triu(1)
    with torch.no_grad():
        for one, other in zip(ours(x, x, x, attn_mask=mask), torchs(x, x, x, attn_mask=mask), strict=True):
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("average", [False, True])
def test_unbatched(batch_first, average):
    ours, torchs = pair(batch_first=batch_first)
    query, key = torch.randn(5, WIDTH), torch.randn(7, WIDTH)
    padding = torch.zeros(7, dtype=torch.bool)
    padding[-2:] = True
    arguments = {"key_padding_mask": padding, "average_attn_weights": average}
    for one, other in zip(ours(query, key, key, **arguments), torchs(query, key, key, **arguments), strict=True):
        torch.testing.assert_close(one, other)


def test_is_causal_means_the_same_in_training_and_evaluation():
    module, _ = pair(batch_first=True)
    x = torch.randn(3, 5, WIDTH)
    for training in (True, False):
        with pytest.raises(RuntimeError, match="Need attn_mask if specifying the is_causal hint"), torch.no_grad():
            module.train(training)(x, x, x, is_causal=True)


@pytest.mark.parametrize("need_weights", [False, True])
def test_a_padded_sequence_gives_zero_not_nan(need_weights):
    module = pair(batch_first=True, bias=False)[0].eval()
    x = torch.randn(2, 5, WIDTH)
    padding = torch.tensor([[False] * 5, [True] * 5])
    with torch.no_grad():
        out, weights = module(x, x, x, key_padding_mask=padding, need_weights=need_weights)
    assert out[0].all() and not out[1].any()
    assert weights is None or not weights[1].any()


@pytest.mark.parametrize("name", CONSTRUCTED)
def test_state_travels_both_ways(name):
    ours = pair(**CONSTRUCTED[name])[0]
    others = pair(seed=1, **CONSTRUCTED[name])
    given = inputs(ours)
    want = ours(*given)[0]
    for other in others:
        other.load_state_dict(ours.state_dict(), strict=True)
        torch.testing.assert_close(other(*given)[0], want, rtol=1e-4, atol=1e-5)
    copies = [copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))]
    file = io.BytesIO()
    torch.save(ours, file)
    file.seek(0)
    copies.append(torch.load(file, weights_only=False))
    for copied in copies:
        assert type(copied) is MultiheadAttention
        assert torch.equal(copied(*given)[0], want)
    assert copies[0]._qkv_same_embed_dim == ours._qkv_same_embed_dim


def test_a_backend_by_name():
    module = MultiheadAttention(WIDTH, HEADS, batch_first=True, backend="reference")
    x = torch.randn(2, 5, WIDTH)
    assert module(x, x, x)[0].shape == x.shape
    assert "backend" not in module.state_dict()
    assert copy.deepcopy(module).backend == "reference"
    module.backend = "triton"
    wide, x = module.double(), x.double()
    with pytest.raises(BackendUnavailable, match="backend 'triton' cannot run this call"):
        wide(x, x, x)
    wide.backend = "tritn"
    with pytest.raises(ValueError, match="nearest: 'triton'"):
        wide(x, x, x)


CONSTRUCTOR_ERRORS = {"no heads": (24, 0), "no width": (0, 4), "does not divide": (25, 4), "negative": (-8, 4)}


@pytest.mark.parametrize("name", CONSTRUCTOR_ERRORS)
def test_constructor_errors_are_torchs(name):
    with pytest.raises(Exception) as torchs:
        nn.MultiheadAttention(*CONSTRUCTOR_ERRORS[name])
    with pytest.raises(torchs.type) as ours:
        MultiheadAttention(*CONSTRUCTOR_ERRORS[name])
    assert str(ours.value) == str(torchs.value)


X = torch.zeros(3, 5, WIDTH)
FORWARD_ERRORS = {
    "key and value differ": ((X, X, X[:, :4]), {}),
    "query too narrow": ((X[..., :8], X[..., :8], X[..., :8]), {}),
    "query 4-D": ((X[None], X[None], X[None]), {}),
    "key 2-D": ((X, X[0], X[0]), {}),
    "query 2-D, key 3-D": ((X[0], X, X), {}),
    "mask int": ((X, X, X), {"attn_mask": torch.zeros(5, 5, dtype=torch.int64)}),
    "mask int beside a hint": (
        (X, X, X),
        {"attn_mask": torch.zeros(5, 5, dtype=torch.int64), "is_causal": True, "need_weights": False},
    ),
    "padding uint8": ((X, X, X), {"key_padding_mask": torch.zeros(3, 5, dtype=torch.uint8)}),
    "padding too short": ((X, X, X), {"key_padding_mask": torch.zeros(3, 4, dtype=torch.bool)}),
    "padding 1-D": ((X, X, X), {"key_padding_mask": torch.zeros(5, dtype=torch.bool)}),
    "mask of a wrong shape": ((X, X, X), {"attn_mask": torch.zeros(5, 4)}),
    "mask 3-D of a wrong shape": ((X, X, X), {"attn_mask": torch.zeros(3, 5, 5)}),
    "mask 4-D": ((X, X, X), {"attn_mask": torch.zeros(3, 4, 5, 5)}),
    "unbatched mask of a wrong shape": ((X[0], X[0], X[0]), {"attn_mask": torch.zeros(3, 5, 5)}),
    "padding of another dtype": ((X, X, X), {"key_padding_mask": torch.zeros(3, 5).half(), "need_weights": False}),
    "hint without a mask": ((X, X, X), {"is_causal": True}),
    "float64 input": ((X.double(), X.double(), X.double()), {}),
}


@pytest.mark.parametrize("name", FORWARD_ERRORS)
def test_forward_errors_are_torchs(name):
    ours, torchs = pair(batch_first=True)
    args, kwargs = FORWARD_ERRORS[name]
    with pytest.raises(Exception) as theirs:
        torchs(*args, **kwargs)
    with pytest.raises(theirs.type) as mine:
        ours(*args, **kwargs)
    if name != "float64 input":  # from a matrix product, whose words depend on the layout
        assert str(mine.value) == str(theirs.value)


def test_autocast():
    ours, torchs = pair(batch_first=True)
    x = torch.randn(3, 5, WIDTH)
    with torch.autocast("cpu", torch.bfloat16):
        for mask in (None, torch.zeros(5, 5), torch.zeros(5, 5, dtype=torch.bool)):
            for one, other in zip(ours(x, x, x, attn_mask=mask), torchs(x, x, x, attn_mask=mask), strict=True):
                torch.testing.assert_close(one.float(), other.float(), rtol=0.05, atol=0.05)
            assert ours(x, x, x)[0].dtype == torch.bfloat16


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_compiles_in_one_graph(need_weights, batch_first):
    module, _ = pair(batch_first=batch_first)
    given = inputs(module)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for one, other in zip(
        compiled(*given, need_weights=need_weights), module(*given, need_weights=need_weights), strict=True
    ):
        if other is not None:
            torch.testing.assert_close(one, other)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:`torch.jit:DeprecationWarning")
def test_exports_traces_and_scripts():
    module = pair(batch_first=True)[0].eval()
    x = torch.randn(3, 5, WIDTH)
    want = module(x, x, x)[0]
    exported = torch.export.export(module, (x, x, x))
    torch.testing.assert_close(exported.module()(x, x, x)[0], want)
    torch.testing.assert_close(torch.jit.trace(module, (x, x, x), check_trace=False)(x, x, x)[0], want)
    torch.testing.assert_close(torch.jit.script(module)(x, x, x)[0], want)


def test_transforms_and_modes():
    module = pair(batch_first=True)[0]
    x = torch.randn(4, 5, WIDTH)
    by_one = torch.vmap(lambda each: module(each, each, each, need_weights=False)[0])(x)
    torch.testing.assert_close(by_one, module(x, x, x)[0])
    with torch.device("cpu"):  # a torch function mode
        assert torch.equal(module(x, x, x)[0], module(x, x, x)[0])


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_nested_tensors_are_torchs():
    ours, torchs = (module.eval() for module in pair(batch_first=True))
    nested = torch.nested.nested_tensor([torch.randn(length, WIDTH) for length in (3, 5)])
    with torch.no_grad():
        for one, other in zip(
            *(module(nested, nested, nested, need_weights=False)[0].unbind() for module in (ours, torchs)), strict=True
        ):
            torch.testing.assert_close(one, other)
    with pytest.raises(AssertionError, match="does not support NestedTensor outside of its fast path"):
        ours.train()(nested, nested, nested)


def count_calls(monkeypatch):
    calls = []
    forward = MultiheadAttention.forward
    monkeypatch.setattr(MultiheadAttention, "forward", lambda *args, **kw: calls.append(kw) or forward(*args, **kw))
    return calls


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
@pytest.mark.parametrize("padded", [False, True])
def test_an_encoder_layer_in_evaluation_calls_it(padded, monkeypatch):
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 32, batch_first=True)
    stock = nn.TransformerEncoder(layer, 2).eval()
    layer.self_attn = MultiheadAttention(WIDTH, HEADS, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2).eval()
    encoder.load_state_dict(stock.state_dict())
    x = torch.randn(3, 5, WIDTH)
    padding = torch.zeros(3, 5, dtype=torch.bool)
    padding[0, 3:] = True
    calls = count_calls(monkeypatch)
    with torch.no_grad():
        ours, torchs = (model(x, src_key_padding_mask=padding if padded else None) for model in (encoder, stock))
    assert len(calls) == 2
    seen = ~padding if padded else slice(None)
    torch.testing.assert_close(ours[seen], torchs[seen])


def test_an_encoder_without_biases_warns_in_torchs_words():
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 32, batch_first=True, bias=False)
    layer.self_attn = MultiheadAttention(WIDTH, HEADS, batch_first=True, bias=False)
    with pytest.warns(UserWarning, match="self_attn was passed bias=False"):
        nn.TransformerEncoder(layer, 2)
