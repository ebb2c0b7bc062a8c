"""Attention of known models: sizes and masks by name, with the source of each number.

Sizes are those of one layer. On a CPU lengths and batches are what it does in seconds; heads and widths are a model's.
"""

from __future__ import annotations

from dataclasses import dataclass

from fastattn.bench.cases.operations import SIZES, BenchCase, known


@dataclass(frozen=True)
class Layer:
    """One call of a model. `lengths` of queries (and keys, unless `kv_lens` says them one by one), in tokens."""

    op: str
    heads: int
    kv_heads: int
    head_dim: int
    lengths: tuple[int, ...]
    kv_lens: tuple[int, ...] | None = None
    batch: int = 1

    def cases(self, dtype: str) -> list[BenchCase]:
        pairs = zip(self.lengths, self.kv_lens or self.lengths, strict=True)
        return [
            BenchCase(self.op, dtype, self.batch, self.heads, self.kv_heads, q_len, kv_len, self.head_dim)
            for q_len, kv_len in pairs
        ]


@dataclass(frozen=True)
class Preset:
    """A model: what it says to a reader, where the numbers are from, its calls on each device, and what is timed."""

    says: str
    source: str
    cuda: tuple[Layer, ...]
    cpu: tuple[Layer, ...]
    modes: tuple[str, ...] = ("fwd", "bwd")


def _llama(lengths: tuple[int, ...]) -> tuple[Layer, ...]:
    return (Layer("gqa", 32, 8, 128, lengths),)


def _llama_decode(batch: int, lengths: tuple[int, ...]) -> tuple[Layer, ...]:
    return (Layer("decode", 32, 8, 128, (1,) * len(lengths), lengths, batch),)


def _diffusion(batch: int) -> tuple[Layer, ...]:
    """Latents of 64 x 64, 32 x 32 and 16 x 16 look at 77 tokens; eight heads share 320, 640 and 1280 channels."""
    sides = ((64, 40), (32, 80), (16, 160))
    return tuple(Layer("cross", 8, 8, width, (side * side,), (77,), batch) for side, width in sides)


def _whisper(batch: int) -> tuple[Layer, ...]:
    """30 seconds are 1500 frames; the decoder's 448 tokens look at them."""
    return (Layer("self", 12, 12, 64, (1500,), None, batch), Layer("cross", 12, 12, 64, (448,), (1500,), batch))


def _swin(images: int) -> tuple[Layer, ...]:
    """An image of 224 x 224 has 64, 16, 4 and 1 windows of 7 x 7 in the four stages, while heads double."""
    return tuple(
        Layer("self", 3 << stage, 3 << stage, 32, (49,), None, images * (64 >> 2 * stage)) for stage in range(4)
    )


def _one(op: str, heads: int, head_dim: int, length: int, batch: int) -> tuple[Layer, ...]:
    return (Layer(op, heads, heads, head_dim, (length,), None, batch),)


PRESETS = {
    "llama3-8b-prefill": Preset(
        "Llama 3 8B reads its prompt: causal, four query heads share a key head",
        "Grattafiori et al. 2024, table 3 (32 heads, 8 key heads, width 4096); section 3.2: 8k tokens of context",
        _llama((2048, 8192, 32768)),
        _llama((512, 1024)),
    ),
    "llama3-decode": Preset(
        "Llama 3 8B writes one token: a query on a cache of keys",
        "Grattafiori et al. 2024, table 3; caches up to the 128k tokens of section 3.4.2 on a GPU",
        _llama_decode(8, (2048, 8192, 32768, 131072)),
        _llama_decode(1, (1024, 4096)),
        ("fwd",),
    ),
    "vit-b": Preset(
        "ViT-B/16 on an image of 224 x 224: 196 patches and a class token",
        "Dosovitskiy et al. 2021, table 1 (12 heads, width 768)",
        _one("self", 12, 64, 197, 128),
        _one("self", 12, 64, 197, 8),
    ),
    "clip-text": Preset(
        "CLIP's text encoder: causal, 77 tokens",
        "Radford et al. 2021, section 2.4 (8 heads, width 512); context_length of the published weights",
        _one("causal", 8, 64, 77, 512),
        _one("causal", 8, 64, 77, 16),
    ),
    "sd-cross": Preset(
        "Stable Diffusion 1's cross-attention: the picture's three resolutions look at the prompt",
        "Rombach et al. 2022, published v1 configuration (320 channels times 1, 2, 4; 8 heads; 77 tokens); "
        "two images of the batch are one of classifier-free guidance",
        _diffusion(16),
        _diffusion(2),
    ),
    "whisper": Preset(
        "Whisper small: the encoder's 30 seconds, and the decoder looking at them",
        "Radford et al. 2023, table 1 (12 heads, width 768); 1500 frames and 448 tokens of the published weights",
        _whisper(16),
        _whisper(1),
    ),
    "swin": Preset(
        "Swin-T's windows of 7 x 7 in its four stages, without their position bias",
        "Liu et al. 2021, section 3.3 (window 7, 32 numbers a head, 3 to 24 heads)",
        _swin(64),
        _swin(4),
    ),
    "superglue-2k": Preset(
        "SuperGlue on 2048 keypoints an image: within an image, and across two",
        "Sarlin et al. 2020, section 4 (4 heads, width 256) and section 5.3 (2048 keypoints)",
        (Layer("self", 4, 4, 64, (2048,), None, 16), Layer("cross", 4, 4, 64, (2048,), (2048,), 16)),
        (Layer("self", 4, 4, 64, (2048,)), Layer("cross", 4, 4, 64, (2048,), (2048,))),
    ),
}


def preset_cases(names: list[str], device: str, dtypes: list[str] | None) -> list[tuple[BenchCase, tuple[str, ...]]]:
    """Cases with the modes that the model runs them in, in order; `device` is "cpu" or "cuda"."""
    known("preset", names, PRESETS)
    found: dict[BenchCase, tuple[str, ...]] = {}
    for name in names:
        chosen = PRESETS[name]
        for dtype in dtypes or [SIZES[device].dtype]:
            for layer in chosen.cuda if device == "cuda" else chosen.cpu:
                for case in layer.cases(dtype):
                    found.setdefault(case, chosen.modes)
    return list(found.items())
