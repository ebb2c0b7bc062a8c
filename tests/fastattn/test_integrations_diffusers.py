"""diffusers: the dispatcher's backend "fastattn", and processors exchanged in place."""

import copy

import pytest
import torch

from fastattn import replace_attention
from fastattn.dispatch import BackendUnavailable
from fastattn.integrations.diffusers import attention, register

try:
    from diffusers import FluxTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel
    from diffusers.models.attention_dispatch import AttentionBackendName, attention_backend
    from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
except (ImportError, RuntimeError) as failure:
    pytest.skip(f"needs diffusers, of the extra models: {failure}", allow_module_level=True)


def flux():
    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=[4, 4, 8],
    )  # fmt: skip
    given = {
        "hidden_states": torch.randn(1, 16, 4),
        "encoder_hidden_states": torch.randn(1, 8, 32),
        "pooled_projections": torch.randn(1, 32),
        "timestep": torch.tensor([1.0]),
        "img_ids": torch.zeros(16, 3),
        "txt_ids": torch.zeros(8, 3),
    }
    return model.eval(), given


def unet():
    torch.manual_seed(0)
    model = UNet2DConditionModel(
        block_out_channels=(16, 32), layers_per_block=1, sample_size=8, in_channels=4, out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16, attention_head_dim=4, norm_num_groups=4,
    )  # fmt: skip
    given = {
        "sample": torch.randn(1, 4, 8, 8),
        "timestep": torch.tensor([3]),
        "encoder_hidden_states": torch.randn(1, 6, 16),
        "encoder_attention_mask": torch.tensor([[1, 1, 1, 1, 0, 0]]),
    }
    return model.eval(), given


def sd3():
    """Joint attention; in its first block a second one, of the same processor."""
    torch.manual_seed(0)
    model = SD3Transformer2DModel(
        sample_size=8, patch_size=1, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=4,
        joint_attention_dim=32, caption_projection_dim=32, pooled_projection_dim=16, out_channels=4,
        dual_attention_layers=(0,), qk_norm="rms_norm",
    )  # fmt: skip
    given = {
        "hidden_states": torch.randn(1, 4, 8, 8),
        "encoder_hidden_states": torch.randn(1, 6, 32),
        "pooled_projections": torch.randn(1, 16),
        "timestep": torch.tensor([3]),
    }
    return model.eval(), given


def sdxl():
    """A UNet with several transformer blocks a level, text and sizes beside the time, padded text."""
    torch.manual_seed(0)
    model = UNet2DConditionModel(
        block_out_channels=(16, 32), layers_per_block=1, sample_size=8, in_channels=4, out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2), attention_head_dim=(2, 4), use_linear_projection=True,
        addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=64,
        cross_attention_dim=16, norm_num_groups=8,
    )  # fmt: skip
    given = {
        "sample": torch.randn(2, 4, 8, 8),
        "timestep": torch.tensor([3, 700]),
        "encoder_hidden_states": torch.randn(2, 7, 16),
        "encoder_attention_mask": torch.tensor([[1] * 7, [1] * 4 + [0] * 3]),
        "added_cond_kwargs": {"text_embeds": torch.randn(2, 16), "time_ids": torch.randn(2, 6)},
    }
    return model.eval(), given


MODELS = {
    "Flux, dispatcher": (flux, 2),
    "UNet, processors": (unet, 8),
    "SD3, a shared processor": (sd3, 3),
    "SDXL": (sdxl, 16),
}


def results(model, given):
    out = model(**given).sample
    return out, *torch.autograd.grad(out.square().sum(), list(model.parameters()), allow_unused=True)


@pytest.mark.parametrize("name", MODELS)
def test_exchanged_and_put_back(name, calls, same):
    make, count = MODELS[name]
    model, given = make()
    want = results(model, given)
    processors = [(type(each), dict(vars(each))) for each in model.attn_processors.values()]
    report = replace_attention(model)
    assert len(report) == count and all("fastattn" in row.what or "the same as" in row.what for row in report.rows)
    have = results(model, given)
    same(have, want)
    assert len(calls) == count
    assert torch.equal(copy.deepcopy(model)(**given).sample, have[0])
    assert [type(each).__name__ for each in model.attn_processors.values()] == [t.__name__ for t, _ in processors]
    assert {row.what for row in replace_attention(model).rows} == {"it is on fastattn already"}
    report.restore()
    assert [(type(each), dict(vars(each))) for each in model.attn_processors.values()] == processors
    del calls[:]
    for one, other in zip(results(model, given), want, strict=True):
        assert one is other is None or torch.equal(one, other)
    assert not calls


@pytest.mark.parametrize("name", ["Flux, dispatcher", "UNet, processors"])
def test_a_backend_by_name(name, calls):
    model, given = MODELS[name][0]()
    report = replace_attention(model, backend="reference")
    model(**given)
    assert set(calls) == {"reference"}
    report.restore()
    replace_attention(model, backend="triton")
    model.double()
    doubled = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in given.items()}
    with pytest.raises((BackendUnavailable, RuntimeError), match="triton"):
        model(**doubled)


def test_the_dispatchers_own_ways_to_choose(calls, same):
    model, given = flux()
    want = model(**given).sample
    member = register()
    assert register() is member is AttentionBackendName("fastattn") and str(member.value) == "fastattn"
    with attention_backend("fastattn"):
        same([model(**given).sample], [want])
    assert len(calls) == 2
    model(**given)
    assert len(calls) == 2
    with attention_backend("native"):  # whatever set_attention_backend makes active is undone here
        model.set_attention_backend("fastattn")
        same([model(**given).sample], [want])
        assert len(calls) == 4
        model.reset_attention_backend()
    with pytest.raises(ValueError, match="nearest: 'triton'"):
        register("tritn")


def test_a_dispatched_model_compiles(same):
    model, given = flux()
    want = model(**given).sample
    replace_attention(model)
    torch._dynamo.reset()
    same([torch.compile(model, fullgraph=True, backend="aot_eager")(**given).sample], [want])


def test_what_is_not_known_is_left_alone():
    model, _ = unet()

    class Mine(AttnProcessor2_0):
        pass

    first, second = list(model.attn_processors)[:2]
    model.set_attn_processor({**model.attn_processors, first: AttnProcessor(), second: Mine()})
    rows = {row.path: row for row in replace_attention(model).rows}
    plain, mine = (rows[name.removesuffix(".processor")] for name in (first, second))
    assert not plain.changed and "AttnProcessor computes the weights itself" in plain.what
    assert not mine.changed and "is not diffusers' own" in mine.what


@pytest.mark.parametrize("shape", [(2, 5), (2, 1, 1, 5), (1, 4, 3, 5)])
@pytest.mark.parametrize("kind", [torch.bool, torch.float32])
def test_the_backends_function(shape, kind):
    query, key = torch.randn(2, 3, 4, 8), torch.randn(2, 5, 2, 8)
    mask = torch.rand(shape) > 0.3
    mask[..., 0] = True
    given = mask if kind == torch.bool else torch.zeros(shape).masked_fill(~mask, float("-inf"))
    table = mask[:, None, None] if mask.dim() == 2 else mask
    q, k = query.transpose(1, 2), key.transpose(1, 2)
    want = torch.nn.functional.scaled_dot_product_attention(q, k, k, table, scale=0.3, enable_gqa=True)
    have = attention(query, key, key, attn_mask=given, scale=0.3, enable_gqa=True)
    torch.testing.assert_close(have, want.transpose(1, 2))
    for refused in ({"return_lse": True}, {"_parallel_config": object()}):
        with pytest.raises(ValueError, match="diffusers' backend 'fastattn' does not offer it"):
            attention(query, key, key, enable_gqa=True, **refused)
