"""What people do with transformers models: training, adapters, decoding that shows its weights, images in text."""

import importlib.util
from functools import partial

import pytest
import torch
from torch import nn

if importlib.util.find_spec("transformers") is None:
    pytest.skip("needs transformers (pip install 'fastattn[models]')", allow_module_level=True)

import transformers

from fastattn import replace_attention
from fastattn.bench.models.compare import Seen, _train_without_dropout, watching
from fastattn.bench.models.zoo import DECODER, ENCODER, ZOO, randomized
from fastattn.integrations import transformers as interface

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
IDS = torch.randint(4, DECODER["vocab_size"], (4, 16), generator=torch.Generator().manual_seed(1))
REAL = torch.ones(4, 16, dtype=torch.long)
REAL[0, -7:] = REAL[2, -3:] = 0
LABELS = IDS.masked_fill(REAL == 0, -100)
BATCH = {"input_ids": IDS, "attention_mask": REAL}
PICTURES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(2))
WITH_PICTURES = IDS[:2].index_fill(1, torch.arange(2, 6), 3)  # 3 stands for a piece of a picture
EYES = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "image_size": 16,
    "patch_size": 8,
}  # fmt: skip


def of_zoo(row):
    return randomized(ZOO[row].build())


def of(name, config):
    return randomized(getattr(transformers, name)(config))


def modernbert():
    config = transformers.ModernBertConfig(
        **{**ENCODER, "num_hidden_layers": 3}, local_attention=6, bos_token_id=1, eos_token_id=2, cls_token_id=1,
        sep_token_id=2,
    )  # fmt: skip
    return of("ModernBertForMaskedLM", config)


def llava():
    text = transformers.LlamaConfig(**DECODER)
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**EYES), text_config=text, image_token_index=3,
        vision_feature_layer=-1,
    )  # fmt: skip
    return of("LlavaForConditionalGeneration", config)


def gemma3():
    config = transformers.Gemma3Config(
        vision_config=EYES, text_config={**DECODER, "sliding_window": 6, "query_pre_attn_scalar": 16},
        mm_tokens_per_image=4, image_token_index=3,
    )  # fmt: skip
    return of("Gemma3ForConditionalGeneration", config)


class LowRank(nn.Module):
    """A linear layer with an adapter of low rank beside it (Hu et al. 2021)."""

    def __init__(self, linear):
        super().__init__()
        self.linear = linear.requires_grad_(False)
        self.down, self.up = (
            nn.Linear(a, b, bias=False) for a, b in ((linear.in_features, 4), (4, linear.out_features))
        )

    def forward(self, x):
        return self.linear(x) + self.up(self.down(x))


def adapted():
    model = of_zoo("llama-3").requires_grad_(False)
    for layer in model.model.layers:
        for name in ("q_proj", "v_proj"):
            setattr(layer.self_attn, name, LowRank(getattr(layer.self_attn, name)))
    return model


def trained(model, *, autocast=False, checkpoints=False, **batch):
    """Three steps; losses and what became of the parameters."""
    _train_without_dropout(model)
    if checkpoints:
        model.gradient_checkpointing_enable()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    found = []
    for _ in range(3):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(**batch).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.detach())
    return [*found, *(p.detach() for p in model.parameters())]


def decoded(model, **more):
    """Tokens, each step's logits, and the weights of a sequence without padding."""
    result = model.generate(
        **BATCH | {"attention_mask": REAL.flip(1)}, max_new_tokens=3, min_new_tokens=3, pad_token_id=0,
        return_dict_in_generate=True, output_attentions=True, output_logits=True, **more,
    )  # fmt: skip
    weights = [layer[-1:] for step in result.attentions for layer in step]
    return [result.sequences, *result.logits, *weights]


def seen(model, **batch):
    result = model(**batch)
    return [result.logits if hasattr(result, "logits") else result.logits_per_image]


PLAIN = {**BATCH, "labels": LABELS, "use_cache": False}
AS_PEOPLE_TRAIN = {"autocast": True, "checkpoints": True, **PLAIN}
FLOWS = {  # the model, what is done with it, how far apart float32 may be
    "train-llama": (partial(of_zoo, "llama-3"), partial(trained, **PLAIN), 1e-5),
    "train-llama-as-people-do": (partial(of_zoo, "llama-3"), partial(trained, **AS_PEOPLE_TRAIN), 1e-2),
    "train-gemma-2-as-people-do": (partial(of_zoo, "gemma-2"), partial(trained, **AS_PEOPLE_TRAIN), 1e-2),
    "train-gpt-oss": (partial(of_zoo, "gpt-oss"), partial(trained, **PLAIN), 1e-5),
    "train-t5": (
        partial(of_zoo, "t5"),
        partial(trained, checkpoints=True, **BATCH, labels=IDS[:, :9].contiguous(), use_cache=False),
        1e-4,
    ),
    "train-modernbert": (modernbert, partial(trained, **BATCH, labels=LABELS), 1e-5),
    "train-an-adapter": (adapted, partial(trained, **PLAIN), 1e-5),
    "decode-with-weights": (partial(of_zoo, "llama-3"), partial(decoded, do_sample=False), 1e-4),
    "decode-a-window-with-weights": (partial(of_zoo, "mistral"), partial(decoded, do_sample=False), 1e-4),
    "decode-sinks-with-weights": (partial(of_zoo, "gpt-oss"), partial(decoded, do_sample=False), 1e-4),
    "draw": (partial(of_zoo, "llama-3"), partial(decoded, do_sample=True, top_k=10, num_return_sequences=2), 1e-4),
    "zero-shot": (partial(of_zoo, "clip"), partial(seen, **BATCH, pixel_values=PICTURES.repeat(1, 1, 2, 2)), 1e-5),
    "pictures-in-text": (llava, partial(seen, input_ids=WITH_PICTURES, pixel_values=PICTURES), 1e-5),
    "pictures-that-see-all-of-themselves": (
        gemma3,
        partial(seen, input_ids=WITH_PICTURES, pixel_values=PICTURES, token_type_ids=(WITH_PICTURES == 3).long()),
        1e-5,
    ),
}


@pytest.mark.parametrize("name", FLOWS)
def test_as_with_eager_attention(name):
    make, flow, bound = FLOWS[name]
    found = {}
    for way in ("eager", "fastattn"):
        torch.manual_seed(0)
        model, reached = make(), Seen()
        model.set_attn_implementation(way)
        torch.manual_seed(3)
        with watching(reached), torch.set_grad_enabled(name.startswith("train")):
            found[way] = flow(model)
        assert bool(reached.masks) == (way == "fastattn") and not reached.tables
    assert len(found["eager"]) == len(found["fastattn"])
    for mine, theirs in zip(found["fastattn"], found["eager"], strict=True):
        if not theirs.is_floating_point():
            assert torch.equal(mine, theirs)
        torch.testing.assert_close(mine, theirs, rtol=bound, atol=bound * max(1.0, float(theirs.abs().max())))


def test_training_with_padding_on_the_left_is_as_with_sdpa():
    """The token before the first real one is padding, sees nothing, and is scored all the same: eager attention
    averages there, sdpa and fastattn give 0.
    """
    batch = {**PLAIN, "attention_mask": REAL.flip(1), "labels": IDS.masked_fill(REAL.flip(1) == 0, -100)}
    found = {}
    for way in ("sdpa", "fastattn"):
        torch.manual_seed(0)
        model = of_zoo("llama-3")
        model.set_attn_implementation(way)
        found[way] = trained(model, **batch)
    for mine, theirs in zip(found["fastattn"], found["sdpa"], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


def test_packed_sequences_said_by_their_ends():
    """cu_seq_lens alone, as flash-attn takes them, keep documents apart; positions that begin anew beside them, too."""
    torch.manual_seed(0)
    model = of_zoo("mistral")
    model.set_attn_implementation("fastattn")
    cu, ids = torch.tensor([0, 5, 12], dtype=torch.int32), IDS[:1, :12]
    ends = {"cu_seq_lens_q": cu, "cu_seq_lens_k": cu, "max_length_q": 7, "max_length_k": 7}
    places = torch.cat([torch.arange(5), torch.arange(7)])[None]
    reached = Seen()
    with torch.no_grad():
        want = torch.cat([model(part, use_cache=False).logits for part in (ids[:, :5], ids[:, 5:])], 1)
        with watching(reached):
            for more in ({}, {"attention_mask": torch.ones_like(ids)}):
                have = model(ids, position_ids=places, use_cache=False, **ends, **more).logits
                torch.testing.assert_close(have, want, rtol=1e-4, atol=1e-5)
        query = torch.randn(2, 4, 6, 8)
        apart, _ = interface.attention_forward(nn.Module(), query, query, query, None, is_causal=False, **ends)
        alone, _ = interface.attention_forward(nn.Module(), *[query[:1, :, :5]] * 3, None, is_causal=False)
    torch.testing.assert_close(apart[:1, :5], alone)  # the rest of row 0 goes with row 1
    assert reached.tables == 0 and all("Segments" in mask for mask in reached.masks)


@pytest.mark.skipif(not hasattr(transformers, "Inkling2TextModel"), reason="this transformers has no Inkling 2")
def test_sinks_of_each_query():
    config = transformers.Inkling2TextConfig(
        vocab_size=96, unpadded_vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, swa_num_attention_heads=4, swa_num_key_value_heads=2, swa_head_dim=8,
        sliding_window_size=5, d_rel=4, rel_extent=16, max_position_embeddings=64, moe_intermediate_size=16,
        n_routed_experts=4, num_experts_per_tok=2, pad_token_id=0, eos_token_id=2,
    )  # fmt: skip
    found = {}
    for way in ("eager", "fastattn"):
        torch.manual_seed(0)
        model = randomized(transformers.Inkling2TextModel(config))
        model.set_attn_implementation(way)
        result = model(input_ids=IDS, output_attentions=True)
        result.last_hidden_state.square().mean().backward()
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        found[way] = [result.last_hidden_state, *result.attentions, *grads]
    assert len(found["eager"]) == len(found["fastattn"]) > 10
    for mine, theirs in zip(found["fastattn"], found["eager"], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4 * max(1.0, float(theirs.abs().max())))


def test_a_wrapped_model_is_exchanged_and_put_back():
    """A pooled encoder inside somebody's module, as sentence embedders are."""

    class Embedder(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = of_zoo("bert")

        def forward(self, input_ids, attention_mask):
            states = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
            weights = attention_mask[..., None].to(states.dtype)
            return nn.functional.normalize((states * weights).sum(1) / weights.sum(1), dim=-1)

    torch.manual_seed(0)
    model, reached = Embedder().eval(), Seen()
    with torch.no_grad():
        want = model(**BATCH)
        report = replace_attention(model)
        with watching(reached):
            torch.testing.assert_close(model(**BATCH), want, rtol=1e-5, atol=1e-5)
        assert [row.path for row in report.rows] == ["encoder"] and set(reached.masks) == {"Lengths"}
        report.restore()
        assert torch.equal(model(**BATCH), want)
