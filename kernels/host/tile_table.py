"""Tile tables: how large a tile each kernel works on, by target, pass, width of the head and of the dtype.

A row serves every problem whose sizes it covers; the first that does is taken, of a target's own rows before those of
its ancestors. Nothing is tuned at run time.

All rows are of 2026-11-21, chosen by what Triton 3.6.0 makes of them and not yet by a clock: the fewest spilled bytes,
then the largest share of the tensor cores' peak that the budget of the main loop allows (docs/performance.md). `chosen`
holds registers, spilled bytes and that share, and a test holds it against the compiler.
"""

import functools
from dataclasses import dataclass, field

import torch

from fastattn.spec import AttnSpec

PASSES = ("fwd", "short", "decode", "merge", "delta", "dq", "dkv", "dbias")
"""`short` and `decode` are the forward for few queries: those of a whole group of heads fit one tile."""


LIGHT = 0
"""What a problem carries beside its products takes registers, so that it may want smaller tiles: 0 nothing, or masks of
whom nobody is surely hidden; 1 any other mask; 2 dropout, a bias or a table."""


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
    descriptors: bool = False  # load and store by tensor descriptors where the tensors allow
    persistent: bool = False  # as many programs as fit the device, each taking tile after tile
    load: int = LIGHT  # what a problem has to carry at least
    chosen: str = field(default="", compare=False)  # the figure that chose it: registers, spilled bytes, share of peak


TMA = {"descriptors": True}
BUSY = {"load": 1}
LADEN = {"load": 2}

TABLE: tuple[TileConfig, ...] = (
    # target        kernel  dim  bits   M    N  warps stages
    TileConfig("sm80", "fwd", 128, 16, 64, 32, 8, 2, **LADEN, chosen="255 registers, 8 B, 28%"),
    TileConfig("sm80", "fwd", 256, 16, 32, 32, 8, 1, **LADEN, chosen="255 registers, 0 B, 32%"),
    TileConfig("sm80", "dq", 64, 16, 64, 32, 8, 2, **LADEN, chosen="255 registers, 56 B, 27%"),
    TileConfig("sm80", "dq", 128, 16, 32, 32, 4, 2, **LADEN, chosen="255 registers, 0 B, 30%"),
    TileConfig("sm80", "dq", 256, 16, 32, 32, 8, 1, **LADEN, chosen="254 registers, 0 B, 35%"),
    TileConfig("sm80", "dkv", 128, 16, 32, 32, 8, 2, **LADEN, chosen="255 registers, 48 B, 33%"),
    TileConfig("sm80", "dkv", 256, 16, 16, 16, 8, 1, **LADEN, chosen="255 registers, 0 B, 29%"),
    TileConfig("sm80", "fwd", 128, 16, 64, 64, 8, 2, **BUSY, chosen="255 registers, 240 B, 36%"),
    TileConfig("sm80", "fwd", 64, 16, 128, 64, 4, 3, chosen="255 registers, 0 B, 100%"),
    TileConfig("sm80", "fwd", 128, 16, 128, 64, 8, 3, chosen="255 registers, 0 B, 77%"),
    TileConfig("sm80", "fwd", 256, 16, 64, 32, 4, 2, chosen="255 registers, 64 B, 50%"),
    TileConfig("sm80", "fwd", 512, 16, 32, 32, 8, 1, chosen="242 registers, 0 B, 40%"),
    TileConfig("sm80", "fwd", 64, 32, 64, 32, 8, 2, chosen="80 registers, 0 B"),
    TileConfig("sm80", "fwd", 128, 32, 32, 32, 4, 2, chosen="128 registers, 0 B"),
    TileConfig("sm80", "fwd", 256, 32, 32, 16, 4, 1, chosen="167 registers, 0 B"),
    TileConfig("sm80", "fwd", 512, 32, 16, 16, 8, 1, chosen="122 registers, 0 B"),
    TileConfig("sm80", "short", 64, 16, 64, 64, 4, 3, chosen="165 registers, 0 B, 69%"),
    TileConfig("sm80", "short", 128, 16, 64, 64, 4, 2, chosen="255 registers, 0 B, 61%"),
    TileConfig("sm80", "decode", 64, 16, 16, 128, 4, 3, chosen="128 registers, 0 B, 30%"),
    TileConfig("sm80", "decode", 128, 16, 16, 64, 4, 3, chosen="128 registers, 0 B, 30%"),
    TileConfig("sm80", "decode", 256, 16, 16, 32, 4, 2, chosen="168 registers, 0 B, 28%"),
    TileConfig("sm80", "decode", 128, 32, 16, 32, 4, 2, chosen="88 registers, 0 B"),
    TileConfig("sm80", "decode", 256, 32, 16, 16, 4, 2, chosen="181 registers, 0 B"),
    TileConfig("sm80", "merge", 512, 32, 16, 0, 4, 1, chosen="191 registers, 0 B"),
    TileConfig("sm80", "delta", 256, 32, 64, 0, 4, 1, chosen="172 registers, 0 B"),
    TileConfig("sm80", "delta", 512, 32, 32, 0, 4, 1, chosen="133 registers, 0 B"),
    TileConfig("sm80", "dq", 64, 16, 64, 64, 8, 2, chosen="188 registers, 0 B, 79%"),
    TileConfig("sm80", "dq", 128, 16, 64, 64, 8, 2, chosen="158 registers, 0 B, 47%"),
    TileConfig("sm80", "dq", 256, 16, 64, 32, 8, 1, chosen="220 registers, 0 B, 47%"),
    TileConfig("sm80", "dq", 512, 16, 16, 16, 8, 1, chosen="174 registers, 0 B, 32%"),
    TileConfig("sm80", "dq", 64, 32, 64, 32, 8, 1, chosen="110 registers, 0 B"),
    TileConfig("sm80", "dq", 128, 32, 32, 32, 8, 1, chosen="80 registers, 8 B"),
    TileConfig("sm80", "dq", 256, 32, 32, 16, 8, 1, chosen="136 registers, 0 B"),
    TileConfig("sm80", "dq", 512, 32, 16, 16, 8, 1, chosen="128 registers, 0 B"),
    TileConfig("sm80", "dkv", 64, 16, 32, 64, 4, 2, chosen="255 registers, 40 B, 61%"),
    TileConfig("sm80", "dkv", 128, 16, 64, 64, 8, 2, chosen="255 registers, 88 B, 50%"),
    TileConfig("sm80", "dkv", 256, 16, 32, 32, 8, 1, chosen="228 registers, 0 B, 42%"),
    TileConfig("sm80", "dkv", 512, 16, 16, 16, 8, 1, chosen="244 registers, 0 B, 33%"),
    TileConfig("sm80", "dkv", 64, 32, 32, 64, 8, 1, chosen="128 registers, 16 B"),
    TileConfig("sm80", "dkv", 128, 32, 32, 32, 8, 1, chosen="128 registers, 120 B"),
    TileConfig("sm80", "dkv", 256, 32, 16, 16, 8, 1, chosen="128 registers, 24 B"),
    TileConfig("sm80", "dkv", 512, 32, 16, 16, 8, 1, chosen="183 registers, 0 B"),
    TileConfig("sm80", "dbias", 64, 16, 64, 64, 8, 1, chosen="255 registers, 80 B, 20%"),
    TileConfig("sm80", "dbias", 128, 16, 32, 64, 8, 1, chosen="196 registers, 0 B, 17%"),
    TileConfig("sm80", "dbias", 256, 16, 32, 16, 4, 1, chosen="255 registers, 24 B, 35%"),
    TileConfig("sm80", "dbias", 512, 16, 16, 16, 8, 1, chosen="255 registers, 280 B, 43%"),
    TileConfig("sm80", "dbias", 128, 32, 32, 32, 8, 1, chosen="145 registers, 0 B"),
    TileConfig("sm80", "dbias", 512, 32, 16, 16, 8, 1, chosen="206 registers, 0 B"),
    TileConfig("sm90", "fwd", 128, 16, 128, 32, 8, 2, **TMA, **LADEN, chosen="255 registers, 8 B, 18%"),
    TileConfig("sm90", "dq", 128, 16, 64, 32, 8, 2, **TMA, **LADEN, chosen="255 registers, 0 B, 22%"),
    TileConfig("sm90", "dkv", 128, 16, 32, 64, 8, 2, **TMA, **LADEN, chosen="255 registers, 384 B, 23%"),
    TileConfig("sm90", "fwd", 128, 16, 128, 64, 8, 3, **TMA, **BUSY, chosen="255 registers, 808 B, 50%"),
    TileConfig("sm90", "fwd", 256, 16, 64, 32, 8, 2, **TMA, **BUSY, chosen="255 registers, 0 B, 28%"),
    TileConfig("sm90", "dq", 128, 16, 128, 64, 8, 2, **TMA, **BUSY, chosen="255 registers, 848 B, 64%"),
    TileConfig("sm90", "dq", 256, 16, 64, 32, 8, 2, **TMA, **BUSY, chosen="255 registers, 136 B, 33%"),
    TileConfig("sm90", "fwd", 64, 16, 128, 128, 8, 3, **TMA, persistent=True, chosen="253 registers, 0 B, 97%"),
    TileConfig("sm90", "fwd", 128, 16, 128, 128, 8, 2, **TMA, persistent=True, chosen="255 registers, 0 B, 100%"),
    TileConfig("sm90", "fwd", 256, 16, 128, 32, 8, 2, **TMA, chosen="201 registers, 0 B, 94%"),
    TileConfig("sm90", "short", 128, 16, 64, 64, 4, 3, **TMA, chosen="160 registers, 0 B, 100%"),
    TileConfig("sm90", "dq", 64, 16, 128, 128, 8, 2, **TMA, chosen="187 registers, 0 B, 100%"),
    TileConfig("sm90", "dq", 128, 16, 128, 64, 8, 3, **TMA, chosen="170 registers, 0 B, 100%"),
    TileConfig("sm90", "dq", 256, 16, 64, 64, 8, 2, **TMA, chosen="213 registers, 0 B, 77%"),
    TileConfig("sm90", "dkv", 64, 16, 64, 128, 8, 3, **TMA, chosen="228 registers, 0 B, 100%"),
    TileConfig("sm90", "dkv", 128, 16, 32, 128, 8, 2, **TMA, chosen="225 registers, 0 B, 89%"),
    TileConfig("sm90", "dbias", 128, 16, 64, 64, 8, 1, chosen="255 registers, 24 B, 16%"),
    TileConfig("sm100", "fwd", 128, 16, 128, 32, 8, 2, **TMA, **LADEN, chosen="171 registers, 0 B, 10%"),
    TileConfig("sm100", "fwd", 128, 16, 128, 64, 8, 3, **TMA, **BUSY, chosen="255 registers, 664 B, 24%"),
    TileConfig("sm100", "fwd", 64, 16, 128, 128, 8, 3, **TMA, chosen="219 registers, 0 B, 49%"),
    TileConfig("sm100", "fwd", 128, 16, 128, 64, 8, 3, **TMA, chosen="167 registers, 0 B, 63%"),
    # Small uneven tiles: several of them in a test's short sequences. Half precision by descriptors, float32 without.
    TileConfig("interpreter", "fwd", 512, 16, 32, 16, 1, 1, **TMA, persistent=True),
    TileConfig("interpreter", "fwd", 512, 32, 32, 16, 1, 1),
    TileConfig("interpreter", "decode", 512, 16, 16, 16, 1, 1, **TMA),
    TileConfig("interpreter", "decode", 512, 32, 16, 16, 1, 1),
    TileConfig("interpreter", "merge", 512, 32, 16, 0, 1, 1),
    TileConfig("interpreter", "delta", 512, 32, 32, 0, 1, 1),
    TileConfig("interpreter", "dq", 512, 16, 16, 32, 1, 1, **TMA),
    TileConfig("interpreter", "dq", 512, 32, 16, 32, 1, 1),
    TileConfig("interpreter", "dkv", 512, 16, 32, 16, 1, 1, **TMA),
    TileConfig("interpreter", "dkv", 512, 32, 32, 16, 1, 1),
    TileConfig("interpreter", "dbias", 512, 32, 32, 16, 1, 1),
)

ANCESTORS = {
    "sm100": ("sm100", "sm90", "sm80"),
    "sm90": ("sm90", "sm80"),
    "sm80": ("sm80",),
    "interpreter": ("interpreter",),
}
"""Where a target without a row of its own looks next."""

PROCESSORS = {"sm80": 108, "sm90": 132, "sm100": 148, "interpreter": 6}
"""Multiprocessors of the largest device of each target (A100, H100 and H200, B200): what splits try to fill. One
number a target, so that every device of it sums in the same order."""

SHARED_BYTES = {
    "sm80": 99 * 1024,
    "sm90": 227 * 1024,
    "sm100": 227 * 1024,
    "gfx942": 64 * 1024,
    "interpreter": 227 * 1024,
}
"""What a program may have (CUDA C++ Programming Guide, "Technical Specifications"; CDNA 3 ISA); for sm80 rows what 8.6,
8.9 and 12.x leave."""

WIDE_FLOAT32 = (256, 163 * 1024)
"""float32 gradients of heads wider than this need more of sm80: what 8.0 has, 8.6, 8.9 and 12.x have not."""

L2_BYTES = 32 * 2**20
"""What the keys and values of the heads that run side by side may fill of the second-level cache (40 MB on an A100, 50
on an H200)."""


def tiles_of(length: int, block: int) -> int:
    """How many tiles a length has."""
    return -(-length // block)


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
    row = _find(spec, kernel, target)
    if row is None:
        wide = max(spec.head_dim, spec.head_dim_v)
        raise ValueError(f"no tile for {kernel} on {target} at head_dim {wide} and {spec.dtype}")
    return row


def pick_forward(spec: AttnSpec, target: str) -> TileConfig:
    """The forward's row: the smallest one that holds all queries of a group of heads, else the general one. Pure."""
    for kernel in ("decode", "short"):
        row = _find(spec, kernel, target)
        if row is not None and spec.q_len * spec.group <= row.block_m:
            return row
    return pick(spec, "fwd", target)


def splits_of(spec: AttnSpec, row: TileConfig, target: str, programs: int) -> int:
    """Over how many programs the keys of a tile are split, where tiles alone leave a fifth of the device idle: two
    waves of programs at most, and four tiles of keys each at least. Pure.
    """
    if programs > 0.8 * PROCESSORS[target]:
        return 1
    most = 2 * PROCESSORS[target] // max(programs, 1)
    return max(1, min(most, spec.kv_len // (4 * row.block_n)))


def stages_of(spec: AttnSpec, row: TileConfig, tables: int) -> int:
    """How many tiles a walk has under way: the row's number, or what tables of [q_len, kv_len], read tile by tile
    beside keys and values, leave space for. Pure.
    """
    if not tables:
        return row.num_stages
    owned, walked = (row.block_n, row.block_m) if row.kernel == "dkv" else (row.block_m, row.block_n)
    width = (spec.head_dim + spec.head_dim_v) * spec.dtype.itemsize
    stage = walked * width + tables * row.block_m * row.block_n * torch.float32.itemsize
    return max(1, min(row.num_stages, (SHARED_BYTES[row.target] - owned * width) // stage))


def shared_limit(row: TileConfig, target: str) -> int:
    """The shared memory in bytes that a row's programs may take on a target."""
    wide = target == "sm80" and row.bits == 32 and row.head_dim > WIDE_FLOAT32[0] and row.kernel != "fwd"
    return WIDE_FLOAT32[1] if wide else SHARED_BYTES[target]


def l2_group_of(spec: AttnSpec, length: int) -> int:
    """How many heads run side by side, tile by tile: as many as share the L2 cache with `length` tokens. Pure."""
    bytes_of_head = length * (spec.head_dim + spec.head_dim_v) * spec.dtype.itemsize
    return max(1, L2_BYTES // max(bytes_of_head, 1))


def _find(spec: AttnSpec, kernel: str, target: str) -> TileConfig | None:
    return _row(kernel, target, max(spec.head_dim, spec.head_dim_v), 8 * spec.dtype.itemsize, _load(spec))


def _load(spec: AttnSpec) -> int:
    masks = {type(mask).__name__ for mask in spec.mask.atoms()}
    if "Dense" in masks or spec.dropout_p > 0 or spec.bias_shape is not None:
        return 2
    return LIGHT if masks <= {"Full", "Causal", "Window"} else 1


@functools.cache
def _row(kernel: str, target: str, dim: int, bits: int, load: int) -> TileConfig | None:
    rows = [row for name in ANCESTORS[target] for row in TABLE if (row.target, row.kernel) == (name, kernel)]
    for row in rows:
        if dim <= row.head_dim and bits <= row.bits and load >= row.load:
            return row
    return None


MAX_HEAD_DIM = max(row.head_dim for row in TABLE)
