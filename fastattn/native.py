"""Compiled libraries: found, built where they are missing, loaded once. native_cpu.py and native_cuda.py each have one.

A library is looked for in the installed package (a wheel that was built with it), then in the cache folder under a key
of sources, flags, compiler and torch. Where it is in neither, the first call that needs it builds it, unless
FASTATTN_BUILD=never says otherwise, somebody is tracing or a CUDA graph is captured; FASTATTN_BUILD=force builds it
once more. Processes that want it at the same time wait for the one that builds. What is built becomes visible whole,
under its name, or not at all; a build that failed is remembered under its key until `fastattn build` or a change of
anything in the key.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Generic, NamedTuple, TypeVar

import torch

from fastattn import compiler, tracing
from fastattn.compiler import BuildError, Step

MODES = ("auto", "never", "force")
SUFFIX = ".dylib" if sys.platform == "darwin" else ".so"
ANOTHER_FOLDER = "name another in FASTATTN_CACHE_DIR"

Loaded = TypeVar("Loaded")


class Recipe(NamedTuple):
    """What makes a library: the steps, of which the last one links, and who takes them."""

    steps: list[Step]
    version: str


class Native(Generic[Loaded]):
    """One library's way from sources to operators, and what is known of it in this process."""

    def __init__(
        self,
        name: str,
        *,
        command: str,
        recipe: Callable[[], Recipe],
        operators: Callable[[Path, ctypes.CDLL], Loaded],
        instead: str | None = None,
    ) -> None:
        """`command` builds it; `recipe` raises BuildError where there is no compiler; `operators` is what a loaded
        library offers; `instead` says, in a warning, what its calls meet without it, if that is to be said.
        """
        self.name, self.command, self.recipe, self.operators, self.instead = name, command, recipe, operators, instead
        self.loaded: Loaded | None = None
        self.failure: str | None = None
        self.warned = False
        self._hint, self._again = f"{command} builds it", f"{command} tries again"

    def why_not(self) -> str | None:
        """Why there is no library and none could be built; None where there is one or could be. Builds nothing."""
        if self.loaded is not None:
            return None
        if self.failure is not None:
            return self.failure
        try:
            if self.find() is not None:
                return None
            if mode() == "never":
                return f"the {self.name} library is not built, and FASTATTN_BUILD=never forbids it; {self._hint}"
            failed = failed_mark(self.cached())
            return failed.read_text() if mode() == "auto" and failed.exists() else None
        except BuildError as refusal:
            return str(refusal)

    def available(self) -> Loaded | None:
        """The library where it is there already; None where it is not. Builds nothing."""
        if self.loaded is None and mode() != "force":
            try:
                path = self.find()
                self.loaded = None if path is None else self.load(path)
            except BuildError:
                return None
        return self.loaded

    def prepare(self) -> str | None:
        """Load the library, built first where it must be. Why that cannot be, or None; a warning says it once where
        calls are then served by something much slower.
        """
        if self.loaded is not None:
            return None
        for busy, doing in ((tracing.being_traced, "tracing"), (_capturing, "a CUDA graph is captured")):
            if busy() and self.available() is None:
                return f"the {self.name} library is not built yet, and a build never starts while {doing}; {self._hint}"
        if self.failure is None:
            try:
                self.get()
                return None
            except BuildError as refusal:
                self.failure = str(refusal)
        if self.instead is not None and not self.warned:
            self.warned = True
            warnings.warn(f"{self.instead}: {self.failure}", RuntimeWarning, stacklevel=2)
        return self.failure

    def get(self) -> Loaded:
        """The library, loaded; built first where it is missing and FASTATTN_BUILD allows. BuildError otherwise."""
        if self.loaded is None:
            path = self.find()
            if path is None or mode() == "force":
                reason = self.why_not()
                if reason is not None:
                    raise BuildError(reason)
                path = self.build(force=mode() == "force")
            self.loaded = self.load(path)
        return self.loaded

    def load(self, path: Path) -> Loaded:
        """Load a library and look up its operators. BuildError with the loader's words where it refuses."""
        try:
            handle = ctypes.CDLL(str(path))
        except OSError as refusal:
            raise BuildError(
                f"the {self.name} library cannot be loaded ({refusal}); {self._again}, FASTATTN_BUILD=force too"
            ) from refusal
        return self.operators(path, handle)

    def find(self) -> Path | None:
        """Where the library lies; None where it must be built. BuildError where there is neither it nor a compiler."""
        shipped = Path(__file__).parent / "lib" / self.shipped_name()
        if shipped.exists():
            return shipped
        path = self.cached()
        return path if path.exists() else None

    def cached(self) -> Path:
        """Where it lies in the cache folder, once it is built. BuildError where there is no compiler to ask."""
        steps, version = self.recipe()
        room = self.name.lower()
        return cache_folder() / f"fastattn_{room}_{compiler.key(room, version, steps)}{SUFFIX}"

    def shipped_name(self) -> str:
        """The file's name within a wheel: the sources that it was made from are the ones beside it."""
        room = self.name.lower()
        return f"fastattn_{room}_{compiler.source_digest(room)}{SUFFIX}"

    def build(self, *, force: bool = False, retry: bool = False) -> Path:
        """Build it into the cache folder and return its path; one that is there already is kept, unless `force`, and
        a failure that is remembered repeated, unless `retry`.

        Raises:
            BuildError: no compiler, a folder that cannot be written, or the compiler's first error with the command.
        """
        path = self.cached()
        failed = failed_mark(path)
        with writing(), locked(path.with_suffix(".lock")):
            if not force:
                if path.exists():
                    return path
                if failed.exists() and not retry:
                    raise BuildError(failed.read_text())
            failed.unlink(missing_ok=True)
            try:
                self.make(path)
            except BuildError as refusal:
                sentence = f"the {self.name} library could not be built; {self._again}\n{refusal}"
                failed.write_text(sentence)
                raise BuildError(sentence) from refusal
        return path

    def make(self, path: Path) -> None:
        """Compile and link beside `path`, say so on one line of standard error, and put the result under its name."""
        steps, version = self.recipe()
        with tempfile.TemporaryDirectory(dir=path.parent, prefix="build-") as folder:
            start = time.monotonic()
            print(f"fastattn: building the {self.name} library, {len(steps) - 1} files with {version} ... ",
                  end="", file=sys.stderr, flush=True)  # fmt: skip
            try:
                compiler.run(steps, Path(folder))
            except BaseException:
                print(f"failed after {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
                raise
            os.replace(Path(folder) / steps[-1].output, path)
            print(f"{time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)


def mode() -> str:
    """FASTATTN_BUILD. ValueError if it is none of MODES."""
    asked = os.environ.get("FASTATTN_BUILD") or "auto"
    if asked not in MODES:
        raise ValueError(f"FASTATTN_BUILD: one of {', '.join(MODES)} is needed, got {asked!r}")
    return asked


def cache_folder() -> Path:
    """FASTATTN_CACHE_DIR, or fastattn in the user's cache folder."""
    named = os.environ.get("FASTATTN_CACHE_DIR")
    if named:
        return Path(named).expanduser().absolute()
    try:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError as refusal:
        raise BuildError(f"there is no home folder for the library ({refusal}); {ANOTHER_FOLDER}") from refusal
    return Path(base) / "fastattn"


def failed_mark(path: Path) -> Path:
    """The file that remembers a library's failed build."""
    return path.with_suffix(".failed")


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a file's lock; it goes with the process, however that ends."""
    try:
        import fcntl
    except ImportError as missing:
        raise BuildError("the library is built on Linux and macOS; elsewhere a wheel must bring it") from missing
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def writing() -> Iterator[None]:
    """What the system refuses in the cache folder, as a sentence."""
    try:
        yield
    except OSError as refusal:
        raise BuildError(f"the cache folder cannot be written ({refusal}); {ANOTHER_FOLDER}") from refusal


def _capturing() -> bool:
    """Whether a CUDA graph is being captured; asks nothing of a GPU that nobody has used yet."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
