"""Compiled libraries: found, built where they are missing, loaded once; one for the CPU and one for CUDA GPUs.

A library is looked for in the installed package (a wheel that was built with it), then in the places of build_cache.py:
without a compiler, by what it was made for, and held against the manifest beside it (library_files.py). The first place
that is there and can be written decides: where it has no whole library, none is looked for elsewhere. The first call
that needs one then builds it, unless FASTATTN_BUILD=never says otherwise, somebody is tracing or a CUDA graph is
captured; FASTATTN_BUILD=force builds it once more. Processes that want it at the same time wait for the one that
builds. What is built becomes visible whole, under its name, or not at all; a build that failed is remembered under its
key until `fastattn build` or a change of anything in the key, unless the reason may be over soon.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

import torch

from fastattn import callers, process, tracing
from fastattn.building import build_cache, compiler
from fastattn.building.build_cache import Folder, Untrusted
from fastattn.building.commands import BuildError, PassingError
from fastattn.building.library_files import LOCK, MARK, RECORD, SUFFIX, LibraryFiles, Toolchain
from fastattn.building.manifest import Manifest

MODES = ("auto", "never", "force")
TRIES_AGAIN = 60.0  # seconds after which a process tries once more what failed for a passing reason
_LOADING = threading.Lock()

Loaded = TypeVar("Loaded")
Found = TypeVar("Found")


class NotLoaded(BuildError):
    """A library is there, and the system's loader refuses it."""


class Library(Generic[Loaded]):
    """One library's way from sources to operators, and what is known of it in this process."""

    def __init__(
        self,
        name: str,
        *,
        command: str,
        tools: Toolchain,
        operators: Callable[[Path, ctypes.CDLL], Loaded],
        instead: str | None = None,
    ) -> None:
        """`command` builds it; `operators` is what a loaded library offers; `instead` says, in a warning, what its
        calls meet without it, if that is to be said.
        """
        self.name, self.command, self.operators, self.instead = name, command, operators, instead
        self.files = LibraryFiles(name.lower(), tools)
        self.loaded: Loaded | None = None
        self.failure: str | None = None
        self.retry_at = float("inf")
        self.warned = False
        self.unusable: dict[str, None] = {}  # places that are passed over, and why, in the order they were met
        self.damaged: dict[str, None] = {}  # libraries, likewise
        self._building = threading.Lock()
        if hasattr(os, "register_at_fork"):  # a child of a process that builds has no thread that would let it go
            os.register_at_fork(after_in_child=self._let_go)
        self._hint, self._again = f"{command} builds it", f"{command} tries again"

    def _let_go(self) -> None:
        self._building = threading.Lock()

    def why_not(self) -> str | None:
        """Why there is no library and none could be built; None where there is one or could be. Builds nothing."""
        if self.loaded is not None:
            return None
        if self.failure is not None and time.monotonic() < self.retry_at:
            return self.failure
        try:
            return None if self._here() is not None else self._why_no_build()
        except BuildError as refusal:
            return self._with_troubles(refusal)

    def available(self) -> Loaded | None:
        """The library where it is there already; None where it is not. Builds nothing."""
        if self.loaded is None:
            with contextlib.suppress(BuildError):
                return self._here()
        return self.loaded

    def prepare(self, *, by_name: bool = False) -> str | None:
        """Load the library, built first where it must be. Why that cannot be, or None.

        A warning says once that calls are served by something much slower, or that the library is kept in another place
        than the usual one. `by_name`: without the library the call is refused, so that nothing else serves it.
        """
        if self.loaded is not None:
            return None
        for busy, doing in ((tracing.being_traced, "tracing"), (_capturing, "a CUDA graph is captured")):
            if busy() and self.available() is None:
                return f"the {self.name} library is not built yet, and a build never starts while {doing}; {self._hint}"
        if self.failure is None or time.monotonic() >= self.retry_at:
            try:
                self.get()
                self.failure = None
                if self.unusable:
                    self._warn(f"the {self.name} library is kept among temporary files: {'; '.join(self.unusable)}")
                return None
            except BuildError as refusal:
                self.failure = self._with_troubles(refusal)
                passing = isinstance(refusal, PassingError)
                self.retry_at = time.monotonic() + TRIES_AGAIN if passing else float("inf")
        if self.instead is not None and not by_name:
            self._warn(f"{self.instead}: {self.failure}")
        return self.failure

    def get(self) -> Loaded:
        """The library, loaded; built first where it is missing and FASTATTN_BUILD allows. BuildError otherwise."""
        if self.loaded is None:
            with self._building:
                self.loaded = self._here() or self._built()
        return self.loaded

    # ---- finding

    def find(self) -> Path | None:
        """Where the library lies, whole and trusted; None where it must be built."""
        return self._first(lambda path, folder: path)

    def _here(self) -> Loaded | None:
        """The library, loaded from where it is, or before; None where it must be built."""
        if self.loaded is None:
            kept = process.kept(self._kept_name())
            self.loaded = self._look() if kept is None else self._again_of(*kept)
        return self.loaded

    def _look(self) -> Loaded | None:
        """The first library that can be loaded."""
        return None if mode() == "force" else self._first(self._load)

    def _first(self, use: Callable[[Path, Folder | None], Found]) -> Found | None:
        """What `use` makes of the first library that would serve here, given with its place: whole ones, the best
        first; the next one where `use` raises NotLoaded. One in the package is as trusted as the code beside it. Places
        after one that a build can go into are not looked at: they would hide that it lacks a whole library.
        """
        if self._is_shipped() and (found := self._tried(use, self.files.shipped(), None)) is not None:
            return found
        for place in build_cache.places():
            try:
                with build_cache.opened(place()) as folder:
                    if folder is None:
                        continue
                    names, damaged = self.files.whole(folder)
                    self.damaged |= dict.fromkeys(damaged)
                    for name in names:
                        if (found := self._tried(use, folder.path / name, folder)) is not None:
                            return found
                    folder.check_writable()
                    return None
            except Untrusted as refusal:
                self.unusable[str(refusal)] = None
        return None

    def _is_shipped(self) -> bool:
        """Whether the package has a whole library."""
        try:
            damage = self.files.damage_of_shipped()
        except OSError:
            return False
        if damage is not None:
            self.damaged[f"{self.files.shipped()} {damage}"] = None
        return damage is None

    def _tried(self, use: Callable[[Path, Folder | None], Found], path: Path, folder: Folder | None) -> Found | None:
        """What `use` makes of a library; None where the loader refuses it."""
        try:
            return use(path, folder)
        except NotLoaded as refusal:
            self.damaged[str(refusal)] = None
        except Untrusted as refusal:  # no code runs from where it lies
            self.unusable[str(refusal)] = None
            if folder is not None:
                raise
        return None

    # ---- building

    def shipped_name(self) -> str:
        """The file's name within a package that brings it."""
        return self.files.shipped_name()

    def build(self, *, force: bool = False, retry: bool = False) -> Path:
        """Build it into the folder that is asked for, or the usual one, and return its path; one that is there already
        is kept, unless `force`, and a failure that is remembered repeated. With `retry` it is not, and a library that
        cannot be loaded is not kept.

        Raises:
            BuildError: no compiler, a folder that cannot be written or is not trusted, or the compiler's first error
                with the command. PassingError where the next try may succeed.
        """
        if not build_cache.SUPPORTED:
            raise BuildError(build_cache.NOT_HERE)
        name = self.files.cached_name()  # without a compiler no folder is made
        with self._building, build_cache.made(build_cache.asked_folder()) as folder:
            self._build_in(folder, name, force, retry)
            return folder.path / name

    def _why_no_build(self) -> str | None:
        if mode() == "never":
            return self._with_troubles(self._never())
        name, refusals = self.files.cached_name(), []
        for place in build_cache.places():
            try:
                with build_cache.opened(place()) as folder:
                    if folder is None:
                        return None
                    folder.check_writable()
                    return None if mode() == "force" else self._remembered(folder, name)
            except Untrusted as refusal:
                refusals.append(str(refusal))
        return "; ".join(refusals) or build_cache.NOT_HERE

    def _never(self) -> BuildError:
        return BuildError(f"the {self.name} library is not built, and FASTATTN_BUILD=never forbids it; {self._hint}")

    def _built(self) -> Loaded:
        """Build in the first place that can be used, and load what was built."""
        if mode() == "never":
            raise self._never()
        name, refusals = self.files.cached_name(), []
        for place in build_cache.places():
            try:
                with build_cache.made(place()) as folder:
                    folder.check_writable()
                    self._build_in(folder, name, force=mode() == "force", retry=False)
                    return self._load(folder.path / name, folder)
            except Untrusted as refusal:
                refusals.append(str(refusal))
                self.unusable[str(refusal)] = None
        raise BuildError("; ".join(refusals) or build_cache.NOT_HERE)

    def _build_in(self, folder: Folder, name: str, force: bool, retry: bool) -> None:
        """Build it in a place under its name, unless it is there."""
        stem = name.removesuffix(SUFFIX)
        with folder.locked(stem + LOCK, f"the {self.name} library"):
            if not force:
                if self.files.is_whole(folder, name) and not (retry and self._refused(folder, name)):
                    return
                failed = None if retry else self._remembered(folder, name)
                if failed is not None:
                    raise BuildError(failed)
            folder.remove(stem + MARK)
            try:
                with folder.scratch(stem) as scratch:
                    made, manifest = self._make(scratch)
                    folder.remove(stem + RECORD)  # a library without one is none, whenever this ends
                    folder.take(made, name)
                folder.write(stem + RECORD, manifest.to_bytes())
            except (PassingError, Untrusted) as refusal:
                raise type(refusal)(self._failed(refusal)) from refusal
            except BuildError as refusal:
                with contextlib.suppress(OSError):
                    folder.write(stem + MARK, str(refusal).encode(errors="replace"))
                raise BuildError(self._failed(refusal)) from refusal

    def _remembered(self, folder: Folder, name: str) -> str | None:
        """A failed build that nothing has been changed about since; None where there is none."""
        mark = folder.path / (name.removesuffix(SUFFIX) + MARK)
        failure = self.files.failure(folder, name)
        return failure and f"the {self.name} library could not be built before, says {mark}; {self._again}\n{failure}"

    def _failed(self, refusal: BuildError) -> str:
        return f"the {self.name} library could not be built; {self._again}\n{refusal}"

    def _make(self, folder: Path) -> tuple[Path, Manifest]:
        """Compile and link in a folder, and say so on one line of standard error."""
        tools = self.files.tools
        found = tools.find()
        steps = tools.plan(found, f"library{SUFFIX}")
        for sentence in self.damaged:
            print(f"fastattn: {sentence}", file=sys.stderr)
        start = time.monotonic()
        print(f"fastattn: building the {self.name} library, {len(steps) - 1} files with {found.version} ... ",
              end="", file=sys.stderr, flush=True)  # fmt: skip
        try:
            compiler.run(steps, folder)
        except BaseException:
            print(f"failed after {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
            raise
        print(f"{time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
        made = folder / steps[-1].output
        with made.open("rb") as file:
            return made, Manifest.of(file.fileno(), self.files.made_for(), found, tools.named())

    def ship(self, target: Path, *, build: bool) -> bool:
        """Put the library into a package's folder as a wheel brings it, with its record: built there, or the one that
        `find` finds. False where there is none.
        """
        shipped = target / self.files.shipped_name()
        if build:
            with tempfile.TemporaryDirectory(dir=target, prefix="build-") as name:
                made, manifest = self._make(Path(name))
                os.replace(made, shipped)
            shipped.with_suffix(RECORD).write_bytes(manifest.to_bytes())
            return True
        found = self.find()
        if found is None:
            return False
        shutil.copy2(found, shipped)
        shutil.copy2(found.with_suffix(RECORD), shipped.with_suffix(RECORD))
        return True

    # ---- loading

    def load(self, path: Path) -> Loaded:
        """Load a library of a trusted folder and look up its operators. BuildError with the loader's words where it
        refuses.
        """
        with build_cache.made(path.parent) as folder:
            return self._load(path, folder)

    def _load(self, path: Path, folder: Folder | None) -> Loaded:
        with _LOADING:
            kept = process.kept(self._kept_name())
            if kept is not None:
                return self._again_of(*kept)
            try:
                handle = build_cache.load(path, folder)
            except (PassingError, Untrusted):
                raise
            except BuildError as refusal:
                again = f"{self._again}, FASTATTN_BUILD=force too"
                raise NotLoaded(f"the {self.name} library {refusal}; {again}") from refusal
            process.keep(self._kept_name(), (compiler.source_digest(self.files.backend), path, handle))
        return self.operators(path, handle)

    def _again_of(self, sources: str, path: Path, handle: ctypes.CDLL) -> Loaded:
        """What this process has loaded before: a library's operators have names, and these are taken."""
        if sources != compiler.source_digest(self.files.backend):
            raise BuildError(
                f"this process has loaded {path}, which was made from other sources, and it can load one {self.name} "
                "library; restart it"
            )
        return self.operators(path, handle)

    def _kept_name(self) -> str:
        return f"{self.name} library"

    def _refused(self, folder: Folder, name: str) -> bool:
        try:
            self._load(folder.path / name, folder)
        except BuildError:
            return True
        return False

    # ---- saying

    def _with_troubles(self, refusal: BuildError) -> str:
        said = str(refusal)
        return "; ".join([said, *(each for each in (*self.unusable, *self.damaged) if each not in said)])

    def _warn(self, sentence: str) -> None:
        if not self.warned:
            self.warned = True
            callers.warn(sentence)


def mode() -> str:
    """FASTATTN_BUILD. ValueError if it is none of MODES."""
    asked = os.environ.get("FASTATTN_BUILD") or "auto"
    if asked not in MODES:
        raise ValueError(f"FASTATTN_BUILD: one of {', '.join(MODES)} is needed, got {asked!r}")
    return asked


def _capturing() -> bool:
    """Whether a CUDA graph is being captured; asks nothing of a GPU that nobody has used yet."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
