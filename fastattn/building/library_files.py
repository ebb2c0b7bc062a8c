"""Which files are a library: by their names, by the manifests beside them, and by the compiler that is here."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from fastattn.building import compiler
from fastattn.building.build_cache import Folder
from fastattn.building.compiler import Compiler, Step
from fastattn.building.manifest import SUFFIX as RECORD
from fastattn.building.manifest import Manifest

SUFFIX = ".dylib" if sys.platform == "darwin" else ".so"
MARK, LOCK = ".failed", ".lock"


class Toolchain(NamedTuple):
    """The compiler of a library. `find` asks it for its version and raises BuildError where there is none; `locate`
    only looks where it lies; `named` is what the environment calls it, or empty; `plan` gives the steps that make the
    library of a name, of which the last one links.
    """

    find: Callable[[], Compiler]
    locate: Callable[[], Compiler | None]
    named: Callable[[], str]
    plan: Callable[[Compiler, str], list[Step]]


class LibraryFiles(NamedTuple):
    """A library's files, in a package and in the places of build_cache.py."""

    backend: str
    tools: Toolchain

    def shipped(self) -> Path:
        """The file within a package that brings it: the sources that it was made from are the ones beside it."""
        return Path(__file__).parents[1] / "lib" / self.shipped_name()

    def shipped_name(self) -> str:
        """Its name there."""
        return f"fastattn_{self.backend}_{compiler.source_digest(self.backend)}{SUFFIX}"

    def cached_name(self) -> str:
        """Its name in a place, by this machine's compiler. BuildError where there is none to ask."""
        found = self.tools.find()
        by = compiler.digest_of(found.version, *found.command)
        return f"{self._prefix(self.made_for())}{by}{SUFFIX}"

    def made_for(self) -> dict[str, str]:
        """What it must have been made for to serve here."""
        return compiler.made_for(self.backend, self.tools.plan(Compiler(("c++",)), "library"))

    def _prefix(self, made_for: dict[str, str]) -> str:
        return f"fastattn_{self.backend}_{compiler.digest_of(*made_for.values())}_"

    def damage_of_shipped(self) -> str | None:
        """What is wrong with the file in the package. OSError where there is none."""
        with self.shipped().open("rb") as file:
            record = self.shipped().with_suffix(RECORD)
            manifest = Manifest.read(record.read_bytes()) if record.exists() else None
            return "has no record of its bytes" if manifest is None else manifest.damage(file.fileno())

    def whole(self, folder: Folder) -> tuple[list[str], list[str]]:
        """The names of a place's libraries that serve here, the best first, and sentences on those that are damaged.

        A compiler that the environment names must have made them; where it names none, any will do, this machine's
        first, then newer ones. A compiler is asked only where it is named and none of them is its.
        """
        made_for = self.made_for()
        prefix = self._prefix(made_for)
        found, damaged = {}, []
        for record in sorted(folder.names()):
            if not (record.startswith(prefix) and record.endswith(RECORD)):
                continue
            name = record.removesuffix(RECORD) + SUFFIX
            manifest, damage = self._manifest(folder, name, made_for)
            if damage is not None:
                damaged.append(f"{folder.path / name} {damage}")
            elif manifest is not None:
                found[name] = manifest
        return self._by_compiler(folder, found), damaged

    def is_whole(self, folder: Folder, name: str) -> bool:
        """Whether the library of that name is the one that was made under it."""
        manifest, damage = self._manifest(folder, name, self.made_for())
        return manifest is not None and damage is None

    def _manifest(self, folder: Folder, name: str, made_for: dict[str, str]) -> tuple[Manifest | None, str | None]:
        """A library's record, and what is wrong with it or the library's bytes; None where there is no record, or
        another's.
        """
        record = folder.read(name.removesuffix(SUFFIX) + RECORD)
        manifest = Manifest.read(record)
        if manifest is None and record is not None:
            return None, "has a record that is damaged"
        if manifest is None or manifest.made_for != made_for:
            return None, None
        try:
            with folder.opened(name) as descriptor:
                return manifest, manifest.damage(descriptor)
        except FileNotFoundError:
            return manifest, "is missing, and its record is there"

    def _by_compiler(self, folder: Folder, found: dict[str, Manifest]) -> list[str]:
        if not found:
            return []
        here, named = self.tools.locate(), self.tools.named()
        own = [name for name, manifest in found.items() if here is not None and manifest.made_by(here)]
        if named and not own:
            if here is None:
                return [name for name, manifest in found.items() if manifest.named == named]
            return [name for name in found if name == self.cached_name()]
        if named:
            return own
        others = [name for name in found if name not in own]
        return own + sorted(others, key=folder.changed, reverse=True)

    def failure(self, folder: Folder, name: str) -> str | None:
        """What a failed build has left to be repeated; None where there is nothing, or nothing that can be read."""
        try:
            return (folder.read(name.removesuffix(SUFFIX) + MARK) or b"").decode().strip() or None
        except UnicodeDecodeError:
            return None
