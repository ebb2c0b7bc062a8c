"""Models written for PyTorch: modules exchanged in place, functions redirected while they run."""

import copy
import pickle
import threading
from functools import partial

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import multi_head_attention_forward as by_name_mha
from torch.nn.functional import scaled_dot_product_attention as by_name_sdpa

from fastattn.dispatch import BackendUnavailable
from fastattn.integrations.torch import patch, replace_attention
from fastattn.nn import MultiheadAttention

WIDTH, HEADS = 24, 4
pytestmark = pytest.mark.filterwarnings("ignore:enable_nested_tensor", "ignore:The PyTorch API of nested tensors")


def encoder(**arguments):
    torch.manual_seed(0)
    arguments = {"batch_first": True, "dropout": 0.0, **arguments}
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(WIDTH, HEADS, 32, **arguments), 2)


def decoder():
    torch.manual_seed(0)
    return nn.TransformerDecoder(nn.TransformerDecoderLayer(WIDTH, HEADS, 32, batch_first=True, dropout=0.0), 2)


X = torch.randn(3, 5, WIDTH, generator=torch.Generator().manual_seed(1))
PADDING = torch.tensor([[False] * 5, [False] * 3 + [True] * 2, [False] * 4 + [True]])
CAUSAL = nn.Transformer.generate_square_subsequent_mask(5)
ENCODED = {
    "plain": {},
    "padded": {"src_key_padding_mask": PADDING},
    "causal": {"mask": CAUSAL, "is_causal": True},
    "causal, padded": {"mask": CAUSAL.isinf(), "src_key_padding_mask": PADDING},
}
MODES = ["train", "eval", "eval, no grad"]


def switch(model, mode):
    model.train(mode == "train")
    return torch.set_grad_enabled(mode != "eval, no grad")


def on_fastattn(how, model, *args, **kwargs):
    if how == "patch":
        with patch():
            return model(*args, **kwargs)
    report = replace_attention(model)
    out = model(*args, **kwargs)
    report.restore()
    return out


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ENCODED)
@pytest.mark.parametrize("how", ["replace", "patch"])
def test_encoder_runs_on_fastattn_with_the_same_numbers(how, name, mode, calls):
    model = encoder()
    with switch(model, mode):
        want = model(X, **ENCODED[name])
        assert not calls
        out = on_fastattn(how, model, X, **ENCODED[name])
        assert len(calls) == 2
        seen = ~PADDING if "src_key_padding_mask" in ENCODED[name] else slice(None)
        torch.testing.assert_close(out[seen], want[seen], rtol=1e-4, atol=1e-5)
        assert torch.equal(model(X, **ENCODED[name]), want) and len(calls) == 2


@pytest.mark.parametrize("arguments", [{"norm_first": True}, {"bias": False}, {"batch_first": False}], ids=str)
@pytest.mark.parametrize("how", ["replace", "patch"])
def test_other_encoders(how, arguments, calls):
    model = encoder(**arguments).eval()
    with torch.no_grad():
        torch.testing.assert_close(on_fastattn(how, model, X), model(X), rtol=1e-4, atol=1e-5)
    assert len(calls) == 2


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("how", ["replace", "patch"])
def test_decoder(how, mode, calls):
    model, memory = decoder(), torch.randn(3, 7, WIDTH)
    arguments = {"tgt_mask": CAUSAL, "tgt_is_causal": True}
    with switch(model, mode):
        want = model(X, memory, **arguments)
        torch.testing.assert_close(on_fastattn(how, model, X, memory, **arguments), want, rtol=1e-4, atol=1e-5)
    assert len(calls) == 4


@pytest.mark.parametrize("how", ["replace", "patch"])
def test_gradients(how):
    model = encoder()
    want = torch.autograd.grad(model(X).square().sum(), list(model.parameters()))
    have = torch.autograd.grad(on_fastattn(how, model, X).square().sum(), list(model.parameters()))
    for one, other in zip(have, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


class Own(nn.MultiheadAttention):
    def forward(self, query, *args, **kwargs):
        return query, None


class Heir(nn.MultiheadAttention):
    pass


class Zoo(nn.Module):
    def __init__(self):
        super().__init__()
        make = partial(nn.MultiheadAttention, WIDTH, HEADS, batch_first=True)
        self.plain, self.kdim = make(), make(kdim=10)
        self.shared = self.plain
        self.own, self.heir = Own(WIDTH, HEADS), Heir(WIDTH, HEADS)
        self.patched = make()
        self.patched.forward = lambda query, *args, **kwargs: (query, None)
        self.ours = MultiheadAttention(WIDTH, HEADS)
        self.encoder = encoder()


def test_report_names_every_module():
    model = Zoo()
    report = replace_attention(model)
    rows = {row.path: row for row in report.rows}
    changed = {path for path, row in rows.items() if row.changed}
    assert changed == {"plain", "kdim", "encoder", "encoder.layers.0.self_attn", "encoder.layers.1.self_attn"}
    assert len(report) == 4
    assert "Own has a forward of its own" in rows["own"].what and "patch()" in rows["own"].what
    assert "Heir is a subclass of torch's" in rows["heir"].what
    assert "replaced on the instance" in rows["patched"].what
    assert "fastattn's already" in rows["ours"].what
    lines = str(report).splitlines()
    assert lines[0].split() == ["path", "module", "changed", "what"] and len(lines) == 1 + len(rows)
    assert "no torch.nn.MultiheadAttention found" in str(replace_attention(nn.Linear(2, 2)))


def test_restore_undoes_everything():
    model = Zoo()
    before = {name: (type(module), dict(vars(module))) for name, module in model.named_modules()}
    report = replace_attention(model, backend="reference")
    assert type(model.plain) is MultiheadAttention and not model.encoder.use_nested_tensor
    report.restore()
    assert {name: (type(module), dict(vars(module))) for name, module in model.named_modules()} == before
    model.plain.__class__ = MultiheadAttention
    report.restore()  # a second time: nothing to do
    assert type(model.plain) is MultiheadAttention


def test_only_the_class_changes():
    model = encoder()
    state, seen = {name: tensor.clone() for name, tensor in model.state_dict().items()}, []
    model.layers[0].self_attn.register_forward_hook(lambda module, args, out: seen.append(out[0].shape))
    parameters = [id(parameter) for parameter in model.parameters()]
    replace_attention(model)
    assert isinstance(model.layers[0].self_attn, nn.MultiheadAttention)
    assert [id(parameter) for parameter in model.parameters()] == parameters
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    model(X)
    assert seen == [X.shape]
    encoder().load_state_dict(model.state_dict(), strict=True)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(encoder()))):
        assert copied.eval()(X).shape == X.shape


def test_a_module_by_itself():
    module = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
    report = replace_attention(module)
    assert type(module) is MultiheadAttention and len(report) == 1
    with pytest.raises(TypeError, match=r"model: a torch.nn.Module is needed, got str"):
        replace_attention("bert")


@pytest.mark.parametrize("how", ["replace", "patch"])
def test_a_backend_by_name(how, calls):
    model = encoder().double()

    def run(backend):
        if how == "patch":
            with patch(backend=backend):
                return model(X.double())
        report = replace_attention(model, backend=backend)
        try:
            return model(X.double())
        finally:
            report.restore()

    run("reference")
    assert calls == ["reference"] * 2
    with pytest.raises(BackendUnavailable, match="backend 'triton' cannot run this call"):
        run("triton")
    with pytest.raises(ValueError, match="nearest: 'triton'"):
        run("tritn")


QUERY, KEY = torch.randn(2, 3, 4, 8), torch.randn(2, 3, 6, 8)


def test_patch_reaches_functions_by_every_name(calls):
    want = F.scaled_dot_product_attention(QUERY, KEY, KEY)
    module = nn.MultiheadAttention(WIDTH, HEADS)
    with patch() as active:
        assert isinstance(active, patch)
        outs = [
            f(QUERY, KEY, KEY)
            for f in (F.scaled_dot_product_attention, by_name_sdpa, torch._C._nn.scaled_dot_product_attention)
        ]
        weights = (
            module.in_proj_weight,
            module.in_proj_bias,
            None,
            None,
            False,
            0.0,
            module.out_proj.weight,
            module.out_proj.bias,
        )
        by_name_mha(X, X, X, WIDTH, HEADS, *weights)
    assert len(calls) == 4
    for out in outs:
        torch.testing.assert_close(out, want)
    by_name_sdpa(QUERY, KEY, KEY)
    assert len(calls) == 4


def test_patch_decorates_nests_and_leaves_other_threads_alone(calls):
    @patch()
    def model():
        return by_name_sdpa(QUERY, KEY, KEY)

    model(), model()
    assert len(calls) == 2
    with patch():
        with patch(backend="reference"):
            by_name_sdpa(QUERY, KEY, KEY)
        by_name_sdpa(QUERY, KEY, KEY)
        other = threading.Thread(target=by_name_sdpa, args=(QUERY, KEY, KEY))
        other.start(), other.join()
    assert calls[2:] == ["reference", None]


def test_patch_keeps_biases_modes_and_nested_tensors():
    bias = causal_lower_right(4, 6)
    want = F.scaled_dot_product_attention(QUERY, KEY, KEY, bias)
    jagged = torch.nested.nested_tensor([torch.randn(n, 3, 8) for n in (3, 5)], layout=torch.jagged).transpose(1, 2)
    with patch(), torch.device("cpu"):
        torch.testing.assert_close(F.scaled_dot_product_attention(QUERY, KEY, KEY, bias), want)
        assert F.scaled_dot_product_attention(jagged, jagged, jagged).is_nested


def test_patch_refuses_a_nested_tensor_on_a_named_backend():
    for layout in (torch.jagged, torch.strided):
        nested = torch.nested.nested_tensor([torch.randn(n, 3, 8) for n in (3, 5)], layout=layout).transpose(1, 2)
        with patch("reference"), pytest.raises(RuntimeError, match="a nested tensor is left to torch's own function"):
            F.scaled_dot_product_attention(nested, nested, nested)


@pytest.mark.parametrize("made", ["inside", "outside"])
@pytest.mark.parametrize("what", ["function", "encoder"])
def test_patch_and_compile(what, made, calls):
    model = partial(F.scaled_dot_product_attention, is_causal=True) if what == "function" else encoder().eval()
    args = (QUERY, KEY, KEY) if what == "function" else (X,)
    want = model(*args)

    def function(*args):
        return model(*args)

    torch._dynamo.reset()
    if made == "outside":
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(*args), want)
        assert not calls
    with patch():
        if made == "inside":
            compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        graphs = torch.export.export(Wrapped(function), args).graph if what == "function" else None
        torch.testing.assert_close(compiled(*args), want)
    if graphs is not None:
        assert any("fastattn" in str(node.target) for node in graphs.nodes)
    torch.testing.assert_close(compiled(*args), want)


class Wrapped(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *args):
        return self.function(*args)


@pytest.mark.parametrize("mode", MODES)
def test_a_replaced_encoder_compiles(mode):
    model = encoder()
    replace_attention(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with switch(model, mode):
        for arguments in (ENCODED["padded"], ENCODED["causal"]):
            torch.testing.assert_close(compiled(X, **arguments), model(X, **arguments))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_replaced_encoder_scripts_as_torchs():
    """TorchScript exchanges modules in the model it is given, so that replacing comes after it."""
    model = encoder().eval()
    want = model(X)
    replace_attention(model)
    torch.testing.assert_close(torch.jit.script(model)(X), want, rtol=1e-4, atol=1e-5)
    assert len(replace_attention(model)) == 2
