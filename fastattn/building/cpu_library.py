"""The CPU backend's library: the first call on the CPU builds it where it is missing."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastattn.building import compiler
from fastattn.building.library import Library
from fastattn.building.library_files import Toolchain


class Operators(NamedTuple):
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


def state() -> str:
    """One line on the library, for people. Builds nothing."""
    here = LIBRARY.available()
    if here is not None:
        return f"{here.path}, {here.isa()} of {', '.join(here.isas())}"
    return LIBRARY.why_not() or "not built yet: the first call on the CPU builds it, or `fastattn build`"


def _operators(path: Path, handle: ctypes.CDLL) -> Operators:
    named = torch.ops.fastattn
    return Operators(named.cpu_forward.default, named.cpu_backward.default, named.cpu_weights.default, path, handle)


def _text(function: Any) -> str:
    function.restype = ctypes.c_char_p
    return function().decode()


LIBRARY = Library(
    "CPU",
    command="`fastattn build`",
    tools=Toolchain(compiler.find_compiler, compiler.locate_compiler, compiler.named_compiler, compiler.plan),
    operators=_operators,
    instead="fastattn computes with its plain reference on the CPU, slowly",
)
