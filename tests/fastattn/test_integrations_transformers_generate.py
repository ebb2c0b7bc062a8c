"""generate() on fastattn: every cache that transformers has, every way to decode; eager's tokens and logits."""

import contextlib
import importlib.util

import pytest
import torch

if importlib.util.find_spec("transformers") is None:
    pytest.skip("needs transformers (pip install 'fastattn[models]')", allow_module_level=True)

import transformers
from transformers import cache_utils

import fastattn.integrations.transformers  # noqa: F401  (registers "fastattn")
from fastattn.bench.models.compare import Seen, watching
from fastattn.bench.models.zoo import DECODER, WHISPER, ZOO, randomized

BATCH, LENGTH, NEW = 2, 12, 6
PAIRED = ("t5", "bart", "whisper")
GROUPS = {"nbits": 4, "q_group_size": 8, "residual_length": 3}


def quantized(backend, **more):
    return {"cache_implementation": "quantized", "cache_config": {"backend": backend, **more}}


# name: what generate() is given, what must be there for it
CACHES = {
    "dynamic": ({"cache_implementation": "dynamic"}, None),
    "static": ({"cache_implementation": "static"}, None),
    "offloaded": ({"cache_implementation": "offloaded"}, None),
    "offloaded static": ({"cache_implementation": "offloaded_static"}, None),
    "sliding window": ({"cache_implementation": "sliding_window"}, None),
    "hybrid": ({"cache_implementation": "hybrid"}, None),
    "hybrid, chunked": ({"cache_implementation": "hybrid_chunked"}, None),
    "none": ({"use_cache": False}, None),
    "quantized, fp8": (quantized("fp8"), "fp8"),
    "quantized, quanto": (quantized("quanto", **GROUPS), "optimum.quanto"),
    "quantized, hqq": (quantized("hqq", axis_key=1, axis_value=1, **GROUPS), "hqq"),
}
WAYS = {
    "beams": {"num_beams": 3},
    "prefill in chunks": {"prefill_chunk_size": 5},
    "prompt look-up": {"prompt_lookup_num_tokens": 3},
    "assisted": {"assistant_model": "llama-3"},
}
ALL = ("dynamic", "static", "offloaded", "offloaded static", "none")
QUANTIZED = ("quantized, fp8", "quantized, quanto", "quantized, hqq")
MIXED = ("dynamic", "static", "offloaded static", "none")
RUNS = {
    "llama-3": (*ALL, *QUANTIZED, *WAYS),
    "mistral": ("dynamic", "static", "offloaded", "none", "sliding window", *WAYS),
    "gemma-2": (*MIXED, "hybrid"),
    "gpt-oss": (*MIXED, "prefill in chunks", "beams"),
    "llama-4": (*MIXED, "hybrid, chunked"),
    "t5": (*ALL, "beams"),
    "bart": (*ALL, "beams"),
    "whisper": ("dynamic", "none"),  # its own generate() drops a choice of cache
}


class Stream(contextlib.nullcontext):
    """Stands for a stream, which offloaded caches copy on and a CPU build of torch does not have."""

    def wait_stream(self, other):
        pass


@pytest.fixture
def streams(monkeypatch):
    if not torch.cuda.is_available():
        monkeypatch.setattr(torch, "Stream", Stream)
        for name in ("default_stream", "current_stream"):
            monkeypatch.setattr(torch.cuda, name, lambda *device: Stream())


def needs(what):
    if what == "fp8" and not hasattr(cache_utils, "Fp8QuantizedLayer"):
        pytest.skip(f"transformers {transformers.__version__} has no quantized cache in fp8")
    if what not in (None, "fp8"):
        pytest.importorskip(what, reason=f"needs {what}, which quantizes this cache")


def model_of(row, seed=0):
    torch.manual_seed(seed)
    if row == "whisper":  # the zoo has its encoder
        config = transformers.WhisperConfig(**WHISPER, suppress_tokens=[], begin_suppress_tokens=[])
        return randomized(transformers.WhisperForConditionalGeneration(config))
    return randomized(ZOO[row].build())


def given(row, batch=BATCH):
    draws = torch.Generator().manual_seed(1)
    if row == "whisper":
        return {"input_features": torch.randn(batch, 16, 64, generator=draws)}
    real = torch.ones(batch, LENGTH, dtype=torch.long)
    real[0, slice(-4, None) if row in PAIRED else slice(4)] = 0
    ids = torch.randint(3, DECODER["vocab_size"], (batch, LENGTH), generator=draws)
    return {"input_ids": ids, "attention_mask": real}


@pytest.mark.usefixtures("streams")
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("row, how", [pytest.param(row, how, id=f"{row}-{how}") for row in RUNS for how in RUNS[row]])
def test_generate(row, how):
    arguments, package = CACHES[how] if how in CACHES else (dict(WAYS[how]), None)
    needs(package)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    speculative = how in ("prompt look-up", "assisted")  # of one sequence alone
    model, inputs = model_of(row).to(device), given(row, 1 if speculative else BATCH)
    inputs = {name: each.to(device) for name, each in inputs.items()}
    helper = model_of(arguments["assistant_model"]).to(device) if how == "assisted" else None
    found = []
    for name in ("eager", "fastattn"):
        model.set_attn_implementation(name)
        if helper is not None:
            helper.set_attn_implementation(name)
            arguments["assistant_model"] = helper
        seen = Seen()
        with torch.no_grad(), watching(seen):
            found.append(
                model.generate(
                    **inputs,
                    **arguments,
                    max_new_tokens=NEW,
                    min_new_tokens=NEW,
                    do_sample=False,
                    disable_compile=True,
                    return_dict_in_generate=True,
                    output_logits=True,
                    pad_token_id=0,
                )
            )
        assert bool(seen.masks) == (name == "fastattn") and not seen.tables
    eager, fast = found
    assert torch.equal(eager.sequences, fast.sequences)
    torch.testing.assert_close(torch.stack(fast.logits), torch.stack(eager.logits), atol=1e-4, rtol=1e-4)
    kind = {"static": "Static", "quantized": "Quantized"}.get(how.removeprefix("offloaded ").split(",")[0], "")
    cache = fast.past_key_values
    assert (cache is None) == (how == "none")
    assert kind in type(getattr(cache, "self_attention_cache", cache)).__name__


def test_a_prompt_in_parts():
    """Prefills that go on where the cache ends, as in a chat."""
    model, ids = model_of("llama-3"), given("llama-3")["input_ids"]
    found = []
    for name in ("eager", "fastattn"):
        model.set_attn_implementation(name)
        cache = transformers.DynamicCache(config=model.config)
        with torch.no_grad():
            parts = [model(ids[:, a:b], past_key_values=cache).logits for a, b in ((0, 5), (5, 9), (9, 12))]
        found.append(torch.cat(parts, 1))
    torch.testing.assert_close(found[1], found[0], atol=1e-5, rtol=1e-4)
