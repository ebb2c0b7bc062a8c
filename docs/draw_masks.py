"""Draws docs/masks.svg from the masks themselves: `python docs/draw_masks.py` (needs matplotlib)."""

from pathlib import Path

import matplotlib.pyplot as plt
import torch
from matplotlib.colors import ListedColormap

from fastattn.masks import Causal, Chunked, Full, Lengths, Mask, Packed, Prefix, Segments, Window

IDS = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2, 2, -1]])
CUTS = torch.tensor([0, 3, 7, 10])
ZOO: list[tuple[str, Mask, int, int]] = [
    ("Full()", Full(), 10, 10),
    ("Causal()", Causal(), 10, 10),
    ("Causal()\n4 queries at the end of 10 keys", Causal(), 4, 10),
    ('Causal(align="top-left")\n4 queries', Causal(align="top-left"), 4, 10),
    ("Window(2, 1)", Window(2, 1), 10, 10),
    ("Window(3, 0)", Window(3, 0), 10, 10),
    ("Chunked(3, left_chunks=1)", Chunked(3, 1), 10, 10),
    ("Chunked(4) & Causal()", Chunked(4) & Causal(), 10, 10),
    ("Lengths([7])", Lengths(torch.tensor([7])), 10, 10),
    ("Prefix([4])", Prefix(torch.tensor([4])), 10, 10),
    ("Segments(ids) & Causal()", Segments(IDS) & Causal(), 10, 10),
    ("Packed(cuts, cuts, Window(1, 1))", Packed(CUTS, CUTS, Window(1, 1)), 10, 10),
    ("Window(2, 0) | Lengths([2])", Window(2, 0) | Lengths(torch.tensor([2])), 10, 10),
    (
        "Causal() &\nLengths([8], kv_starts=[2])",
        Causal() & Lengths(torch.tensor([8]), kv_starts=torch.tensor([2])),
        10,
        10,
    ),
    ("Causal(offset=[3])\n4 queries in a cache", Causal(offset=torch.tensor([3])), 4, 10),
]


def main() -> None:
    columns = 5
    rows = -(-len(ZOO) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(2.6 * columns, 2.75 * rows), layout="constrained")
    for axis, (title, mask, q_len, kv_len) in zip(axes.flat, ZOO, strict=True):
        table = mask.dense(q_len, kv_len)[0, 0].expand(q_len, kv_len)
        axis.imshow(table, cmap=ListedColormap(["#f1f1ee", "#2a6f97"]), vmin=0, vmax=1)
        axis.hlines([row - 0.5 for row in range(1, q_len)], -0.5, kv_len - 0.5, color="white")
        axis.vlines([column - 0.5 for column in range(1, kv_len)], -0.5, q_len - 0.5, color="white")
        axis.set(aspect="equal", xticks=[], yticks=[], xlabel="keys", ylabel="queries")
        axis.set_title(title, fontsize=8, family="monospace")
        axis.spines[:].set_visible(False)
    figure.savefig(Path(__file__).with_name("masks.svg"), metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    plt.rcParams.update({"svg.hashsalt": "fastattn", "svg.fonttype": "none"})
    main()
