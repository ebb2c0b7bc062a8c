"""Where libraries are kept, and what of it is trusted: they are code that this process runs. SECURITY.md says it for
people.

A place is a folder of this user's, or of root's, that nobody else can write to; so is every file in it that is read.
Nothing here follows a link within a place. Where one is not as it should be, `Untrusted` says what is wrong, and the
next place is taken.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import re
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from fastattn.building.commands import BUILD_LIMIT, PASSING, PASSING_WORDS, BuildError, PassingError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

ANOTHER_FOLDER = "name another in FASTATTN_CACHE_DIR"
CANNOT_BE_USED = "the cache folder {0} cannot be used"
NOT_HERE = "a library is built on Linux and macOS; elsewhere a wheel must bring it"
SUPPORTED = fcntl is not None and hasattr(os, "getuid") and hasattr(os, "O_NOFOLLOW")
MOST_LINKS = 40
MOST_BYTES = 1 << 20  # of a record or mark: a longer one is damaged
SAYS_WAITING = 1.0  # seconds
LEFT_FOR_GOOD = 86400.0  # seconds: a build's folder that is older, and under no lock that we know
ROOT = 0
NO_CODE = re.compile(r"failed to map segment|Operation not permitted|Permission denied")
"""What a loader says of a file system that is mounted so that nothing on it is executed."""


class Untrusted(BuildError):
    """A place that is not used: it is not there and cannot be made, or not this user's alone."""


def places() -> list[Callable[[], Path]]:
    """Where libraries lie, the first that is usable counts: the folder that is asked for, and one of this user's
    among temporary files. Each raises Untrusted where there is no such folder.
    """
    return [asked_folder, _temporary_folder] if SUPPORTED else []


def asked_folder() -> Path:
    """FASTATTN_CACHE_DIR, or fastattn in the user's cache folder; not made, nor looked at. BuildError where there is
    neither.
    """
    named = os.environ.get("FASTATTN_CACHE_DIR")
    if named:
        expanded = os.path.expanduser(named)
        if expanded.startswith("~"):
            raise Untrusted(f"FASTATTN_CACHE_DIR={named} names nobody's home folder")
        return _absolute(expanded)
    base = os.environ.get("XDG_CACHE_HOME", "")
    return Path(base if os.path.isabs(base) else _home() / ".cache") / "fastattn"


@functools.cache
def _absolute(path: str) -> Path:
    """As it was when the process met it first: it may go elsewhere later."""
    with refusals(f"the cache folder {path} cannot be found"):
        return Path(os.path.abspath(path))


def _home() -> Path:
    """HOME, or what the system's list of users says; never the root folder."""
    named = [os.environ.get("HOME", "")]
    with contextlib.suppress(ImportError, KeyError):
        import pwd

        named.append(pwd.getpwuid(os.getuid()).pw_dir)
    for home in named:
        if os.path.isabs(home) and os.path.normpath(home).strip("/"):
            return Path(home)
    raise Untrusted(f"there is no home folder for the library; {ANOTHER_FOLDER}")


def _temporary_folder() -> Path:
    with refusals("there is no folder for temporary files"):
        return Path(os.path.abspath(tempfile.gettempdir())) / f"fastattn-{os.getuid()}"


@contextlib.contextmanager
def refusals(what: str) -> Iterator[None]:
    """What the system refuses, as a sentence: PassingError for what may be over soon, else Untrusted."""
    try:
        yield
    except OSError as refusal:
        if refusal.errno in PASSING:
            raise PassingError(f"{what} for now ({refusal})") from refusal
        raise Untrusted(f"{what} ({refusal}); {ANOTHER_FOLDER}") from refusal
    except ValueError as refusal:  # a zero byte
        raise Untrusted(f"{what} ({refusal}); {ANOTHER_FOLDER}") from refusal


def _check_own(what: str, status: os.stat_result, remedy: str) -> None:
    """Untrusted where a folder or file is not this user's alone."""
    if status.st_uid not in (os.getuid(), ROOT):
        raise Untrusted(f"{what} belongs to user {status.st_uid}, and this process is user {os.getuid()}'s; {remedy}")
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        mode = f"{stat.S_IMODE(status.st_mode):o}"
        raise Untrusted(f"{what} can be written by others (mode {mode}); `chmod go-w` mends it, or {remedy}")


def _resolved(path: Path) -> tuple[Path, bool]:
    """The path without links, and whether nobody else can put another folder in its place: neither the owner of one on
    the way, nor a group. Links of this user and of root are followed. Where everybody could, Untrusted: a folder that
    all can write to must be sticky, as the one for temporary files is.
    """
    at, rest, links, fixed = Path(path.anchor), list(path.parts[:0:-1]), 0, True
    while rest:
        name = rest.pop()
        if name == "..":
            at = at.parent
            continue
        try:
            status = os.lstat(at / name)
        except FileNotFoundError:
            return (at / name).joinpath(*reversed(rest)), fixed
        if stat.S_ISLNK(status.st_mode):
            links += 1
            if status.st_uid not in (os.getuid(), ROOT):
                raise Untrusted(f"{at / name} is a link of user {status.st_uid}'s; {ANOTHER_FOLDER}")
            if links > MOST_LINKS:
                raise Untrusted(f"{path} goes through more than {MOST_LINKS} links; {ANOTHER_FOLDER}")
            target = Path(os.readlink(at / name))
            at = Path(target.anchor) if target.is_absolute() else at
            rest += [part for part in reversed(target.parts) if part != target.anchor]
            continue
        at = at / name
        if rest and status.st_mode & stat.S_IWOTH and not status.st_mode & stat.S_ISVTX:
            raise Untrusted(f"everybody can put another folder in the place of one in {at}; {ANOTHER_FOLDER}")
        if rest:
            own = status.st_uid in (os.getuid(), ROOT)
            fixed = fixed and own and (not status.st_mode & stat.S_IWGRP or bool(status.st_mode & stat.S_ISVTX))
    return at, fixed


class Folder:
    """A place that is open: its files by name, without links, each looked at before it is read."""

    def __init__(self, path: Path, descriptor: int, fixed: bool) -> None:
        """`fixed`: the path leads to this very folder, whatever others do."""
        self.path, self._descriptor, self._fixed = path, descriptor, fixed

    @property
    def here(self) -> Path:
        """The folder's path; where others could put another folder in its place, by its descriptor, if the system has
        names for these that other processes of ours can use.
        """
        named = Path(f"/proc/{os.getpid()}/fd/{self._descriptor}")
        return named if not self._fixed and named.is_dir() else self.path

    def check_writable(self) -> None:
        """Untrusted where no build can go into it: on a disk that is only read, say."""
        if not os.access(self.here, os.W_OK):
            raise Untrusted(f"the cache folder {self.path} cannot be written; {ANOTHER_FOLDER}")

    def names(self) -> list[str]:
        """Of everything in it."""
        return os.listdir(self._descriptor)

    @contextlib.contextmanager
    def opened(self, name: str, flags: int = os.O_RDONLY) -> Iterator[int]:
        """A file, by its descriptor. FileNotFoundError where there is none, Untrusted where it is not this user's."""
        # Not blocking: who opens a pipe waits for its other end.
        flags |= os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
        path = self.path / name
        with contextlib.suppress(FileNotFoundError):
            status = os.lstat(name, dir_fd=self._descriptor)
            if not stat.S_ISREG(status.st_mode):
                what = "a link" if stat.S_ISLNK(status.st_mode) else "not a regular file"
                raise Untrusted(f"{path} is {what}; remove it, or {ANOTHER_FOLDER}")
        descriptor = os.open(name, flags, 0o600, dir_fd=self._descriptor)
        try:
            _check_own(str(path), os.fstat(descriptor), f"remove it, or {ANOTHER_FOLDER}")
            yield descriptor
        finally:
            os.close(descriptor)

    def read(self, name: str) -> bytes | None:
        """What a small file holds; None where there is none; nothing where it is longer than MOST_BYTES."""
        try:
            with self.opened(name) as descriptor, open(descriptor, "rb", closefd=False) as file:
                content = file.read(MOST_BYTES + 1)
                return content if len(content) <= MOST_BYTES else b""
        except FileNotFoundError:
            return None

    def write(self, name: str, content: bytes) -> None:
        """Put a small file under its name, whole. The lock of its stem is held."""
        descriptor, made = tempfile.mkstemp(dir=self.here, prefix=f"build-{Path(name).stem}-")
        try:
            with open(descriptor, "wb") as file:
                file.write(content)
            self.take(Path(made), name)
        except BaseException:
            os.unlink(made)
            raise

    def take(self, made: Path, name: str) -> None:
        """Put a file that was made in a folder of this one's under its name; what was there is replaced. BuildError
        where the compiler has left something else: the mode of what a link leads to is not ours to change.
        """
        if not stat.S_ISREG(os.lstat(made).st_mode):
            raise BuildError(f"the compiler left {made.name}, which is not a regular file")
        os.chmod(made, stat.S_IMODE(os.stat(made).st_mode) & ~(stat.S_IWGRP | stat.S_IWOTH))
        os.replace(made, name, dst_dir_fd=self._descriptor)

    def remove(self, name: str) -> None:
        """A file, if it is there."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name, dir_fd=self._descriptor)

    def changed(self, name: str) -> float:
        """When a file was changed, for an order among them."""
        return os.lstat(name, dir_fd=self._descriptor).st_mtime

    @contextlib.contextmanager
    def locked(self, name: str, what: str) -> Iterator[None]:
        """Hold a lock of the folder; it goes with the process, however that ends. Who waits for `what` says so."""
        with self.opened(name, os.O_RDWR | os.O_CREAT) as lock:
            began, said = time.monotonic(), False
            while not _try_lock(lock):
                waited = time.monotonic() - began
                if waited > 2 * BUILD_LIMIT:
                    raise PassingError(f"another process has held {self.path / name} for {waited:.0f} s")
                if waited > SAYS_WAITING and not said:
                    said = True
                    print(f"fastattn: waiting for {what}, which another process builds", file=sys.stderr, flush=True)
                time.sleep(0.02)
            yield

    @contextlib.contextmanager
    def scratch(self, stem: str) -> Iterator[Path]:
        """A folder for the build of `stem`, whose lock is held; it goes afterwards, as do those of killed builds."""
        for name in self.names():
            if name.startswith("build-") and self._is_left(name, stem):
                shutil.rmtree(self.here / name, ignore_errors=True)
                with contextlib.suppress(OSError):  # a file that was to be put under its name
                    self.remove(name)
        with tempfile.TemporaryDirectory(dir=self.here, prefix=f"build-{stem}-") as folder:
            yield Path(folder)

    def _is_left(self, name: str, stem: str) -> bool:
        """Whether nobody builds in a folder: its lock is held by us, or by nobody."""
        of = name.removeprefix("build-").rpartition("-")[0]
        if of == stem:
            return True
        try:
            if of:
                with self.opened(f"{of}.lock", os.O_RDWR) as lock:
                    return _try_lock(lock)
            return time.time() - os.lstat(name, dir_fd=self._descriptor).st_mtime > LEFT_FOR_GOOD
        except (OSError, BuildError):
            return False


def load(path: Path, folder: Folder | None) -> ctypes.CDLL:
    """Load a library that has been looked at, in its place or, without one, in a package.

    Raises:
        BuildError: the loader refuses, in its words. Untrusted: because of where it lies. PassingError: for now.
    """
    asked = str(path if folder is None else folder.here / path.name)
    try:
        return ctypes.CDLL(asked)
    except OSError as refusal:
        said = str(refusal).replace(asked, str(path))
        if PASSING_WORDS.search(said):
            raise PassingError(f"cannot be loaded for now ({said})") from refusal
        if NO_CODE.search(said):
            raise Untrusted(f"no code runs from {path.parent} ({said}); {ANOTHER_FOLDER}") from refusal
        raise BuildError(f"cannot be loaded ({said})") from refusal


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Folder | None]:
    """A place, open; None where there is none.

    Raises:
        Untrusted: it is another's, others can write to it, or the system refuses.
        PassingError: the system refuses for now.
    """
    with refusals(CANNOT_BE_USED.format(path)):
        real, fixed = _resolved(path)
        try:
            descriptor = _open_folder(real)
        except FileNotFoundError:
            descriptor = None
        if descriptor is None:
            yield None
        else:
            with _closing(descriptor):
                yield Folder(real, descriptor, fixed)


@contextlib.contextmanager
def made(path: Path) -> Iterator[Folder]:
    """The same, made for this user alone where there is none."""
    with refusals(CANNOT_BE_USED.format(path)):
        real, fixed = _resolved(path)
        _make(real)
        with _closing(_open_folder(real)) as descriptor:
            yield Folder(real, descriptor, fixed)


def _open_folder(real: Path) -> int:
    descriptor = os.open(real, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        _check_own(f"the cache folder {real}", os.fstat(descriptor), ANOTHER_FOLDER)
    except Untrusted:
        os.close(descriptor)
        raise
    return descriptor


@contextlib.contextmanager
def _closing(descriptor: int) -> Iterator[int]:
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _make(path: Path) -> None:
    """Make a folder, and those above it, for this user alone. What root left in another's home would be in the way
    there: only a folder that was asked for is made in another user's.
    """
    above = next(each for each in (path, *path.parents) if each.exists())
    if above == path:
        return
    status = above.stat()
    free = os.environ.get("FASTATTN_CACHE_DIR") or status.st_mode & stat.S_ISVTX
    if status.st_uid not in (os.getuid(), ROOT) and not free:
        raise Untrusted(
            f"{above} belongs to user {status.st_uid}, and this process is user {os.getuid()}'s; {ANOTHER_FOLDER}"
        )
    for each in (*reversed([each for each in path.parents if above in each.parents]), path):
        with contextlib.suppress(FileExistsError):
            os.mkdir(each, 0o700)
            if os.lstat(each).st_mode & 0o777 != 0o700:  # a umask that takes from its owner
                os.chmod(each, 0o700)
