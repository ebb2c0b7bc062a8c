"""What is recorded beside a built library: what it was made for and by, and the digest of its bytes."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass

from fastattn.building.compiler import Compiler

SUFFIX = ".json"
CHUNK = 1 << 20


@dataclass(frozen=True)
class Manifest:
    """`made_for` is what compiler.made_for said, `command`, `program` and `version` are the compiler's, `named` what
    the environment called it; `size` in bytes and `sha256` are the library's.
    """

    made_for: dict[str, str]
    version: str
    command: list[str]
    program: list[int]
    named: str
    size: int
    sha256: str

    @classmethod
    def of(
        cls, descriptor: int, made_for: dict[str, str], compiler: Compiler | None = None, named: str = ""
    ) -> Manifest:
        """Of a library that was just made: by `compiler`, where that matters."""
        size, sha256 = os.fstat(descriptor).st_size, digest(descriptor)
        if compiler is None:
            return cls(made_for, "", [], [], named, size, sha256)
        return cls(made_for, compiler.version, list(compiler.command), compiler.program(), named, size, sha256)

    @classmethod
    def read(cls, content: bytes | None) -> Manifest | None:
        """None where there is none, or what is there is none."""
        try:
            found = cls(**json.loads(content or b"null"))
        except (ValueError, TypeError, RecursionError):  # the last: lists in lists in lists
            return None
        kinds = (dict, str, list, list, str, int, str)
        fits = all(isinstance(value, kind) for value, kind in zip(vars(found).values(), kinds, strict=True))
        return found if fits else None

    def to_bytes(self) -> bytes:
        """As it is kept."""
        return json.dumps(asdict(self), indent=1).encode()

    def made_by(self, compiler: Compiler) -> bool:
        """Whether this very compiler has made the library; it is not asked."""
        try:
            return self.command == list(compiler.command) and self.program == compiler.program()
        except OSError:
            return False

    def damage(self, descriptor: int) -> str | None:
        """What is wrong with the bytes of a library; None where they are those that were made."""
        size = os.fstat(descriptor).st_size
        if size != self.size:
            return f"is damaged: it has {size} bytes, and {self.size} were made"
        if digest(descriptor) != self.sha256:
            return "is damaged: its bytes are not those that were made (SHA-256)"
        return None


def digest(descriptor: int) -> str:
    """SHA-256 of an open file."""
    found = hashlib.sha256()
    os.lseek(descriptor, 0, os.SEEK_SET)
    while chunk := os.read(descriptor, CHUNK):
        found.update(chunk)
    return found.hexdigest()
