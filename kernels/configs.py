"""Tile tables: how large a tile each kernel works on, by target, pass, width of the head and of the dtype.

A row serves every problem whose sizes it covers; the first that does is taken. Nothing is tuned at run time.
Provenance of all rows: the shared memory and registers they compile to (2026-11-21, Triton 3.6); not timed yet.
"""

from dataclasses import dataclass

import torch

from fastattn.spec import AttnSpec

PASSES = ("fwd", "dq", "dkv", "delta")


@dataclass(frozen=True)
class TileConfig:
    """One row. Serves heads up to `head_dim` wide (the larger of the two) and dtypes up to `bits` wide."""

    target: str  # sm80, sm90, sm100, interpreter: see target_of
    kernel: str
    head_dim: int
    bits: int
    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


TABLE: tuple[TileConfig, ...] = (
    # target        kernel  dim  bits   M    N  warps stages
    TileConfig("sm80", "fwd", 64, 16, 128, 64, 4, 3),
    TileConfig("sm80", "fwd", 128, 16, 128, 64, 8, 3),
    TileConfig("sm80", "fwd", 256, 16, 64, 32, 4, 2),
    TileConfig("sm80", "fwd", 64, 32, 64, 32, 8, 2),
    TileConfig("sm80", "fwd", 128, 32, 32, 32, 4, 2),
    TileConfig("sm80", "fwd", 256, 32, 32, 16, 4, 1),
    TileConfig("sm80", "dq", 64, 16, 64, 64, 8, 2),
    TileConfig("sm80", "dq", 128, 16, 64, 64, 8, 2),
    TileConfig("sm80", "dq", 256, 16, 64, 32, 8, 1),
    TileConfig("sm80", "dq", 64, 32, 64, 32, 8, 1),
    TileConfig("sm80", "dq", 128, 32, 32, 32, 8, 1),
    TileConfig("sm80", "dq", 256, 32, 32, 16, 8, 1),
    TileConfig("sm80", "dkv", 64, 16, 32, 64, 4, 2),
    TileConfig("sm80", "dkv", 128, 16, 64, 64, 8, 2),
    TileConfig("sm80", "dkv", 256, 16, 32, 32, 8, 1),
    TileConfig("sm80", "dkv", 64, 32, 32, 64, 8, 1),
    TileConfig("sm80", "dkv", 128, 32, 32, 32, 8, 1),
    TileConfig("sm80", "dkv", 256, 32, 16, 16, 8, 1),
    TileConfig("sm80", "delta", 256, 32, 64, 0, 4, 1),
    TileConfig("sm90", "fwd", 64, 16, 128, 128, 8, 3),
    TileConfig("sm90", "fwd", 128, 16, 128, 64, 8, 3),
    TileConfig("sm90", "dq", 64, 16, 128, 64, 8, 2),
    TileConfig("sm90", "dq", 128, 16, 128, 64, 8, 2),
    TileConfig("sm90", "dkv", 64, 16, 64, 128, 8, 2),
    TileConfig("sm90", "dkv", 128, 16, 64, 64, 8, 2),
    TileConfig("sm100", "fwd", 64, 16, 128, 128, 8, 3),
    TileConfig("sm100", "fwd", 128, 16, 128, 64, 8, 3),
    # Small uneven tiles: several of them in a test's short sequences.
    TileConfig("interpreter", "fwd", 256, 32, 32, 16, 1, 1),
    TileConfig("interpreter", "dq", 256, 32, 16, 32, 1, 1),
    TileConfig("interpreter", "dkv", 256, 32, 32, 16, 1, 1),
    TileConfig("interpreter", "delta", 256, 32, 32, 0, 1, 1),
)

ANCESTORS = {
    "sm100": ("sm100", "sm90", "sm80"),
    "sm90": ("sm90", "sm80"),
    "sm80": ("sm80",),
    "interpreter": ("interpreter",),
}
"""Where a target without a row of its own looks next."""


def target_of(capability: tuple[int, int] | None) -> str:
    """The table's name for a device of this compute capability; None is the interpreter.

    Consumer devices (8.6, 8.9, 12.x) have neither Hopper's nor Blackwell's instructions and 99 KiB of shared memory,
    which every sm80 row fits into.
    """
    if capability is None:
        return "interpreter"
    return {9: "sm90", 10: "sm100", 11: "sm100"}.get(capability[0], "sm80")


def pick(spec: AttnSpec, kernel: str, target: str) -> TileConfig:
    """The row for one kernel of a problem. Pure; ValueError where the table ends."""
    dim, bits = max(spec.head_dim, spec.head_dim_v), torch.finfo(spec.dtype).bits
    for name in ANCESTORS[target]:
        for row in TABLE:
            if (row.target, row.kernel) == (name, kernel) and dim <= row.head_dim and bits <= row.bits:
                return row
    raise ValueError(f"no tile for {kernel} on {target} at head_dim {dim} and {bits}-bit elements")


MAX_HEAD_DIM = max(row.head_dim for row in TABLE)
