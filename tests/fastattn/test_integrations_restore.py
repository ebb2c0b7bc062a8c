"""replace_attention and back, a model of each library, with what people do in between: hooks, parametrizations, copies,
compilers. The way back leaves state_dict, hooks, classes and numbers as they were.
"""

import copy
import importlib
import io

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from fastattn import functional, replace_attention
from fastattn.bench.models.compare import Seen, watching

pytestmark = pytest.mark.filterwarnings(
    "ignore:enable_nested_tensor", "ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning"
)


def library(name):
    try:
        return importlib.import_module(name)
    except (ImportError, RuntimeError) as failure:
        pytest.skip(f"needs {name}, of the extras models and vision: {failure}")


def torch_nn():
    layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2), (torch.randn(2, 5, 32),)


def timm():
    vit = library("timm.models.vision_transformer").VisionTransformer
    return vit(img_size=32, patch_size=8, num_classes=5, embed_dim=32, depth=2, num_heads=4), (
        torch.randn(2, 3, 32, 32),
    )


def torchvision():
    vit = library("torchvision.models").SwinTransformer
    sizes = {"patch_size": [4, 4], "embed_dim": 16, "depths": [2], "num_heads": [2], "num_classes": 5}
    return vit(**sizes, window_size=[4, 4]), (torch.randn(2, 3, 32, 32),)


def open_clip():
    return library("open_clip.transformer").ResidualAttentionBlock(32, 4), (torch.randn(2, 9, 32),)


def open_clip_pool():
    return library("open_clip.modified_resnet").AttentionPool2d(4, 32, 4, 16), (torch.randn(2, 32, 4, 4),)


def diffusers():
    unet = library("diffusers").UNet2DConditionModel(
        block_out_channels=(16,), layers_per_block=1, sample_size=8, in_channels=4, out_channels=4, norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",), cross_attention_dim=16,
        attention_head_dim=4,
    )  # fmt: skip
    return unet, (torch.randn(1, 4, 8, 8), torch.tensor([3]), torch.randn(1, 6, 16))


def flux():
    model = library("diffusers").FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=[4, 4, 8],
    )  # fmt: skip
    states = (torch.randn(1, 16, 4), torch.randn(1, 8, 32), torch.randn(1, 32), torch.tensor([1.0]))
    return model, (*states, torch.zeros(16, 3), torch.zeros(8, 3))


def zoo(row):
    from fastattn.bench.models.zoo import ZOO, randomized

    library("transformers")
    return randomized(ZOO[row].build()), (torch.randint(3, 90, (2, 9)),)


# name: how it is made; its first attention module; a weight of that; how many attention modules are exchanged
MODELS = {
    "torch.nn": (torch_nn, "layers.0.self_attn", "in_proj_weight", 2),
    "timm": (timm, "blocks.0.attn", "qkv.weight", 2),
    "torchvision": (torchvision, "features.1.0.attn", "relative_position_bias_table", 2),
    "open_clip": (open_clip, "attn", "in_proj_weight", 1),
    "open_clip, pool": (open_clip_pool, "", "positional_embedding", 1),
    "diffusers": (diffusers, "mid_block.attentions.0.transformer_blocks.0.attn1", "to_q.weight", 8),
    "diffusers, dispatcher": (flux, "transformer_blocks.0.attn", "to_q.weight", 2),
    "transformers": (lambda: zoo("llama-3"), "model.layers.0.self_attn", "q_proj.weight", 1),
    "transformers, own code": (lambda: zoo("xlnet"), "layer.0.rel_attn", "q", 2),
}
each = pytest.mark.parametrize("name", MODELS)


def made(name):
    make, path, weight, count = MODELS[name]
    torch.manual_seed(0)
    model, given = make()
    return model.eval(), given, path, weight, count


def run(model, given):
    with torch.no_grad():
        found = model(*given)
    names = ("sample", "logits", "last_hidden_state")
    return found if isinstance(found, torch.Tensor) else next(getattr(found, n) for n in names if hasattr(found, n))


def close(one, other):
    torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def state(model):
    return {name: (type(module), dict(vars(module))) for name, module in model.named_modules()}


@each
def test_hooks_that_came_before_and_in_between(name):
    model, given, path, _, count = made(name)
    module, fired = model.get_submodule(path), []
    want, kept = run(model, given), {key: tensor.clone() for key, tensor in model.state_dict().items()}
    before, seen = state(model), Seen()
    hooks = [module.register_forward_hook(lambda *_: fired.append("before"))]
    report = replace_attention(model)
    assert len(report) == count
    hooks.append(module.register_forward_hook(lambda *_: fired.append("between")))
    hooks.append(module.register_forward_pre_hook(lambda *_: fired.append("first")))
    with watching(seen):
        close(run(model, given), want)
    assert seen.masks and fired == ["first", "before", "between"]
    assert replace_attention(model).restore() is None  # a second report has nothing to undo
    report.restore()
    assert torch.equal(run(model, given), want) and fired == ["first", "before", "between"] * 2
    for hook in hooks:
        hook.remove()
    assert state(model) == before
    assert list(model.state_dict()) == list(kept)
    assert all(torch.equal(tensor, kept[key]) for key, tensor in model.state_dict().items())


@each
def test_copies_stay_exchanged(name):
    model, given, *_ = made(name)
    want = run(model, given)
    report = replace_attention(model)
    saved = io.BytesIO()
    torch.save(model, saved)
    saved.seek(0)
    copies = copy.deepcopy(model), torch.load(saved, weights_only=False)
    report.restore()
    for copied in copies:
        seen = Seen()
        with watching(seen):
            close(run(copied, given), want)
        assert seen.masks and len(replace_attention(copied)) == 0
    assert torch.equal(run(model, given), want)


@each
def test_another_backend_for_what_is_exchanged(name):
    model, given, *_, count = made(name)
    first = replace_attention(model)
    before = state(model)
    second = replace_attention(model, backend="reference")
    assert len(second) == count and all("reference" in row.what for row in second.rows if row.changed)
    assert len(replace_attention(model, backend="reference")) == 0
    backends = []
    with pytest.MonkeyPatch.context() as patch:
        inner = functional.ops.attention
        patch.setattr(
            functional.ops, "attention", lambda a, b, backend: backends.append(backend) or inner(a, b, backend)
        )
        run(model, given)
        assert set(backends) == {"reference"}
        second.restore()
        assert state(model) == before
        del backends[:]
        run(model, given)
        assert set(backends) == {None}
    first.restore()


class Longer(nn.Module):
    def forward(self, weight):
        return 1.5 * weight


@each
@pytest.mark.parametrize("when", ["before", "between"])
def test_a_parametrized_weight(name, when):
    model, given, path, weight, _ = made(name)
    want = run(model, given)
    owner, _, tensor = f"{path}.{weight}".lstrip(".").rpartition(".")
    parametrized = lambda: parametrize.register_parametrization(model.get_submodule(owner), tensor, Longer())
    if when == "before":
        parametrized()
    report = replace_attention(model)
    if when == "between":
        parametrized()
    assert report.rows
    longer = run(model, given)
    assert not torch.allclose(longer, want)
    report.restore()
    close(run(model, given), longer)
    parametrize.remove_parametrizations(model.get_submodule(owner), tensor, leave_parametrized=False)
    assert torch.equal(run(model, given), want)
    plain = made(name)[0]
    assert [type(module) for module in model.modules()] == [type(module) for module in plain.modules()]


@pytest.mark.parametrize("name", ["torch.nn", "timm", "open_clip", "transformers"])
def test_a_compiled_model(name):
    """Compiled, exchanged, put back: each call runs what the model is then."""
    model, given, *_, count = made(name)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    want = run(compiled, given)
    report = replace_attention(compiled)
    assert len(report) == count
    close(run(compiled, given), want)
    report.restore()
    assert torch.equal(run(compiled, given), want)


@pytest.mark.parametrize("name", ["torch.nn", "timm", "open_clip, pool"])
def test_a_scripted_model_is_left_alone_and_named(name):
    model, given, path, _, count = made(name)
    want = run(model, given)
    scripted = torch.jit.script(model)
    report = replace_attention(scripted)
    assert len(report) == 0 and all("it is scripted" in row.what for row in report.rows)
    assert path in {row.path for row in report.rows} and len(report.rows) >= count
    close(run(scripted, given), want)


@pytest.mark.parametrize("name", ["torch.nn", "timm", "open_clip, pool"])
def test_a_traced_model_keeps_our_operators(name):
    model, given, *_ = made(name)
    want = run(model, given)
    replace_attention(model)
    saved = io.BytesIO()
    torch.jit.save(torch.jit.trace(model, given), saved)
    saved.seek(0)
    loaded = torch.jit.load(saved)
    assert "fastattn::attention_forward" in str(loaded.inlined_graph)
    close(run(loaded, given), want)


def test_each_part_of_a_model_gets_its_own_implementation_back():
    from fastattn.bench.models.zoo import ZOO

    library("transformers")
    model = ZOO["clip"].build()
    model.set_attn_implementation({"": "eager", "text_config": "sdpa", "vision_config": "eager"})
    report = replace_attention(model)
    configs = model.config, model.text_model.config, model.vision_model.config
    assert [config._attn_implementation for config in configs] == ["fastattn"] * 3
    report.restore()
    assert [config._attn_implementation for config in configs] == ["eager", "sdpa", "eager"]


def test_a_parametrized_module_is_named():
    pool = library("open_clip.modified_resnet").AttentionPool2d(4, 32, 4, 16)
    parametrize.register_parametrization(pool, "positional_embedding", Longer())
    (row,) = replace_attention(pool).rows
    assert not row.changed and "multi_head_attention_forward, which fastattn.patch() catches" in row.what


def pickled(thing):
    saved = io.BytesIO()
    torch.save(thing, saved)
    saved.seek(0)
    return torch.load(saved, weights_only=False)


def beside(copied):
    """A report next to its model, first in its container."""

    def both(model, report):
        report, model = copied([report, model])
        return model, report

    return both


def within(copied):
    """A report that its model holds."""

    def both(model, report):
        model.how_it_was = report
        model = copied(model)
        return model, model.how_it_was

    return both


@each
@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize(
    "both",
    [beside(copy.deepcopy), within(copy.deepcopy), beside(pickled), within(pickled)],
    ids=["copied beside", "copied within", "pickled beside", "pickled within"],
)
def test_a_copied_report_is_the_copys(name, both, backend):
    model, given, *_, count = made(name)
    want = run(model, given)
    before = [type(module) for module in model.modules()]
    report = replace_attention(model, backend=backend)
    exchanged = [type(module) for module in model.modules()]
    copied, its = both(model, report)
    assert len(its) == count and str(its) == str(report)
    its.restore()
    assert [type(module) for module in copied.modules()] == before
    assert torch.equal(run(copied, given), want)
    assert [type(module) for module in model.modules()] == exchanged  # untouched
    seen = Seen()
    with watching(seen):
        close(run(model, given), want)
    assert seen.masks
    report.restore()
    assert torch.equal(run(model, given), want)


@each
def test_a_report_copied_alone_leaves_the_model_alone(name):
    model, given, *_ = made(name)
    want = run(model, given)
    report = replace_attention(model)
    for copied in (copy.deepcopy(report), pickled(report)):
        copied.restore()
        seen = Seen()
        with watching(seen):
            close(run(model, given), want)
        assert seen.masks
    second = replace_attention(model, backend="reference")  # of what is exchanged already
    copy.deepcopy(second).restore(), second.restore(), report.restore()
    assert torch.equal(run(model, given), want)


def test_a_report_on_a_parametrized_module_is_copied():
    model, given, path, weight, _ = made("timm")
    owner, _, tensor = f"{path}.{weight}".rpartition(".")
    parametrize.register_parametrization(model.get_submodule(owner), tensor, Longer())
    model.how_it_was = replace_attention(model)
    copied = copy.deepcopy(model)
    copied.how_it_was.restore()
    close(run(copied, given), run(model, given))
    assert type(copied.blocks[0].attn) is not type(model.blocks[0].attn)
