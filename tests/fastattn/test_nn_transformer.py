"""The Transformer modules of fastattn.nn are torch's: signatures, parameters, seeds, numbers, gradients, hooks."""

import copy
import inspect
import io
import pickle
import subprocess
import sys

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from fastattn import nn as ours
from fastattn.torch_api import mha

WIDTH, HEADS, INNER = 24, 4, 32
NAMES = (
    "Transformer",
    "TransformerDecoder",
    "TransformerDecoderLayer",
    "TransformerEncoder",
    "TransformerEncoderLayer",
)
LAYERS = {
    "plain": {},
    "batch_first": {"batch_first": True},
    "norm_first": {"norm_first": True, "batch_first": True},
    "no bias": {"bias": False, "batch_first": True},
    "gelu": {"activation": "gelu", "batch_first": True},
    "own activation": {"activation": F.silu, "batch_first": True},
    "eps, float64": {"layer_norm_eps": 1e-3, "dtype": torch.float64, "batch_first": True},
}
MODES = ("train", "eval", "eval, no grad")
pytestmark = pytest.mark.filterwarnings(
    "ignore:enable_nested_tensor", "ignore:The PyTorch API of nested tensors", "ignore:`torch.jit:DeprecationWarning"
)


def make(where, kind, **arguments):
    """A module of `where` (ours or torch.nn), from one seed; without dropout, whose bits are each library's own."""
    arguments = {"dropout": 0.0, **arguments}
    torch.manual_seed(0)
    if kind == "encoder layer":
        return where.TransformerEncoderLayer(WIDTH, HEADS, INNER, **arguments)
    if kind == "decoder layer":
        return where.TransformerDecoderLayer(WIDTH, HEADS, INNER, **arguments)
    if kind == "encoder":
        layer = where.TransformerEncoderLayer(WIDTH, HEADS, INNER, **arguments)
        return where.TransformerEncoder(layer, 2, nn.LayerNorm(WIDTH, dtype=arguments.get("dtype")))
    if kind == "decoder":
        return where.TransformerDecoder(where.TransformerDecoderLayer(WIDTH, HEADS, INNER, **arguments), 2)
    return where.Transformer(WIDTH, HEADS, 1, 2, INNER, **arguments)


KINDS = ("encoder layer", "decoder layer", "encoder", "decoder", "transformer")


def given(kind, model, *, length=5, memory=7, batch=3):
    """The module's tensors: src or tgt, and memory or the other way round."""
    first = getattr(model, "batch_first", None)
    first = next(m.batch_first for m in model.modules() if hasattr(m, "batch_first")) if first is None else first
    dtype = next(model.parameters()).dtype
    lead = (lambda n: (batch, n)) if first else (lambda n: (n, batch))
    tensors = [torch.randn(*lead(n), WIDTH, dtype=dtype).requires_grad_() for n in (length, memory)]
    return tensors[:1] if "encoder" in kind else tensors[::-1] if kind == "transformer" else tensors


def masks(kind, which, floating, length=5, memory=7, batch=3):
    """Keyword arguments: a causal mask of the target, padding of the sources; in a row's own sense, True = hidden."""
    causal = torch.ones(length, length, dtype=torch.bool).triu(1)
    short, long = (torch.zeros(batch, n, dtype=torch.bool) for n in (length, memory))
    short[1, 3:], long[0, 4:] = True, True
    if floating:
        causal, short, long = (
            torch.zeros(mask.shape).masked_fill(mask, float("-inf")) for mask in (causal, short, long)
        )
    if "encoder" in kind:
        name = "mask" if kind == "encoder" else "src_mask"
        found = {"causal": {name: causal}, "padding": {"src_key_padding_mask": short}}
    elif kind == "transformer":
        found = {
            "causal": {"tgt_mask": causal},
            "padding": {"src_key_padding_mask": long, "memory_key_padding_mask": long, "tgt_key_padding_mask": short},
        }
    else:
        found = {
            "causal": {"tgt_mask": causal},
            "padding": {"memory_key_padding_mask": long, "tgt_key_padding_mask": short},
        }
    return {"none": {}, "both": {**found["causal"], **found["padding"]}, **found}[which]


@pytest.mark.parametrize("name", NAMES)
def test_same_signatures(name):
    mine, theirs = (getattr(where, name) for where in (ours, nn))
    assert issubclass(mine, theirs)
    for method in ("__init__", "forward"):
        a, b = (list(inspect.signature(getattr(kind, method)).parameters.values()) for kind in (mine, theirs))
        assert [(p.name, p.default) for p in a[: len(b)]] == [(p.name, p.default) for p in b]
        extra = a[len(b) :]
        assert all(p.kind is inspect.Parameter.KEYWORD_ONLY and p.default is None for p in extra)
        takes = method == "__init__" and name not in ("TransformerEncoder", "TransformerDecoder")
        assert {p.name for p in extra} == ({"window", "backend", "num_kv_heads"} if takes else set())


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("kind", KINDS)
def test_same_seed_same_state(kind, name):
    mine, theirs = (make(where, kind, **LAYERS[name]) for where in (ours, nn))
    assert list(mine.state_dict()) == list(theirs.state_dict())
    assert [n for n, _ in mine.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    for one, other in zip(mine.state_dict().values(), theirs.state_dict().values(), strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)
    theirs.load_state_dict(mine.state_dict(), strict=True), mine.load_state_dict(theirs.state_dict(), strict=True)
    assert all(isinstance(m, ours.MultiheadAttention) for m in mine.modules() if isinstance(m, nn.MultiheadAttention))


@pytest.fixture
def calls(monkeypatch):
    """The mask and the bias of each attention that fastattn computes."""
    made, attention = [], mha.attention
    monkeypatch.setattr(
        mha, "attention", lambda *args, **kw: made.append((kw["mask"], kw["bias"])) or attention(*args, **kw)
    )
    return made


def outputs(model, kind, tensors, mode, **arguments):
    """The output and, where there is grad, every gradient. Padded positions of an encoder are compared by no one."""
    model.train(mode == "train")
    with torch.set_grad_enabled(mode != "eval, no grad"):
        out = model(*tensors, **arguments)
    padding = arguments.get("src_key_padding_mask") if "encoder" in kind else None
    if padding is not None:
        hidden = padding if padding.dtype == torch.bool else padding < 0
        batch_first = out.shape[0] == hidden.shape[0]
        out = out[~(hidden if batch_first else hidden.T)]
    grads = torch.autograd.grad(out.square().sum(), [*tensors, *model.parameters()]) if out.requires_grad else ()
    return out, *grads


def same(one, other, **tolerance):
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, **({"rtol": 1e-3, "atol": 1e-4} | tolerance))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("which", ["none", "causal", "padding", "both"])
@pytest.mark.parametrize("kind", KINDS)
def test_same_numbers(kind, which, mode, calls):
    mine, theirs = (make(where, kind, batch_first=True) for where in (ours, nn))
    tensors = given(kind, mine)
    for floating in (False, True):
        arguments = masks(kind, which, floating)
        want = outputs(theirs, kind, tensors, mode, **arguments)
        del calls[:]
        same(outputs(mine, kind, tensors, mode, **arguments), want)
        assert len(calls) == sum(isinstance(m, nn.MultiheadAttention) for m in mine.modules())
        if not floating:
            assert all(bias is None for _, bias in calls)  # bool masks stay masks


@pytest.mark.parametrize("name", [name for name in LAYERS if name != "batch_first"])
@pytest.mark.parametrize("kind", KINDS)
def test_same_numbers_of_every_layer(kind, name):
    mine, theirs = (make(where, kind, **LAYERS[name]) for where in (ours, nn))
    tensors = given(kind, mine)
    for mode in ("train", "eval, no grad"):
        same(outputs(mine, kind, tensors, mode), outputs(theirs, kind, tensors, mode))


@pytest.mark.parametrize("kind", KINDS)
def test_unbatched_and_empty(kind):
    mine, theirs = (make(where, kind, batch_first=True).eval() for where in (ours, nn))
    one = [tensor[0] for tensor in given(kind, mine)]
    same([mine(*one)], [theirs(*one)])
    none = given(kind, mine, batch=0)
    assert mine(*none).shape == none[-1 if kind == "transformer" else 0].shape


@pytest.mark.parametrize("kind", ["encoder layer", "encoder"])
def test_hooks_fire_and_forward_runs_in_evaluation(kind, calls):
    model, seen = make(ours, kind, batch_first=True).eval(), []
    for name, module in model.named_modules():
        module.register_forward_hook(lambda *_, name=name: seen.append(name))
    padding = masks(kind, "padding", False)
    with torch.no_grad():
        model(*given(kind, model), **padding)
    ran = {name for name, module in model.named_modules() if not isinstance(module, nn.ModuleList)}
    assert set(seen) == {name for name in ran if not name.endswith("out_proj")}
    assert calls and not any(row.training for row in model.modules())


def test_an_encoder_gives_numbers_where_torch_gives_zeros_for_padding():
    encoder = make(ours, "encoder", batch_first=True)
    x, padding = given("encoder", encoder)[0], masks("encoder", "padding", False)
    trained = encoder(x, **padding)
    with torch.no_grad():
        same([encoder.eval()(x, **padding)], [trained])


@pytest.mark.parametrize("floating", [False, True])
@pytest.mark.parametrize("kind", ["encoder", "decoder", "transformer"])
def test_a_causal_mask_is_recognised_and_not_read(kind, floating, calls):
    from fastattn.masks import Causal

    model = make(ours, kind, batch_first=True)
    model(*given(kind, model), **masks(kind, "causal", floating))
    causal = [mask for mask, bias in calls if isinstance(mask, Causal) and bias is None]
    assert len(causal) == 2


@pytest.mark.parametrize("kind", KINDS)
def test_compiles_in_one_graph(kind):
    """With is_causal=None too, where torch's own look at the mask breaks the graph."""
    model = make(ours, kind, batch_first=True).eval()
    tensors, arguments = given(kind, model), masks(kind, "both", False)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    same([compiled(*tensors, **arguments)], [model(*tensors, **arguments)])


def test_masks_of_two_kinds_warn_once_in_torchs_words():
    arguments = masks("encoder", "causal", True) | masks("encoder", "padding", False)
    mine, theirs = (make(where, "encoder", batch_first=True) for where in (ours, nn))
    tensors = given("encoder", mine)
    found = []
    for model in (mine, theirs):
        with pytest.warns(UserWarning, match="mismatched src_key_padding_mask and mask") as seen:
            found.append(model(*tensors, **arguments))
        assert len(seen) == 1
    same(found[:1], found[1:])


INTS = torch.zeros(5, 5, dtype=torch.int64)
ERRORS = {
    "mask int": ("encoder", {"mask": INTS}),
    "layer mask int": ("encoder layer", {"src_mask": INTS}),
    "padding int": ("encoder", {"src_key_padding_mask": torch.zeros(3, 5, dtype=torch.int64)}),
    "mask of a wrong shape": ("encoder layer", {"src_mask": torch.zeros(5, 4)}),
    "hint without a mask": ("encoder layer", {"is_causal": True}),
    "batches differ": ("transformer", {"tgt": torch.zeros(2, 5, WIDTH)}),
    "width differs": ("transformer", {"tgt": torch.zeros(3, 5, WIDTH + 1)}),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_are_torchs(name):
    kind, arguments = ERRORS[name]
    texts = []
    for where in (nn, ours):
        model = make(where, kind, batch_first=True)
        tensors = given(kind, model)[:1] if "tgt" in arguments else given(kind, model)
        with pytest.raises((AssertionError, RuntimeError)) as error:
            model(*tensors, **arguments)
        texts.append((error.type, str(error.value)))
    assert texts[0] == texts[1]


CONSTRUCTOR_ERRORS = {
    "activation": lambda where: where.TransformerEncoderLayer(WIDTH, HEADS, activation="tanh"),
    "heads": lambda where: where.TransformerDecoderLayer(WIDTH, 5),
    "width": lambda where: where.Transformer(0, HEADS),
}


@pytest.mark.parametrize("name", CONSTRUCTOR_ERRORS)
def test_constructor_errors_are_torchs(name):
    texts = []
    for where in (nn, ours):
        with pytest.raises((AssertionError, RuntimeError, ValueError)) as error:
            CONSTRUCTOR_ERRORS[name](where)
        texts.append((error.type, str(error.value)))
    assert texts[0] == texts[1]


@pytest.mark.parametrize("kind", KINDS)
def test_copies_pickles_and_saves(kind):
    model = make(ours, kind, batch_first=True, window=(2, 0), backend="reference").eval()
    tensors, file = given(kind, model), io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)):
        assert type(copied) is type(model) and torch.equal(copied(*tensors), model(*tensors))


@pytest.mark.parametrize("kind", KINDS)
def test_scripted_modules_are_torchs_and_ours_stay(kind):
    model = make(ours, kind, batch_first=True).eval()
    tensors = given(kind, model)
    before = {name: (type(module), id(module)) for name, module in model.named_modules()}
    scripted = torch.jit.script(model)
    same([scripted(*tensors)], [model(*tensors)])
    assert {name: (type(module), id(module)) for name, module in model.named_modules()} == before
    assert "fastattn" not in str(scripted.inlined_graph)


@pytest.mark.parametrize("extra", [{"backend": "reference"}, {"window": 2}, {"num_kv_heads": 2}])
@pytest.mark.parametrize("kind", KINDS)
def test_scripting_refuses_what_torch_cannot_do(kind, extra):
    model = make(ours, kind, batch_first=True, **extra)
    with pytest.raises(
        RuntimeError, match=rf"torch.jit.script is left to torch's own module, which has no {next(iter(extra))}="
    ):
        torch.jit.script(model)


class Mine(ours.TransformerEncoderLayer):
    def forward(self, src, *args, **kwargs):
        return 2 * super().forward(src, *args, **kwargs)


def test_scripting_refuses_a_subclass_whose_code_it_would_lose():
    with pytest.raises(RuntimeError, match="would lose what this subclass of fastattn's adds"):
        torch.jit.script(Mine(WIDTH, HEADS))


LOAD = """
import sys, torch, fastattn
torch.manual_seed(1)
x = torch.randn(3, 5, 24)
traced = torch.jit.load(sys.argv[1])
assert "fastattn::attention_forward" in str(traced.inlined_graph)
torch.save(traced(x), sys.argv[2])
"""


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_a_traced_model_keeps_the_operators_and_loads_elsewhere(tmp_path):
    model = make(ours, "encoder", batch_first=True, window=(1, 0), num_kv_heads=2).eval()
    torch.manual_seed(1)
    x = torch.randn(3, 5, WIDTH)
    traced = torch.jit.trace(model, (x,), check_trace=False)
    traced.save(tmp_path / "model.pt")
    done = subprocess.run(
        [sys.executable, "-c", LOAD, tmp_path / "model.pt", tmp_path / "out.pt"],
        cwd=tmp_path, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    same([torch.load(tmp_path / "out.pt")], [model(x)])


def test_nested_tensors_are_torchs():
    mine, theirs = (make(where, "encoder layer", batch_first=True).eval() for where in (ours, nn))
    nested = torch.nested.nested_tensor([torch.randn(n, WIDTH) for n in (3, 5)])
    with torch.no_grad():
        same(mine(nested).unbind(), theirs(nested).unbind())
    with pytest.raises(RuntimeError, match="a nested tensor is left to torch's own module, which has no backend="):
        make(ours, "encoder layer", batch_first=True, backend="reference").eval()(nested)


@pytest.mark.parametrize("kind", ["encoder layer", "encoder", "attention"])
def test_hooks_fire_once_for_a_nested_tensor(kind):
    nested = torch.nested.nested_tensor([torch.randn(n, WIDTH) for n in (3, 5)])
    attention = kind == "attention"
    model = ours.MultiheadAttention(WIDTH, HEADS, batch_first=True) if attention else make(ours, kind, batch_first=True)
    fired = []
    model.register_forward_pre_hook(lambda *args: fired.append("before"))
    model.register_forward_hook(lambda *args: fired.append("after"))
    with torch.no_grad():
        model.eval()(nested, nested, nested, need_weights=False) if attention else model.eval()(nested)
    assert fired == ["before", "after"]


def test_extras_reach_every_attention_and_outlast_modes():
    model = make(ours, "transformer", batch_first=True, window=(2, 0), backend="reference", num_kv_heads=2)
    found = {name: m for name, m in model.named_modules() if isinstance(m, nn.MultiheadAttention)}
    assert len(found) == 5
    for name, module in found.items():
        assert (module.backend, module.num_kv_heads) == ("reference", 2)
        assert module.window == (None if "multihead_attn" in name else (2, 0))
    tensors = given("transformer", model)
    want = model(*tensors)
    with torch.device("cpu"):  # a torch function mode, which looks at every torch call
        same([model(*tensors)], [want])
    for module in found.values():
        module.backend = "tritn"
    for mode in (torch.device("cpu"), torch.enable_grad()):
        with mode, pytest.raises(ValueError, match="nearest: 'triton'"):
            model(*tensors)
