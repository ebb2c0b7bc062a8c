"""The CUDA backend's library: the first call on a Hopper GPU builds it where it is missing and nvcc is there.

It is another library than the CPU's: its build takes longer and needs nvcc, and nobody without a GPU waits for it.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastattn.building import nvcc
from fastattn.building.library import Library
from fastattn.building.library_files import Toolchain


class Tiles(NamedTuple):
    """How the library cuts a problem: queries and keys of a tile, how many programs share a tile's keys, whether blocks
    take their tiles by a counter, and how many columns a row of a split's part has in memory.
    """

    block_m: int
    block_n: int
    splits: int
    counts: int
    part_step: int


class Operators(NamedTuple):
    """The library once it is loaded: its operator, which takes what csrc/ops.cpp says, and where it lies."""

    forward: Any
    path: Path
    handle: ctypes.CDLL

    def tiles(self, sizes: tuple[int, ...], variant: int, by_head: bool, device: int) -> Tiles:
        """For batch, num_heads, num_kv_heads, q_len, kv_len, head_dim, head_dim_v on a device, by its number."""
        return _tiles(self.handle, sizes, variant, by_head, self.multiprocessors(device))

    def multiprocessors(self, device: int) -> int:
        """Of a device; 0 where it is none."""
        return self.handle.fastattn_cuda_multiprocessors(device)


@functools.lru_cache(256)
def _tiles(handle: ctypes.CDLL, sizes: tuple[int, ...], variant: int, by_head: bool, multiprocessors: int) -> Tiles:
    cut = (ctypes.c_int32 * len(Tiles._fields))()
    handle.fastattn_cuda_plan((ctypes.c_int64 * len(sizes))(*sizes), variant, int(by_head), multiprocessors, cut)
    return Tiles(*cut)


def state() -> str:
    """One line on the library, for people. Builds nothing."""
    here = LIBRARY.available()
    if here is not None:
        return str(here.path)
    return LIBRARY.why_not() or "not built yet: the first call on a Hopper GPU builds it, or `fastattn build --cuda`"


def _operators(path: Path, handle: ctypes.CDLL) -> Operators:
    return Operators(torch.ops.fastattn.cuda_forward.default, path, handle)


LIBRARY = Library(
    "CUDA",
    command="`fastattn build --cuda`",
    tools=Toolchain(nvcc.find_nvcc, nvcc.locate_nvcc, nvcc.named_nvcc, nvcc.plan),
    operators=_operators,
)
