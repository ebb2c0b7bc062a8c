"""What `make gpu` times, the most telling cells first: a budget that ends early has answered the first questions."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from fastattn.bench_cases import BenchCase

PEERS = {
    "cuda": ("fastattn", "sdpa", "sdpa-cudnn", "sdpa-flash", "flex"),
    "cpu": ("fastattn", "sdpa"),
}
"""Who runs every cell; peers found in a folder come on top."""

TOKENS = 16 * 1024
"""In a GPU's cells, batch times length; and WIDTH is heads times head_dim. The sizes that FlashAttention's papers time
(Dao 2023, section 4; Shah et al. 2024, section 4)."""
WIDTH = 2048


@dataclass(frozen=True)
class Cell:
    """One case in one mode, for all providers side by side."""

    case: BenchCase
    mode: str

    @property
    def name(self) -> str:
        return f"{self.case.name}/{self.mode}"


def suite(device: str) -> list[Cell]:
    """The cells of a device ("cpu" or "cuda"), in order."""
    return list(dict.fromkeys(_cuda() if device == "cuda" else _cpu()))


def _cuda() -> Iterable[Cell]:
    for mode in ("fwd", "bwd"):
        yield Cell(_square("self", 16384, 128), mode)
        yield Cell(_square("causal", 16384, 128), mode)
        yield Cell(_square("causal", 4096, 64), mode)
    yield Cell(_decode(16384), "fwd")
    for mode in ("fwd", "bwd"):
        yield Cell(_square("truncated", 32768, 128, window=1024), mode)
        yield Cell(_square("masked", 4096, 128), mode)
        yield Cell(_square("self", 16384, 64), mode)
    for mode in ("fwd", "bwd"):
        for head_dim in (128, 64):
            for length in (2048, 8192, 32768, 4096, 16384):
                for op in ("causal", "self"):
                    yield Cell(_square(op, length, head_dim), mode)
    yield Cell(_decode(65536), "fwd")
    yield Cell(_square("gqa", 8192, 128, num_kv_heads=4), "fwd")
    yield Cell(_square("self", 512, 128), "fwd")


def _square(op: str, length: int, head_dim: int, *, num_kv_heads: int | None = None, window: int | None = None):
    heads = WIDTH // head_dim
    batch = max(1, TOKENS // length)
    return BenchCase(op, "bf16", batch, heads, num_kv_heads or heads, length, length, head_dim, window)


def _decode(kv_len: int) -> BenchCase:
    """Llama 3 8B's heads, eight requests."""
    return BenchCase("decode", "bf16", 8, 32, 8, 1, kv_len, 128)


def _cpu() -> Iterable[Cell]:
    """What a laptop does in a minute or two."""
    for length, head_dim in ((512, 64), (1024, 64), (2048, 64), (1024, 128)):
        for dtype in ("fp32", "bf16"):
            for op, window in (("self", None), ("causal", None), ("truncated", 128)):
                for mode in ("fwd", "bwd"):
                    yield Cell(BenchCase(op, dtype, 1, 8, 8, length, length, head_dim, window), mode)
    yield Cell(BenchCase("decode", "bf16", 1, 32, 8, 1, 4096, 128), "fwd")
    yield Cell(BenchCase("masked", "fp32", 2, 8, 8, 1024, 1024, 64), "fwd")
