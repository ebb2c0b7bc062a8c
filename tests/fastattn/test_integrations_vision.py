"""Models of timm, torchvision and open_clip: exchanged and put back; numbers, gradients, copies, reports."""

import copy
import pickle

import pytest
import torch
from torch import nn

from fastattn import patch, replace_attention
from fastattn.dispatch import BackendUnavailable

try:
    import open_clip.model
    import timm
    import torchvision
    from open_clip.modified_resnet import AttentionPool2d
    from open_clip.transformer import Attention, AttentionalPooler, ResidualAttentionBlock
    from timm.models.eva import Eva
    from timm.models.swin_transformer import SwinTransformer
    from timm.models.swin_transformer_v2 import SwinTransformerV2
    from timm.models.vision_transformer import VisionTransformer
except (ImportError, RuntimeError) as failure:
    pytest.skip(f"needs the extra vision: {failure}", allow_module_level=True)

IMAGE, TOKENS, MAP = (2, 3, 32, 32), (2, 9, 32), (2, 32, 4, 4)
VIT = {"img_size": 32, "patch_size": 8, "num_classes": 5, "embed_dim": 32, "depth": 2, "num_heads": 4}
SWIN = {"img_size": 32, "patch_size": 2, "window_size": 4, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4)}
TV_VIT = {"image_size": 32, "patch_size": 8, "num_layers": 2, "num_heads": 2, "hidden_dim": 32, "mlp_dim": 64}

# name: how it is made, its input's shape, how many modules are exchanged
MODELS = {
    "timm ViT": (lambda: VisionTransformer(**VIT), IMAGE, 2),
    "timm ViT, unfused": (lambda: unfused(VisionTransformer(**VIT)), IMAGE, 2),
    "timm ViT, normed, gated": (lambda: VisionTransformer(**VIT, qk_norm=True, scale_attn_norm=True), IMAGE, 2),
    "timm ViT, differential": (lambda: VisionTransformer(**VIT, attn_layer="diff"), IMAGE, 2),
    "timm ViT, pooled by attention": (lambda: VisionTransformer(**VIT, global_pool="map", class_token=False), IMAGE, 3),
    "timm EVA, rotary": (lambda: Eva(**VIT, use_rot_pos_emb=True, use_abs_pos_emb=False), IMAGE, 2),
    "timm Swin": (lambda: SwinTransformer(**SWIN), IMAGE, 4),
    "timm attention pool": (lambda: timm.layers.AttentionPool2d(32, 4, out_features=16, num_heads=4), MAP, 1),
    "torchvision ViT": (lambda: torchvision.models.VisionTransformer(**TV_VIT), IMAGE, 2),
    "torchvision Swin": (lambda: tv_swin(), IMAGE, 4),
    "torchvision Swin, odd sizes": (lambda: tv_swin(window_size=[3, 5]), (2, 3, 36, 44), 4),
    "torchvision Swin v2": (
        lambda: tv_swin(block=torchvision.models.swin_transformer.SwinTransformerBlockV2),
        IMAGE,
        4,
    ),
    "open_clip block": (lambda: ResidualAttentionBlock(32, 4), TOKENS, 1),
    "open_clip attention pool": (lambda: AttentionPool2d(4, 32, 4, 16), MAP, 1),
    "open_clip attentional pooler": (lambda: AttentionalPooler(32, 32, n_head=4, n_queries=5), TOKENS, 1),
    "open_clip attention": (lambda: Attention(32, 4, qk_norm=True, scale_heads=True), TOKENS, 1),
    "open_clip CLIP": (lambda: clip(), None, 4),
}


def tv_swin(**more):
    """Its second stage is one window, which is not shifted."""
    sizes = {"patch_size": [4, 4], "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "num_classes": 5}
    return torchvision.models.swin_transformer.SwinTransformer(**sizes | {"window_size": [4, 4]} | more)


def unfused(model):
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    return model


class Towers(nn.Module):
    """CLIP's two towers on fixed images and texts."""

    def __init__(self, clip):
        super().__init__()
        self.clip = clip

    def forward(self):
        generator = torch.Generator().manual_seed(1)
        images = torch.randn(IMAGE, generator=generator)
        texts = torch.randint(1, 50, (2, 8), generator=generator)
        return torch.cat([self.clip.encode_image(images), self.clip.encode_text(texts)])


def clip():
    vision = {"layers": 2, "width": 32, "head_width": 8, "patch_size": 8, "image_size": 32}
    text = {"context_length": 8, "vocab_size": 50, "width": 32, "heads": 4, "layers": 2}
    return Towers(open_clip.model.CLIP(16, vision, text))


def made(name):
    make, shape, count = MODELS[name]
    torch.manual_seed(0)
    model = make()
    with torch.no_grad():
        for parameter in model.parameters():  # so that scores are no trifle
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model, [] if shape is None else [torch.randn(shape)], count


def results(model, given):
    out = model(*given)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return out, *torch.autograd.grad(out.square().sum(), parameters, allow_unused=True)


def state(model):
    return {
        name: (type(module), dict(vars(module)), list(module._forward_hooks)) for name, module in model.named_modules()
    }


@pytest.mark.parametrize("name", MODELS)
def test_numbers_gradients_and_the_way_back(name, calls, same):
    model, given, count = made(name)
    model.eval()
    seen = []
    attends = next(module for module in model.modules() if "ttention" in type(module).__name__)
    attends.register_forward_hook(lambda *_: seen.append(1))
    want = results(model, given)
    before, tensors = state(model), {key: tensor.clone() for key, tensor in model.state_dict().items()}
    del seen[:]
    report = replace_attention(model)
    assert len(report) == count
    have = results(model, given)
    same(have, want)
    assert calls and seen
    assert list(model.state_dict()) == list(tensors)
    path = next(name for name, module in model.named_modules() if module is attends)
    assert isinstance(attends, before[path][0])
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(replaced_again(name)))):
        assert [type(module).__name__ for module in copied.modules()] == [type(m).__name__ for m in model.modules()]
        same([copied.eval()(*given)], have[:1])
    report.restore()
    assert state(model) == before
    assert all(torch.equal(tensor, tensors[key]) for key, tensor in model.state_dict().items())
    del calls[:]
    for one, other in zip(results(model, given), want, strict=True):
        assert one is other is None or torch.equal(one, other)
    assert not calls


def replaced_again(name):
    """Another one of the same numbers, without a hook that cannot be pickled."""
    model, _, _ = made(name)
    replace_attention(model)
    return model


@pytest.mark.parametrize("name", ["timm ViT", "timm Swin", "torchvision Swin", "open_clip attention pool"])
def test_a_backend_by_name(name, calls):
    model, given, _ = made(name)
    report = replace_attention(model, backend="reference")
    model(*given)
    assert set(calls) == {"reference"}
    report.restore()
    replace_attention(model.double(), backend="triton")
    with pytest.raises(BackendUnavailable, match="backend 'triton' cannot run this call"):
        model(*[tensor.double() for tensor in given])


def test_training_with_dropout_is_reproducible():
    torch.manual_seed(0)
    model = VisionTransformer(**VIT, attn_drop_rate=0.5)
    replace_attention(model)
    image, outs = torch.randn(IMAGE), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outs.append(model(image))
    assert torch.equal(outs[0], outs[1]) and not torch.equal(outs[0], outs[2])


def test_an_exchanged_vit_compiles_and_exports(same):
    model, given, _ = made("timm ViT")
    model.eval()
    want = model(*given)
    replace_attention(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    same([compiled(*given)], [want])
    graph = torch.export.export(model, tuple(given)).graph
    assert sum("fastattn" in str(node.target) for node in graph.nodes) == 2


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_scripting_puts_the_librarys_code_back(same):
    model, given, _ = made("open_clip attention pool")
    want = model(*given)
    replace_attention(model)
    same([torch.jit.script(model)(*given)], [want])
    replace_attention(other := made("open_clip attention pool")[0], backend="reference")
    with pytest.raises(RuntimeError, match="has no backend= "):
        torch.jit.script(other)


class Own(timm.layers.Attention):
    def forward(self, x, *args, **kwargs):
        return 2 * super().forward(x, *args, **kwargs)


class SomebodysAttention(nn.Module):
    def forward(self, x):
        return (x @ x.transpose(-1, -2)).softmax(-1) @ x


class CallsTorch(nn.Module):
    def forward(self, x):
        return nn.functional.scaled_dot_product_attention(x, x, x)


class Zoo(nn.Module):
    def __init__(self):
        super().__init__()
        self.plain = timm.layers.Attention(32, 4)
        self.own, self.somebodys, self.calls = Own(32, 4), SomebodysAttention(), CallsTorch()
        self.cosine = Attention(32, 4, scaled_cosine=True)
        self.patched = timm.layers.Attention(32, 4)
        self.patched.forward = lambda x: x
        self.swin = SwinTransformerV2(**SWIN).layers[0].blocks[0].attn
        self.drop = timm.layers.DropPath(0.1)
        self.gated = timm.models.convit.GPSA(32, 4)


LEFT_ALONE = {
    "own": "Own is not known here",
    "somebodys": "SomebodysAttention is not known here, and its forward calls none of torch's attention functions",
    "calls": "CallsTorch is not known here; it calls scaled_dot_product_attention, which fastattn.patch() catches",
    "cosine": "with scaled_cosine=True it computes the weights itself",
    "gated": "GPSA is not known here, and its forward calls none of torch's attention functions",
    "patched": "its forward was replaced on the instance",
    "swin": "WindowAttention is not known here, and its forward calls none of torch's attention functions",
}


def test_what_is_unknown_or_half_known_is_left_alone_and_named():
    model = Zoo()
    before = state(model)
    report = replace_attention(model)
    rows = {row.path: row for row in report.rows}
    assert set(rows) == {"plain", *LEFT_ALONE} and len(report) == 1
    for path, text in LEFT_ALONE.items():
        assert not rows[path].changed and text in rows[path].what
    after = state(model)
    assert {name for name in before if before[name] != after[name]} == {"plain"}
    again = {row.path: row for row in replace_attention(model).rows}
    assert again["plain"].what == "it is on fastattn already"


def test_patch_reaches_clips_attention_pool(calls, same):
    model, given, _ = made("open_clip attention pool")
    want = model(*given)
    with patch():
        same([model(*given)], [want])
    assert len(calls) == 1


def test_a_torchvision_that_does_it_otherwise_is_left_alone(monkeypatch):
    monkeypatch.setattr(torchvision.models.swin_transformer, "shifted_window_attention", lambda x, sizes: x)
    report = replace_attention(tv_swin())
    assert len(report) == 0 and len(report.rows) == 4
    assert all("takes other arguments than the ones known here" in row.what for row in report.rows)
