"""Every model family of the installed transformers, built tiny from its configuration, and what goes into each.

Nothing is downloaded: configurations come from their classes, with the sizes below where they have such fields, and
weights are drawn so that attention matters. What fits most families is tried in turn until eager attention runs.
"""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import torch
from torch import nn

from fastattn.bench.models.family_inputs import VOCABULARY, candidates, padded

__all__ = ["NotBuilt", "built", "families", "padded"]

MOST_PARAMETERS = 9_000_000
"""A family that this file makes no smaller is not swept."""

SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "unpadded_vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "start_token_id": 1, "decoder_start_token_id": 2, "num_labels": 3,
    **dict.fromkeys((
        "hidden_size", "d_model", "n_embd", "embedding_size", "word_embed_proj_dim", "projection_dim", "embed_dim",
        "encoder_hidden_size", "decoder_hidden_size", "encoder_embed_dim", "decoder_embed_dim", "vision_embed_dim",
        "out_hidden_size", "hidden_dim", "model_dim", "dim", "text_hidden_size", "vision_hidden_size", "conv_dim_out",
        "max_2d_position_embeddings_dim", "shared_projection_size",
    ), 32),
    **dict.fromkeys((
        "intermediate_size", "encoder_ffn_dim", "decoder_ffn_dim", "ffn_dim", "d_ff", "decoder_intermediate_size",
        "ffn_hidden_size", "inner_dim", "n_inner",
    ), 48),
    **dict.fromkeys((
        "num_hidden_layers", "n_layer", "num_layers", "encoder_layers", "decoder_layers", "decoder_num_hidden_layers",
        "decoder_num_layers", "num_decoder_layers", "num_encoder_layers", "encoder_num_hidden_layers", "depth",
    ), 2),
    **dict.fromkeys((
        "num_attention_heads", "n_head", "num_heads", "encoder_attention_heads", "decoder_attention_heads",
        "decoder_num_attention_heads", "decoder_num_heads", "swa_num_attention_heads", "encoder_num_attention_heads",
    ), 4),
    "num_key_value_heads": 2, "swa_num_key_value_heads": 2, "head_dim": 8, "swa_head_dim": 8, "v_head_dim": 8,
    "d_kv": 8, "query_pre_attn_scalar": 8, "rotary_dim": 4, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8,
    "q_lora_rank": 16, "kv_lora_rank": 16, "index_topk": 4, "index_n_heads": 2, "index_head_dim": 8, "d_rel": 4,
    "rel_extent": 16, "sliding_window": 5, "sliding_window_size": 5, "attention_chunk_size": 4,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1,
    "topk_group": 1, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "n_shared_experts": 1,
    "first_k_dense_replace": 1, "max_position_embeddings": 128, "n_positions": 128,
    "max_source_positions": 50, "image_size": 32, "patch_size": 8, "mlp_ratio": 2, "num_queries": 5,
    "num_mel_bins": 16, "num_frames": 2, "bottleneck_features": 16, "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": VOCABULARY, "output_channels": 32,
    **dict.fromkeys(
        ("dropout", "attention_dropout", "hidden_dropout", "hidden_dropout_prob", "attention_probs_dropout_prob"), 0.0
    ),
}  # fmt: skip
"""By the names of fields; what a configuration does not have is left out."""

VARIANTS: list[dict[str, Any]] = [
    {},
    {"num_key_value_heads": 4, "swa_num_key_value_heads": 4},  # no grouped heads
    {"num_hidden_layers": 4},  # a pattern of four layers
    {"num_hidden_layers": 4, "num_key_value_heads": 4},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 0]}},
    {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_expand": 2, "num_hidden_layers": 4},
    {"hidden_size": 64, "head_dim": 16, "num_key_value_heads": 4},
]
"""Tried in turn, on a configuration and on those inside it."""


_SWIN = {
    "image_size": 32, "patch_size": 2, "window_size": 4, "depths": [1, 1], "num_heads": [2, 4], "embed_dim": 16,
}  # fmt: skip
_SERIES = {"prediction_length": 8, "context_length": 8, "num_time_features": 1}
_ENTITIES = {"entity_vocab_size": 9, "entity_emb_size": 32}
OWN: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("informer", "time_series_transformer"), _SERIES),
    **dict.fromkeys(("swin", "swinv2", "donut-swin", "maskformer-swin"), _SWIN),
    **dict.fromkeys(("luke", "mluke"), _ENTITIES),
    "bridgetower": {"hidden_size": 64, "vision_config": {"hidden_size": 64}, "text_config": {"hidden_size": 64}},
    "clap_audio_model": {
        "spec_size": 64, "num_mel_bins": 16, "patch_size": 4, "patch_stride": [4, 4], "window_size": 4,
        "depths": [1, 1], "num_attention_heads": [2, 4], "patch_embeds_hidden_size": 16,
    },
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_chunk_size": 16},
    "funnel": {"block_sizes": [1, 1]},
    "gemma3n_text": {
        "intermediate_size": [48] * 4, "num_hidden_layers": 4, "num_kv_shared_layers": 0,
        "activation_sparsity_pattern": None, "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "layoutlmv3": {"coordinate_size": 5, "shape_size": 6},
    "nllb-moe": {"encoder_sparse_step": 1, "decoder_sparse_step": 1, "num_experts": 4, "expert_capacity": 8},
    "reformer": {"axial_pos_embds": False},
    "roc_bert": {
        "pronunciation_vocab_size": 9, "shape_vocab_size": 9, "pronunciation_embed_dim": 8, "shape_embed_dim": 8,
    },
    "sam": {
        "prompt_encoder_config": {"image_size": 32, "hidden_size": 32},
        "mask_decoder_config": {"hidden_size": 32, "iou_head_hidden_dim": 32},
        "vision_config": {"output_channels": 32, "num_pos_feats": 16, "global_attn_indexes": [1]},
    },
}  # fmt: skip
"""What a family needs besides SIZES; for a configuration inside, a dict."""


class NotBuilt(Exception):
    """The family is not built tiny: why."""


def families() -> list[str]:
    """The model types of transformers that have a model, sorted."""
    from transformers.models.auto import configuration_auto

    return sorted(configuration_auto.CONFIG_MAPPING_NAMES)


def built(name: str) -> tuple[nn.Module, dict[str, Any]]:
    """A family's model, tiny, random, float32, for inference, on eager attention; and inputs that it runs with.

    Args:
        name: the model type.

    Raises:
        NotBuilt: why not.
    """
    import transformers

    try:
        kind: Any = transformers.CONFIG_MAPPING[name]
    except Exception as failure:
        raise NotBuilt(_said(failure)) from failure
    model_kind = _model_class(name, kind)
    if model_kind is None:
        raise NotBuilt("no model class of its own")
    reasons: list[str] = []
    for variant in VARIANTS:
        try:
            config = _tiny(kind, {**SIZES, **variant}, OWN.get(name, {}))
            with torch.device("meta"):
                size = sum(
                    each.numel() for each in model_kind._from_config(config, attn_implementation="eager").parameters()
                )
            if size > MOST_PARAMETERS:
                raise NotBuilt(f"{size / 1e6:.0f} million parameters")
            config = _tiny(kind, {**SIZES, **variant}, OWN.get(name, {}))
            torch.manual_seed(0)
            model = model_kind._from_config(config, attn_implementation="eager").eval().float()
        except Exception as failure:
            reasons.append(_said(failure))
            continue
        _draw(model)
        for inputs in candidates(model):
            try:
                with torch.no_grad():
                    model(**inputs)
            except Exception as failure:
                reasons.append(_said(failure))
            else:
                return model, inputs
    raise NotBuilt(reasons[0] if reasons else "no inputs are known that fit its forward")


def _said(failure: Exception) -> str:
    text = " ".join(str(failure).split())[:200]
    return text if isinstance(failure, NotBuilt) else f"{type(failure).__name__}: {text}"


def _model_class(name: str, kind: type) -> Any:
    """The class that AutoModel would take; else the first of the configuration's file."""
    import transformers
    from transformers.models.auto import modeling_auto

    named = modeling_auto.MODEL_MAPPING_NAMES.get(name)
    if named is not None:
        return getattr(transformers, named if isinstance(named, str) else named[0])
    try:
        module = importlib.import_module(kind.__module__.replace("configuration_", "modeling_"))
    except ImportError:
        return None
    for label, each in vars(module).items():
        if (
            isinstance(each, type)
            and issubclass(each, transformers.PreTrainedModel)
            and each.__module__ == module.__name__
            and getattr(each, "config_class", None) is kind
            and not label.endswith("PreTrainedModel")
        ):
            return each
    return None


def _tiny(kind: Any, sizes: dict[str, Any], own: dict[str, Any], depth: int = 0) -> Any:
    """A configuration with the sizes that it has fields for, and those inside it likewise."""
    aliases = getattr(kind, "attribute_map", {})
    fields = {*inspect.signature(kind.__init__).parameters, *getattr(kind, "__dataclass_fields__", {})}
    default = kind()
    given: dict[str, Any] = {}
    for field, value in sizes.items():
        if aliases.get(field, field) in fields:
            fitted = _fitted(aliases.get(field, field), value, _default(default, field))
            if fitted is not None:
                given.setdefault(aliases.get(field, field), fitted)
    depths, heads, rope = (_default(default, field) for field in ("depths", "num_heads", "rope_parameters"))
    if isinstance(depths, (list, tuple)):
        given["depths"] = [1] * len(depths)
    if isinstance(heads, (list, tuple)) and isinstance(_default(default, "embed_dim"), int):
        given["embed_dim"] = 8 * heads[0]
    if isinstance(rope, dict) and "mrope_section" in rope and "rope_parameters" not in sizes:
        given["rope_parameters"] = {**rope, "mrope_section": [2, 1, 1]}
    for sub in getattr(kind, "sub_configs", None) or {}:
        inner = getattr(default, sub, None)
        if inner is not None and hasattr(type(inner), "sub_configs") and depth < 3:
            part = own.get(sub, {})
            given[sub] = part if not isinstance(part, dict) else _tiny(type(inner), sizes, part, depth + 1)
    given.update({field: value for field, value in own.items() if not (isinstance(value, dict) and field in given)})
    return kind(**given)


def _default(config: Any, field: str) -> Any:
    """A field's value; None where it has none for the whole model."""
    try:
        return getattr(config, field, None)
    except Exception:  # of a configuration whose layers differ
        return None


def _fitted(field: str, value: Any, default: Any) -> Any:
    """A size as the field takes it: as many numbers as it has, of their kind; None leaves it."""
    if isinstance(default, (list, tuple)):
        if not default or not all(isinstance(each, (int, float)) for each in default):
            return None
        if field in ("num_heads", "num_attention_heads", "hidden_size", "embed_dim", "hidden_dim"):
            return None  # they grow from stage to stage
        return type(default)([value] * len(default))
    if isinstance(default, float) and isinstance(value, int):
        return float(value)
    if isinstance(default, dict) and isinstance(value, dict):
        return {**default, **value}
    if isinstance(default, (bool, str, dict)):
        return None
    return value


def _draw(model: nn.Module) -> None:
    """Weights far from the small ones of an initialization, so that what attention does is seen."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1 and parameter.is_floating_point():
                parameter.normal_(std=0.2)
