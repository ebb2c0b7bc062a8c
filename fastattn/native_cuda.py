"""The CUDA room's library: found, built where it is missing and nvcc is there, loaded once. native.py says how.

It is another library than the CPU's: its build takes longer and needs nvcc, and nobody without a GPU waits for it.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastattn import native, nvcc, tracing
from fastattn.compiler import BuildError, source_digest

__all__ = ["BuildError", "Library", "Tiles", "available", "build", "library", "prepare", "state", "why_not"]

NAME = "CUDA"
HINT = "`fastattn build --cuda` builds it"


class Tiles(NamedTuple):
    """How the library cuts a problem: queries and keys of a tile, and how many programs share a tile's keys."""

    block_m: int
    block_n: int
    splits: int


class Library(NamedTuple):
    """The library once it is loaded: its operator, which takes what csrc/ops.cpp says, and where it lies."""

    forward: Any
    path: Path
    handle: ctypes.CDLL

    def tiles(self, sizes: tuple[int, ...], kind: int, by_head: bool) -> Tiles:
        """For batch, num_heads, num_kv_heads, q_len, kv_len, head_dim, head_dim_v on the current device."""
        return _tiles(self.handle, sizes, kind, by_head, self.multiprocessors())

    def multiprocessors(self) -> int:
        """Of the current device."""
        return self.handle.fastattn_cuda_multiprocessors()


@functools.lru_cache(256)
def _tiles(handle: ctypes.CDLL, sizes: tuple[int, ...], kind: int, by_head: bool, multiprocessors: int) -> Tiles:
    cut = (ctypes.c_int32 * 3)()
    handle.fastattn_cuda_plan((ctypes.c_int64 * len(sizes))(*sizes), kind, int(by_head), multiprocessors, cut)
    return Tiles(*cut)


_loaded: Library | None = None
_failure: str | None = None


def why_not() -> str | None:
    """Why there is no library and none could be built; None where there is one or could be. Builds nothing."""
    if _loaded is not None:
        return None
    if _failure is not None:
        return _failure
    try:
        if find() is not None:
            return None
        if native.mode() == "never":
            return f"the CUDA library is not built, and FASTATTN_BUILD=never forbids it; {HINT}"
        failed = native.failed_mark(_path())
        return failed.read_text() if native.mode() == "auto" and failed.exists() else None
    except BuildError as refusal:
        return str(refusal)


def prepare() -> str | None:
    """Load the library, built first where it must be. Why that cannot be, or None."""
    global _failure
    if _loaded is not None:
        return None
    if available() is None and tracing.being_traced():
        return f"the CUDA library is not built yet, and a build never starts while tracing; {HINT}"
    if available() is None and torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        return f"the CUDA library is not built yet, and a build never starts while a graph is captured; {HINT}"
    if _failure is None:
        try:
            library()
        except BuildError as refusal:
            _failure = str(refusal)
    return _failure


def available() -> Library | None:
    """The library where it is there already; None where it is not. Builds nothing."""
    global _loaded
    if _loaded is None and native.mode() != "force":
        try:
            path = find()
            _loaded = None if path is None else load(path)
        except BuildError:
            return None
    return _loaded


def library() -> Library:
    """The library, loaded; built first where it is missing and FASTATTN_BUILD allows. BuildError otherwise."""
    global _loaded
    if _loaded is None:
        path = find()
        if path is None or native.mode() == "force":
            reason = why_not()
            if reason is not None:
                raise BuildError(reason)
            path = build(force=native.mode() == "force")
        _loaded = load(path)
    return _loaded


def build(*, force: bool = False, retry: bool = False) -> Path:
    """Build the library into the cache folder, as native.build does. BuildError where there is no nvcc."""
    return native.build(force=force, retry=retry, of=recipe())


def recipe() -> native.Recipe:
    """Of the library. BuildError where there is no nvcc."""
    found = nvcc.find_nvcc()
    return native.Recipe(NAME, nvcc.key(found), nvcc.plan(found, f"library{native.SUFFIX}"), found.version)


def find() -> Path | None:
    """Where the library lies; None where it must be built. BuildError where there is neither it nor nvcc."""
    shipped = Path(__file__).parent / "lib" / f"fastattn_cuda_{source_digest('cuda')}{native.SUFFIX}"
    if shipped.exists():
        return shipped
    path = _path()
    return path if path.exists() else None


def load(path: Path) -> Library:
    """Load a library and look up its operator. BuildError with the loader's words where it refuses."""
    try:
        handle = ctypes.CDLL(str(path))
    except OSError as refusal:
        raise BuildError(f"the CUDA library cannot be loaded ({refusal}); {HINT}") from refusal
    return Library(torch.ops.fastattn.cuda_forward.default, path, handle)


def state() -> str:
    """One line on the library, for people. Builds nothing."""
    here = available()
    if here is not None:
        return str(here.path)
    return why_not() or "not built yet: the first call on a Hopper GPU builds it, or `fastattn build --cuda`"


def _path() -> Path:
    return native.library_path(NAME, nvcc.key(nvcc.find_nvcc()))
