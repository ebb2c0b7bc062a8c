"""Every language model of transformers that can be built tiny: as with eager attention, or refused."""

import importlib.util
import inspect

import pytest
import torch

if importlib.util.find_spec("transformers") is None:
    pytest.skip("needs transformers (pip install 'fastattn[models]')", allow_module_level=True)

import transformers
from transformers.models.auto import modeling_auto

import fastattn.integrations.transformers  # noqa: F401  (registers "fastattn")
from fastattn.models.compare import Seen, watching

SMALL = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "head_dim": 8, "sliding_window": 5, "attention_chunk_size": 4, "num_experts": 4, "num_local_experts": 4,
    "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_routed_experts": 4, "n_group": 1, "topk_group": 1,
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 6,
    "d_model": 32, "n_layer": 2, "n_head": 4, "n_embd": 32, "num_layers": 2, "num_heads": 4, "encoder_layers": 2,
    "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48, "ffn_dim": 48, "n_positions": 128,
    "first_k_dense_replace": 1, "embedding_size": 32, "shared_expert_intermediate_size": 16, "n_shared_experts": 1,
    "query_pre_attn_scalar": 8, "word_embed_proj_dim": 32, "rotary_dim": 4, "index_topk": 4, "index_n_heads": 2,
    "index_head_dim": 8, "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 8,
    "sliding_window_size": 5, "d_rel": 4, "rel_extent": 16, "unpadded_vocab_size": 64,
    **dict.fromkeys(
        ("dropout", "attention_dropout", "hidden_dropout", "hidden_dropout_prob", "attention_probs_dropout_prob"), 0.0
    ),
}  # fmt: skip
WIDTHS, DEPTHS = {"hidden_size", "d_model", "n_embd"}, {"num_hidden_layers", "num_layers", "n_layer", "encoder_layers"}
"""Names that a configuration must have, so that what it makes is small."""
BATCH, LENGTH = 2, 14
IDS = torch.randint(3, SMALL["vocab_size"], (BATCH, LENGTH), generator=torch.Generator().manual_seed(1))
REAL = torch.ones(BATCH, LENGTH, dtype=torch.long)
LANGUAGE = list(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
LEAST = 100
"""How many must be compared: a change of transformers could let all of them fail to build."""


def built(name):
    """The model of a configuration, tiny, with sharp attention; None where that does not go."""
    try:
        kind = transformers.CONFIG_MAPPING[name]
        if kind.sub_configs:
            return None  # several models, each with sizes of its own
        known = {*inspect.signature(kind.__init__).parameters, *getattr(kind, "__dataclass_fields__", {})}
        known |= set(getattr(kind, "attribute_map", {}))
        if not (known & WIDTHS and known & DEPTHS):
            return None
        config = kind(**{field: value for field, value in SMALL.items() if field in known})
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval().float()
    except Exception:  # it needs more than sizes: a backbone, a package, parts that fit each other
        return None
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    return model


def run(model, way, real):
    """Its first output with an attention implementation."""
    takes = inspect.signature(model.forward).parameters
    given = {"input_ids": IDS, "attention_mask": real, "decoder_input_ids": IDS}
    model.set_attn_implementation(way)
    torch.manual_seed(0)
    with torch.no_grad():
        result = model(**{name: each for name, each in given.items() if name in takes})
    out = result.logits if hasattr(result, "logits") else result[0]
    out = out if isinstance(out, torch.Tensor) else out[0]
    return out[real.bool()] if out.shape[:2] == real.shape else out


@pytest.mark.filterwarnings("ignore")
def test_every_language_model():
    real = REAL.clone()
    real[0, :4] = 0
    wrong, compared = {}, 0
    for name in LANGUAGE:
        model = built(name)
        try:
            want, again = (run(model, "eager", real) for _ in range(2)) if model is not None else (None, None)
        except Exception:  # eager attention, too, needs something else to run
            continue
        if want is None or not torch.equal(want, again) or not want.is_floating_point() or not want.isfinite().all():
            continue
        seen = Seen()
        try:
            with watching(seen):
                have = run(model, "fastattn", real)
        except ValueError as refusal:
            if "is not done by fastattn" not in str(refusal):
                wrong[name] = str(refusal)
            continue
        except Exception as failure:
            wrong[name] = f"{type(failure).__name__}: {failure}"
            continue
        if not seen.masks:
            continue  # no attention, or code of its own
        compared += 1
        apart = float((have - want).abs().max())
        if not apart <= 2e-4 * (1 + float(want.abs().max())):
            wrong[name] = f"{apart:.1e} apart of {float(want.abs().max()):.1e}"
    assert not wrong and compared >= LEAST, f"{compared} compared"
