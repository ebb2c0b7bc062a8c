"""The compiled library: found, built where it is missing, loaded once.

It is looked for in the installed package (a wheel that was built with it), then in the cache folder under a key of
sources, flags, compiler and torch. Where it is in neither, the first call that needs it builds it, unless
FASTATTN_BUILD=never says otherwise or somebody is tracing; FASTATTN_BUILD=force builds it once more. Processes that
want it at the same time wait for the one that builds. What is built becomes visible whole, under its name, or not at
all; a build that failed is remembered under its key until `fastattn build` or a change of anything in the key.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastattn import compiler, tracing
from fastattn.compiler import BuildError, Step

MODES = ("auto", "never", "force")
SUFFIX = ".dylib" if sys.platform == "darwin" else ".so"
ANOTHER_FOLDER = "name another in FASTATTN_CACHE_DIR"
AGAIN = "`fastattn build` tries again"


class Recipe(NamedTuple):
    """What makes one library: its room's name, the key of its file, the steps, and who takes them."""

    name: str
    key: str
    steps: list[Step]
    version: str


class Library(NamedTuple):
    """The library once it is loaded: its operators, which take what csrc/ops.cpp says, and where it lies."""

    forward: Any
    backward: Any
    weights: Any
    path: Path
    handle: ctypes.CDLL

    def isa(self) -> str:
        """The instruction set that a call would use now."""
        return _text(self.handle.fastattn_cpu_isa)

    def isas(self) -> tuple[str, ...]:
        """Those that this machine has, worst first."""
        return tuple(_text(self.handle.fastattn_cpu_isas).split())


_loaded: Library | None = None
_failure: str | None = None
_warned = False


def why_not() -> str | None:
    """Why there is no library and none could be built; None where there is one or could be. Builds nothing."""
    if _loaded is not None:
        return None
    if _failure is not None:
        return _failure
    try:
        if find() is not None:
            return None
        if mode() == "never":
            return "the library is not built, and FASTATTN_BUILD=never forbids it; `fastattn build` builds it"
        failed = failed_mark(library_path("CPU", compiler.key(compiler.find_compiler())))
        return failed.read_text() if mode() == "auto" and failed.exists() else None
    except BuildError as refusal:
        return str(refusal)


def available() -> Library | None:
    """The library where it is there already; None where it is not. Builds nothing."""
    global _loaded
    if _loaded is None and mode() != "force":
        try:
            path = find()
            _loaded = None if path is None else load(path)
        except BuildError:
            return None
    return _loaded


def prepare() -> str | None:
    """Load the library, built first where it must be. Why that cannot be, or None; a warning says it once."""
    global _failure, _warned
    if _loaded is not None:
        return None
    if tracing.being_traced() and available() is None:
        return "the library is not built yet, and a build never starts while tracing; `fastattn build` builds it"
    if _failure is None:
        try:
            library()
            return None
        except BuildError as refusal:
            _failure = str(refusal)
    if not _warned:
        _warned = True
        warnings.warn(
            f"fastattn computes with its plain reference on the CPU, slowly: {_failure}", RuntimeWarning, stacklevel=2
        )
    return _failure


def library() -> Library:
    """The library, loaded; built first where it is missing and FASTATTN_BUILD allows. BuildError otherwise."""
    global _loaded
    if _loaded is None:
        path = find()
        if path is None or mode() == "force":
            reason = why_not()
            if reason is not None:
                raise BuildError(reason)
            path = build(force=mode() == "force")
        _loaded = load(path)
    return _loaded


def load(path: Path) -> Library:
    """Load a library and look up its operators. BuildError with the loader's words where it refuses."""
    try:
        handle = ctypes.CDLL(str(path))
    except OSError as refusal:
        raise BuildError(f"the library cannot be loaded ({refusal}); {AGAIN}, FASTATTN_BUILD=force too") from refusal
    named = torch.ops.fastattn
    return Library(named.cpu_forward.default, named.cpu_backward.default, named.cpu_weights.default, path, handle)


def find() -> Path | None:
    """Where the library lies; None where it must be built. BuildError where there is neither it nor a compiler."""
    shipped = Path(__file__).parent / "lib" / shipped_name()
    if shipped.exists():
        return shipped
    path = library_path("CPU", compiler.key(compiler.find_compiler()))
    return path if path.exists() else None


def shipped_name() -> str:
    """The file's name within a wheel: the sources that it was made from are the ones beside it."""
    return f"fastattn_cpu_{compiler.source_digest()}{SUFFIX}"


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


def state() -> str:
    """One line on the library, for people. Builds nothing."""
    here = available()
    if here is not None:
        return f"{here.path}, {here.isa()} of {', '.join(here.isas())}"
    return why_not() or "not built yet: the first call on the CPU builds it, or `fastattn build`"


def recipe() -> Recipe:
    """Of the CPU library. BuildError where there is no compiler."""
    found = compiler.find_compiler()
    return Recipe("CPU", compiler.key(found), compiler.plan(found, f"library{SUFFIX}"), found.version)


def build(*, force: bool = False, retry: bool = False, of: Recipe | None = None) -> Path:
    """Build a library, the CPU's if no other is named, into the cache folder and return its path; one that is there
    already is kept, unless `force`, and a failure that is remembered repeated, unless `retry`.

    Raises:
        BuildError: no compiler, a folder that cannot be written, or the compiler's first error with the command.
    """
    of = of or recipe()
    path = library_path(of.name, of.key)
    failed = failed_mark(path)
    with _writing(), _locked(path.with_suffix(".lock")):
        if not force:
            if path.exists():
                return path
            if failed.exists() and not retry:
                raise BuildError(failed.read_text())
        failed.unlink(missing_ok=True)
        try:
            make(of, path)
        except BuildError as refusal:
            sentence = f"the library could not be built; {AGAIN}\n{refusal}"
            failed.write_text(sentence)
            raise BuildError(sentence) from refusal
    return path


def make(of: Recipe, path: Path) -> None:
    """Compile and link beside `path`, say so on one line of standard error, and put the result under its name."""
    with tempfile.TemporaryDirectory(dir=path.parent, prefix="build-") as folder:
        start = time.monotonic()
        print(f"fastattn: building the {of.name} library, {len(of.steps) - 1} files with {of.version} ... ",
              end="", file=sys.stderr, flush=True)  # fmt: skip
        try:
            compiler.run(of.steps, Path(folder))
        except BaseException:
            print(f"failed after {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
            raise
        os.replace(Path(folder) / of.steps[-1].output, path)
        print(f"{time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)


def library_path(name: str, key: str) -> Path:
    """Where a library lies in the cache folder."""
    return cache_folder() / f"fastattn_{name.lower()}_{key}{SUFFIX}"


def failed_mark(path: Path) -> Path:
    """The file that remembers a library's failed build."""
    return path.with_suffix(".failed")


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
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
def _writing() -> Iterator[None]:
    """What the system refuses in the cache folder, as a sentence."""
    try:
        yield
    except OSError as refusal:
        raise BuildError(f"the cache folder cannot be written ({refusal}); {ANOTHER_FOLDER}") from refusal


def _text(function: Any) -> str:
    function.restype = ctypes.c_char_p
    return function().decode()
