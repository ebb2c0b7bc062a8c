"""Lists of cells, the most telling first: a budget that ends early has answered the first questions.

What `make gpu` times on each device, and the table by which the CPU backend is judged (`fastattn bench cpu-table`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from fastattn.bench.cases.operations import BenchCase

PEERS = {
    "cuda": ("fastattn", "fastattn-cuda", "fastattn-triton", "sdpa-cudnn", "sdpa-flash", "flex"),
    "cpu": ("fastattn", "sdpa"),
}
"""Who runs every cell; peers found in a folder come on top."""

TOKENS = 16 * 1024
"""In a GPU's cells, batch times length; and WIDTH is heads times head_dim. The sizes that FlashAttention's papers time
(Dao 2023, section 4; Shah et al. 2024, section 4)."""
WIDTH = 2048


@dataclass(frozen=True)
class Cell:
    """One case in one mode, for all providers side by side; None: for those that run every cell."""

    case: BenchCase
    mode: str
    providers: tuple[str, ...] | None = None

    @property
    def name(self) -> str:
        return f"{self.case.name}/{self.mode}"


def suite(device: str) -> list[Cell]:
    """The cells of a device ("cpu" or "cuda"), in order: the headline, then the rest."""
    return list(dict.fromkeys([*headline(device), *(_cuda() if device == "cuda" else _cpu())]))


def headline(device: str) -> list[Cell]:
    """The six cells of a device that say most, the first of `suite`: no mask and causal both ways, one query over a
    long cache, a sliding window.
    """
    if device == "cuda":
        plain = [_square(op, TOKENS, 128) for op in ("self", "causal")]
        decode, window = _decode(16384), _square("truncated", 32768, 128, window=1024)
    else:
        plain = [_eight_heads(op, "fp32", 1024, 64) for op in ("self", "causal")]
        decode = BenchCase("decode", "bf16", 1, 32, 8, 1, 4096, 128)
        window = _eight_heads("truncated", "fp32", 1024, 64, window=128)
    return [*(Cell(case, mode) for mode in ("fwd", "bwd") for case in plain), Cell(decode, "fwd"), Cell(window, "fwd")]


def _cuda() -> Iterable[Cell]:
    """Behind the headline. Other lengths and head dims first, each once; then other masks; then every combination."""
    for length in (2048, 8192):
        yield from (Cell(_square(op, length, 128), "fwd") for op in ("causal", "self"))
    for head_dim in (256, 64):
        yield from (Cell(_square(op, TOKENS, head_dim), "fwd") for op in ("causal", "self"))
    for length, head_dim in ((2048, 128), (8192, 128), (TOKENS, 64), (TOKENS, 256)):
        yield Cell(_square("causal", length, head_dim), "bwd")
    yield Cell(_square("truncated", 32768, 128, window=1024), "bwd")
    yield Cell(_decode(65536), "fwd")
    for mode in ("fwd", "bwd"):
        yield Cell(_square("masked", 4096, 128), mode)
        yield Cell(_square("documents", 16384, 128), mode)
    yield Cell(_square("gqa", 8192, 128, num_kv_heads=4), "fwd")
    yield Cell(_square("self", 512, 128), "fwd")
    for mode in ("fwd", "bwd"):
        for head_dim in (128, 64, 256):
            for length in (2048, 8192, 32768, 4096, 16384):
                yield from (Cell(_square(op, length, head_dim), mode) for op in ("causal", "self"))


def _square(op: str, length: int, head_dim: int, *, num_kv_heads: int | None = None, window: int | None = None):
    heads = WIDTH // head_dim
    batch = max(1, TOKENS // length)
    return BenchCase(op, "bf16", batch, heads, num_kv_heads or heads, length, length, head_dim, window)


def _decode(kv_len: int) -> BenchCase:
    """Llama 3 8B's heads, eight requests."""
    return BenchCase("decode", "bf16", 8, 32, 8, 1, kv_len, 128)


def _cpu() -> Iterable[Cell]:
    """What a laptop does in a minute or two."""
    masks = (("self", None), ("causal", None), ("truncated", 128))
    yield from _cpu_sizes(1024, 64, "fp32", masks)
    yield Cell(BenchCase("masked", "fp32", 2, 8, 8, 1024, 1024, 64), "fwd")
    yield Cell(BenchCase("documents", "fp32", 1, 8, 8, 1024, 1024, 64), "fwd")
    for length, head_dim in ((1024, 64), (2048, 64), (1024, 128), (512, 64)):
        for dtype in ("bf16", "fp32"):
            yield from _cpu_sizes(length, head_dim, dtype, masks)


def _cpu_sizes(length: int, head_dim: int, dtype: str, masks: Iterable[tuple[str, int | None]]) -> Iterable[Cell]:
    for op, window in masks:
        for mode in ("fwd", "bwd"):
            yield Cell(BenchCase(op, dtype, 1, 8, 8, length, length, head_dim, window), mode)


WIDTHS, FLOATS = (64, 128), ("bf16", "fp32")
UNFUSED = ("dropout", "biased", "wide-values", "unbatched", "head-masks")
"""What PyTorch's fused kernel on a CPU does not take."""


def cpu_table() -> list[Cell]:
    """The CPU backend's speed table: eight heads, one sequence, unless the row says otherwise."""
    return list(dict.fromkeys(_cpu_table()))


def _cpu_table() -> Iterable[Cell]:
    for head_dim in WIDTHS:
        for dtype in FLOATS:
            for op in ("self", "causal"):
                for mode in ("fwd", "bwd"):
                    yield Cell(_eight_heads(op, dtype, 4096, head_dim), mode)
            window = _eight_heads("local", dtype, 4096, head_dim, window=128)
            yield Cell(window, "fwd", ("fastattn", "sdpa", "flex"))
            yield Cell(window, "bwd")
            yield Cell(_eight_heads("masked", dtype, 4096, head_dim), "fwd")
    for kv_len in (16384, 4096):
        yield Cell(BenchCase("decode", "bf16", 1, 32, 8, 1, kv_len, 128), "fwd", ("fastattn", "sdpa", "read"))
    for dtype in FLOATS:
        for op in UNFUSED:
            wide = 128 if op == "wide-values" else None
            for mode in ("fwd", "fwd+bwd"):
                yield Cell(_eight_heads(op, dtype, 2048, 64, head_dim_v=wide), mode)
        yield Cell(_eight_heads("module", dtype, 2048, 64), "fwd", ("fastattn", "mha"))
        yield Cell(BenchCase("cross", dtype, 1, 8, 8, 4096, 77, 64), "fwd")
        yield Cell(BenchCase("self", dtype, 32, 8, 8, 64, 64, 64), "fwd")
        # How the window's time grows; the dense table that PyTorch would need is not built.
        yield Cell(_eight_heads("local", dtype, 16384, 64, window=128), "fwd", ("fastattn",))
    for head_dim in WIDTHS:
        for op in ("self", "causal"):
            for mode in ("fwd", "bwd"):
                yield Cell(_eight_heads(op, "fp16", 4096, head_dim), mode)
    for dtype in (*FLOATS, "fp16"):
        yield Cell(BenchCase("self", dtype, 1, 2, 2, 16384, 16384, 64), "fwd")
    for dtype in (*FLOATS, "fp16"):
        for head_dim in WIDTHS:
            for op in ("self", "causal"):
                for mode in ("fwd", "bwd"):
                    yield Cell(_eight_heads(op, dtype, 1024, head_dim), mode)


def _eight_heads(
    op: str, dtype: str, length: int, head_dim: int, *, window: int | None = None, head_dim_v: int | None = None
) -> BenchCase:
    return BenchCase(op, dtype, 1, 8, 8, length, length, head_dim, window, head_dim_v)


@dataclass(frozen=True)
class Suite:
    """Cells by a name of the command line, and the device that they are for."""

    says: str
    device: str
    cells: Callable[[], list[Cell]]
    providers: tuple[str, ...]


SUITES = {
    "cpu-table": Suite("the CPU backend's speed table; long, so give it a --budget", "cpu", cpu_table, PEERS["cpu"]),
}
