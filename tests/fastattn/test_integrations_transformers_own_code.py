"""What a transformers model asked for decides: what no mask means, who may take the causal mask away, what code of a
model's own gets, and what the report says of it.
"""

import importlib.util

import pytest
import torch
from torch import nn

if importlib.util.find_spec("transformers") is None:
    pytest.skip("needs transformers (pip install 'fastattn[models]')", allow_module_level=True)

from fastattn import replace_attention
from fastattn.bench.models.compare import Seen, watching
from fastattn.bench.models.families import built, padded
from fastattn.bench.models.zoo import ZOO, randomized
from fastattn.integrations import transformers as ours

LENGTH = 12
IDS = torch.randint(3, 64, (2, LENGTH), generator=torch.Generator().manual_seed(1))
REAL = torch.ones(2, LENGTH, dtype=torch.long)
PADDED = REAL.clone()
PADDED[0, -4:] = 0


class Bare(nn.Module):
    """An attention module that says nothing, as ALIGN's."""


class Causal(nn.Module):
    """One that says it is causal, as BridgeTower's over a bidirectional mask."""

    is_causal = True


@pytest.mark.parametrize("module", [Bare(), Causal()], ids=["says-nothing", "says-causal"])
@pytest.mark.parametrize("given, causal", [(None, False), (False, False), (True, True)])
def test_no_mask_hides_nothing(module, given, causal):
    query, key, value = torch.randn(3, 1, 2, 7, 8, generator=torch.Generator().manual_seed(0)).unbind()
    got, _ = ours.attention_forward(module, query, key, value, None, is_causal=given)
    want = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=causal)
    torch.testing.assert_close(got.transpose(1, 2), want, atol=1e-5, rtol=1e-5)


def model_of(row):
    torch.manual_seed(0)
    return randomized(ZOO[row].build())


def answer(model, way, real=None, **rest):
    model.set_attn_implementation(way)
    with torch.no_grad():
        states = model(input_ids=IDS, attention_mask=real, use_cache=False, **rest)[0]
    return states if real is None else states[real.bool()]


def say_not_causal(model):
    for module in model.modules():
        if hasattr(module, "is_causal"):
            module.is_causal = False
    return {}


def argue_not_causal(model):
    return {"is_causal": False}


@pytest.mark.parametrize("say", [say_not_causal, argue_not_causal], ids=["modules", "argument"])
@pytest.mark.parametrize("real", [None, REAL, PADDED], ids=["no-mask", "all-real", "padded"])
@pytest.mark.parametrize(
    "row, window", [("llama-3", None), ("gpt-2", None), ("qwen3", None), ("mistral", 6), ("mistral", 64)]
)
def test_a_decoder_made_an_encoder_is_as_with_sdpa(row, window, real, say):
    """By their modules: with padding and in windows SDPA gets a mask and keeps it; so does fastattn."""
    model = model_of(row)
    if window is not None:
        model.config.sliding_window = window
    before = answer(model, "fastattn", real)
    said = say(model)
    want, got = answer(model, "sdpa", real, **said), answer(model, "fastattn", real, **said)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    moved = bool((got - before).abs().max() > 0.1)
    assert moved == (say is argue_not_causal or (real is not PADDED and window != 6))


@pytest.mark.parametrize("name", ["paligemma", "aimv2_text_model", "pegasus_x", "moonshine"])
def test_false_from_the_start_takes_no_mask_away(name):
    model, inputs = built(name)
    with torch.no_grad():
        want = model(**inputs)[0]
        model.set_attn_implementation("fastattn")
        got = model(**inputs)[0]
    torch.testing.assert_close(got, want, atol=1e-4 * float(want.abs().max()), rtol=0)


def test_gits_own_attention_stays_causal():
    model, inputs = built("git")
    model.set_attn_implementation("fastattn")
    moved = inputs["input_ids"].clone()
    moved[:, -1] = 5
    with torch.no_grad():
        one, other = (model(**{**inputs, "input_ids": ids}).last_hidden_state for ids in (inputs["input_ids"], moved))
    assert torch.equal(one[:, :-1], other[:, :-1]) and not torch.equal(one[:, -1], other[:, -1])


@pytest.mark.parametrize("name", ["nllb-moe", "informer", "bigbird_pegasus", "git"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_own_code_gets_eagers_mask(name, dtype):
    model, inputs = built(name)
    inputs = padded(inputs, "right") or inputs
    inputs = {key: each.to(dtype) if each.is_floating_point() else each for key, each in inputs.items()}
    model.to(dtype)
    found = {}
    for way in ("eager", "fastattn"):
        model.set_attn_implementation(way)
        with torch.no_grad():
            torch.manual_seed(0)
            found[way] = model(**inputs)[0]
    tolerance = {torch.float32: 2e-4, torch.bfloat16: 0.1}[dtype]
    torch.testing.assert_close(
        found["fastattn"], found["eager"], atol=tolerance * float(found["eager"].abs().max()), rtol=0
    )


OWN = {  # the modules that keep their own attention, and whether anything else in the model goes through the interface
    "git": ("GitSelfAttention", True),
    "sam_vision_model": ("SamVisionAttention", False),
    "clap_audio_model": ("ClapAudioSelfAttention", False),
    "longt5": ("LongT5LocalAttention", True),
    "gemma3n_audio": ("Gemma3nAudioAttention", False),
    "bloom": ("BloomAttention", False),
    "big_bird": ("BigBirdSelfAttention", False),
}


@pytest.mark.parametrize("name", OWN)
def test_the_report_names_attention_of_its_own(name):
    kind, some_through = OWN[name]
    model, _ = built(name)
    modules = {path: module for path, module in model.named_modules() if type(module).__name__ == kind}
    report = replace_attention(model)
    rows = {row.path: row for row in report.rows}
    assert modules and modules.keys() <= rows.keys()
    assert all(not rows[path].changed and "code of its own" in rows[path].what for path in modules)
    assert rows[""].changed == some_through == bool(len(report))
    assert model.config._attn_implementation == ("fastattn" if some_through else "eager")


@pytest.mark.parametrize("name", ["mamba", "falcon_mamba", "fnet", "mobilenet_v2", "superpoint", "rwkv"])
def test_a_model_without_attention_is_not_changed(name):
    model, inputs = built(name)
    report, seen = replace_attention(model), Seen()
    with torch.no_grad(), watching(seen):
        model(**inputs)
    assert len(report) == 0 and not seen.masks and model.config._attn_implementation == "eager"
    assert report.rows[0].what == "no attention in it goes through transformers' interface"


@pytest.mark.parametrize("name", ["git", "longt5", "llama", "bert"])
def test_a_changed_model_is_saved_and_loaded(name, tmp_path):
    model, inputs = built(name)
    replace_attention(model)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, attn_implementation="eager").eval()
    assert "fastattn" not in (tmp_path / "config.json").read_text()
    with torch.no_grad():
        want, got = loaded(**inputs)[0], model(**inputs)[0]
    torch.testing.assert_close(got, want, atol=2e-4 * float(want.abs().max()), rtol=0)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
@pytest.mark.parametrize("name", ["nllb-moe", "align_text_model", "qwen3"])
def test_checkpointed_layers_give_the_same_gradients(name):
    model, inputs = built(name)
    inputs = padded(inputs, "right") or inputs
    found = []
    for way, checkpointed in (("eager", False), ("fastattn", False), ("fastattn", True)):
        model.set_attn_implementation(way)
        if checkpointed:
            model.gradient_checkpointing_enable()
        model.train()
        model.zero_grad()
        torch.manual_seed(0)
        model(**inputs)[0].square().mean().backward()
        found.append({key: each.grad.clone() for key, each in model.named_parameters() if each.grad is not None})
    eager, plain, checkpointed = found
    assert eager.keys() == plain.keys() == checkpointed.keys() and len(eager) > 5
    largest = max(float(each.abs().max()) for each in eager.values())
    for key, each in eager.items():
        torch.testing.assert_close(plain[key], each, atol=1e-4 * largest, rtol=0, msg=lambda text, key=key: key + text)
        torch.testing.assert_close(checkpointed[key], plain[key], atol=1e-6 * largest, rtol=0)


@pytest.mark.parametrize("row", ["llama-3", "mistral", "t5"])
def test_generation_gives_eagers_tokens(row):
    """A decoder, one with a sliding window, an encoder with a decoder; with a cache, and padding."""
    model = model_of(row)
    real = PADDED if row == "t5" else PADDED.flip(1)
    found = []
    for way in ("eager", "fastattn"):
        model.set_attn_implementation(way)
        tokens = model.generate(IDS, attention_mask=real, max_new_tokens=8, do_sample=False, use_cache=True)
        found.append(tokens)
    assert torch.equal(*found) and found[0].shape[1] > 4
