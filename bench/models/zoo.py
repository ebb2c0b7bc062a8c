"""The architectures: how each is built, small and random, and what goes in. A row each in docs/models.md.

Configurations are those of the released models in kind (heads, groups, norms, masks) and scaled down in depth and
width. Weights are drawn so that attention is far from uniform: a tenth off in the scale shows in every output.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastattn.bench.models.modules import AttentionPool, HeadsFastest

Inputs = dict[str, Any]

BATCH, LENGTH, VOCABULARY = 2, 21, 96
TARGET = 9  # a decoder's tokens
PADDED = 6
WINDOW = 5

DECODER: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
ENCODER: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip
VISION: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32,
    "patch_size": 8,
}  # fmt: skip


@dataclass(frozen=True)
class Model:
    """One architecture. `build` makes it (float32, untrained), `inputs` what it is fed; `by` is how fastattn gets in:
    "interface" (set_attn_implementation), "replace" (fastattn.integrations.transformers.replace), "patch"
    (fastattn.patch()), "truncate" (the interface, each query seeing WINDOW neighbours).

    `pads` names the sides a batch may be padded on, `decodes` whether it generates with a cache; `masks` what its
    attention is given: the masks' names, "bias" for scores that are added.
    """

    name: str
    what: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], Inputs]
    masks: str
    by: str = "interface"
    pads: tuple[str, ...] = ()
    decodes: bool = False
    needs: str = "transformers"


ZOO: dict[str, Model] = {}


def row(
    name: str, what: str, inputs: Callable[[], Inputs], masks: str, **rest: Any
) -> Callable[[Callable[[], nn.Module]], Callable[[], nn.Module]]:
    """Put a model into the zoo."""

    def add(build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
        key = name.lower().replace(" ", "-").replace(",", "")
        ZOO[key] = Model(name, what, build, inputs, masks, **rest)
        return build

    return add


def randomized(model: nn.Module) -> nn.Module:
    """The model with weights that make sharp attention: matrices of gain 1.3, vectors off their usual 0 and 1."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                fan_in = parameter.shape[1:].numel() if parameter.dim() != 3 else parameter.shape[0]
                parameter.normal_(0.0, 1.3 / math.sqrt(max(fan_in, 1)))
            else:
                parameter.add_(torch.randn_like(parameter) * 0.2)
        for module in model.modules():
            if isinstance(module, nn.Embedding):
                module.weight.normal_()
    return model.eval()


def tokens() -> Inputs:
    return {"input_ids": torch.randint(3, VOCABULARY, (BATCH, LENGTH))}


def images() -> Inputs:
    return {"pixel_values": torch.randn(BATCH, 3, 32, 32)}


def pairs() -> Inputs:
    return {**tokens(), "decoder_input_ids": torch.randint(3, VOCABULARY, (BATCH, TARGET))}


def padded(inputs: Inputs, side: str) -> Inputs:
    """The same with the first sequence padded: `attention_mask` 0 on its left or its right."""
    length = inputs["input_ids" if "input_ids" in inputs else "input_values"].shape[1]  # tokens, or samples of sound
    count = length * PADDED // LENGTH
    real = torch.ones(BATCH, length, dtype=torch.long)
    real[0, slice(0, count) if side == "left" else slice(length - count, None)] = 0
    return {**inputs, "attention_mask": real}


def _transformers(name: str, config: str, **fields: Any) -> Any:
    import transformers

    return getattr(transformers, name)(getattr(transformers, config)(**fields))


# ---- vision


@row("ViT", "ViTModel", images, "full")
def _vit() -> nn.Module:
    return _transformers("ViTModel", "ViTConfig", **VISION)


@row("CLIP", "CLIPModel: text (causal) and vision", lambda: {**tokens(), **images()}, "causal, full", pads=("right",))
def _clip() -> nn.Module:
    text = {**ENCODER, "bos_token_id": 1, "eos_token_id": 2}
    return _transformers("CLIPModel", "CLIPConfig", text_config=text, vision_config=VISION, projection_dim=32)


@row("CLIP, attention pool", "the ResNet models' pool: F.multi_head_attention_forward with one query",
     lambda: {"features": torch.randn(BATCH, 64, 4, 4)}, "full", by="patch", needs="torch")  # fmt: skip
def _pool() -> nn.Module:
    return AttentionPool(16, 64, 4, 32)


@row("Swin", "SwinModel: shifted windows, learned relative bias", images, "bias")
def _swin() -> nn.Module:
    return _transformers(
        "SwinModel", "SwinConfig", image_size=32, patch_size=2, embed_dim=32, depths=[2, 2], num_heads=[2, 4],
        window_size=4, drop_path_rate=0.0,
    )  # fmt: skip


@row("DETR", "DetrForObjectDetection: encoder, decoder, cross-attention", images, "full")
def _detr() -> nn.Module:
    import transformers

    backbone = transformers.AutoConfig.for_model(
        "resnet",
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], out_features=["stage2"], layer_type="basic",
    )  # fmt: skip
    sizes = {f"{side}_{what}": n for side in ("encoder", "decoder")
             for what, n in (("layers", 1), ("attention_heads", 4), ("ffn_dim", 64))}  # fmt: skip
    return _transformers(
        "DetrForObjectDetection", "DetrConfig", backbone_config=backbone, d_model=64, num_queries=7, **sizes
    )


@row("SuperGlue", "its attentional graph: self and cross, two images", lambda: {
         "descriptors": torch.randn(4, 17, 64), "mask": _keypoints(), "output_hidden_states": True,
     }, "bias of one row", by="replace")  # fmt: skip
def _superglue() -> nn.Module:
    import transformers
    from transformers.models.superglue import modeling_superglue

    config = transformers.SuperGlueConfig(
        hidden_size=64, keypoint_encoder_sizes=[8], gnn_layers_types=["self", "cross"] * 2, num_attention_heads=4
    )
    config._attn_implementation = "eager"
    return modeling_superglue.SuperGlueAttentionalGNN(config)


@row("SuperGlue, heads fastest", "the original's layout: channels head_dim by heads, heads fastest",
     lambda: {"x": torch.randn(BATCH, 64, 17), "source": torch.randn(BATCH, 64, 13)}, "full", by="patch",
     needs="torch")  # fmt: skip
def _superglue_original() -> nn.Module:
    return HeadsFastest(4, 64)


@row("DiT", "diffusers' DiTTransformer2DModel", lambda: {
         "hidden_states": torch.randn(BATCH, 4, 8, 8), "timestep": torch.tensor([3, 700]),
         "class_labels": torch.tensor([1, 5]),
     }, "full", by="patch", needs="diffusers")  # fmt: skip
def _dit() -> nn.Module:
    diffusers: Any = importlib.import_module("diffusers")
    return diffusers.DiTTransformer2DModel(
        num_attention_heads=4, attention_head_dim=16, num_layers=2, sample_size=8, norm_num_groups=4,
        num_embeds_ada_norm=1000,
    )  # fmt: skip


# ---- encoders of text and speech


@row("BERT", "BertModel", tokens, "full", pads=("right", "left"))
def _bert() -> nn.Module:
    return _transformers("BertModel", "BertConfig", **ENCODER)


@row("ModernBERT", "ModernBertModel: local and global layers", tokens, "window, full", pads=("right", "left"))
def _modernbert() -> nn.Module:
    return _transformers(
        "ModernBertModel", "ModernBertConfig", **{**ENCODER, "num_hidden_layers": 3}, local_attention=6,
        bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2,
    )  # fmt: skip


@row("XLNet", "XLNetModel: two streams, a permutation mask, segments", lambda: {**tokens(), **_permutation()},
     "table, bias", by="replace")  # fmt: skip
def _xlnet() -> nn.Module:
    model = _transformers(
        "XLNetModel", "XLNetConfig", vocab_size=VOCABULARY, d_model=64, n_layer=2, n_head=4, d_inner=96
    )
    for layer in model.layer:  # its positions are float32 whatever the weights are
        layer.rel_attn.register_forward_pre_hook(_in_weights_dtype)
    return model


@row("Whisper's encoder, truncated", f"WhisperEncoder, {WINDOW} frames to each side",
     lambda: {"input_features": torch.randn(BATCH, 16, 64)}, "window", by="truncate")  # fmt: skip
def _whisper() -> nn.Module:
    return _transformers("WhisperModel", "WhisperConfig", **WHISPER).encoder


def sound() -> Inputs:
    return {"input_values": torch.randn(BATCH, 400)}


@row("Wav2Vec2", "Wav2Vec2Model", sound, "full", pads=("right",))
def _wav2vec2() -> nn.Module:
    return _transformers("Wav2Vec2Model", "Wav2Vec2Config", **WAV2VEC2)


@row("Wav2Vec2-Conformer", "Wav2Vec2ConformerModel: relative positions (Transformer-XL's)", sound, "bias",
     pads=("right",))  # fmt: skip
def _conformer() -> nn.Module:
    return _transformers("Wav2Vec2ConformerModel", "Wav2Vec2ConformerConfig", **WAV2VEC2)


@row("Wav2Vec2-Conformer, truncated", f"rotary positions, {WINDOW} frames to each side", sound, "window",
     by="truncate")  # fmt: skip
def _conformer_truncated() -> nn.Module:
    return _transformers(
        "Wav2Vec2ConformerModel", "Wav2Vec2ConformerConfig", **WAV2VEC2, position_embeddings_type="rotary"
    )


# ---- encoders with decoders


@row("T5", "T5ForConditionalGeneration: learned position bias", pairs, "bias, causal", pads=("right",), decodes=True)
def _t5() -> nn.Module:
    return _transformers(
        "T5ForConditionalGeneration", "T5Config", vocab_size=VOCABULARY, d_model=64, d_kv=16, d_ff=96, num_layers=2,
        num_decoder_layers=2, num_heads=4, decoder_start_token_id=0,
    )  # fmt: skip


@row("BART", "BartForConditionalGeneration", pairs, "full, causal", pads=("right",), decodes=True)
def _bart() -> nn.Module:
    sizes = {f"{side}_{what}": n for side in ("encoder", "decoder")
             for what, n in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 96))}  # fmt: skip
    return _transformers(
        "BartForConditionalGeneration", "BartConfig", vocab_size=VOCABULARY, d_model=64, max_position_embeddings=64,
        **sizes,
    )  # fmt: skip


# ---- decoders


def _decoder(name: str, what: str, masks: str = "causal") -> Any:
    return row(name, what, tokens, masks, pads=("left", "right"), decodes=True)


@_decoder("GPT-2", "GPT2LMHeadModel")
def _gpt2() -> nn.Module:
    return _transformers(
        "GPT2LMHeadModel", "GPT2Config", vocab_size=VOCABULARY, n_embd=64, n_layer=2, n_head=4, n_positions=64
    )


@_decoder("Llama 3", "LlamaForCausalLM: the 8B configuration at 1/64 of its width, 2 of 32 layers")
def _llama() -> nn.Module:
    fields = {**DECODER, "hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 8}
    return _transformers(
        "LlamaForCausalLM", "LlamaConfig", **fields, rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    )  # fmt: skip


@_decoder("Llama 4", "Llama4ForCausalLM: chunked attention", "chunked, causal")
def _llama4() -> nn.Module:
    return _transformers(
        "Llama4ForCausalLM", "Llama4TextConfig", **{**DECODER, "num_hidden_layers": 4}, attention_chunk_size=6,
        num_local_experts=2, num_experts_per_tok=2, intermediate_size_mlp=96,
    )  # fmt: skip


@_decoder("Qwen3", "Qwen3ForCausalLM: normalised queries and keys")
def _qwen3() -> nn.Module:
    return _transformers("Qwen3ForCausalLM", "Qwen3Config", **DECODER)


@_decoder("Mistral", "MistralForCausalLM: sliding window", "window")
def _mistral() -> nn.Module:
    return _transformers("MistralForCausalLM", "MistralConfig", **DECODER, sliding_window=6)


@_decoder("Gemma 2", "Gemma2ForCausalLM: soft cap, every other layer a window", "window, causal")
def _gemma2() -> nn.Module:
    return _transformers(
        "Gemma2ForCausalLM", "Gemma2Config", **DECODER, sliding_window=6, query_pre_attn_scalar=16,
        attn_logit_softcapping=5.0,
    )  # fmt: skip


@_decoder("gpt-oss", "GptOssForCausalLM: learned sinks, every other layer a window", "window, causal")
def _gpt_oss() -> nn.Module:
    return _transformers(
        "GptOssForCausalLM", "GptOssConfig", **DECODER, sliding_window=6, num_local_experts=2, num_experts_per_tok=2,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0}, experts_implementation="eager",
    )  # fmt: skip


WHISPER: dict[str, Any] = {
    "vocab_size": VOCABULARY, "d_model": 64, "encoder_layers": 2, "decoder_layers": 1, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96, "num_mel_bins": 16,
    "max_source_positions": 32, "max_target_positions": 32, "decoder_start_token_id": 1, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


WAV2VEC2: dict[str, Any] = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96, "conv_dim": (16, 16),
    "conv_stride": (5, 2), "conv_kernel": (10, 3), "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4, "mask_time_prob": 0.0,
}  # fmt: skip


def _in_weights_dtype(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    floats = [isinstance(each, Tensor) and each.is_floating_point() for each in args]
    return tuple(each.to(module.r.dtype) if cast else each for each, cast in zip(args, floats, strict=True))


def _keypoints() -> Tensor:
    """Added to the scores of four images, [4, 1, 1, 17]: the last keypoints of the first are padding."""
    real = torch.ones(4, 1, 1, 17)
    real[0, ..., -5:] = 0
    return (1.0 - real) * torch.finfo(torch.float32).min


def _permutation() -> Inputs:
    """XLNet's order of prediction: a token sees those that come before it in a random order; three are predicted."""
    order = torch.stack([torch.randperm(LENGTH) for _ in range(BATCH)])
    hidden = (order[:, :, None] <= order[:, None, :]).float()
    targets = torch.zeros(BATCH, 3, LENGTH)
    targets[:, torch.arange(3), torch.tensor([2, 11, 20])] = 1.0
    return {
        "perm_mask": hidden,
        "target_mapping": targets,
        "token_type_ids": (torch.arange(LENGTH) > LENGTH // 2).long().expand(BATCH, -1).clone(),
        "use_mems": False,
    }
