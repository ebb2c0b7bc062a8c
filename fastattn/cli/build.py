"""`fastattn build`: the libraries, made ahead of the first call that needs them."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import argparse

OK, WRONG = 0, 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the sub-command."""
    parser.add_argument("--force", action="store_true", help="build it even if it is there")
    parser.add_argument("--cuda", action="store_true", help="the CUDA backend's library, with nvcc; default the CPU's")


def run(namespace: argparse.Namespace, argv: list[str]) -> int:
    """Build, and say where it lies. 0 it is there, 1 it could not be built."""
    from fastattn.building import cpu_library, cuda_library
    from fastattn.building.commands import BuildError

    try:
        if namespace.cuda:
            path = cuda_library.LIBRARY.build(force=namespace.force, retry=True)
            said = str(path)
        else:
            path = cpu_library.LIBRARY.build(force=namespace.force, retry=True)
            library = cpu_library.LIBRARY.load(path)
            said = f"{path}\ninstruction sets here: {', '.join(library.isas())}; in use: {library.isa()}"
    except BuildError as refusal:
        print(f"fastattn build: {refusal}", file=sys.stderr)
        return WRONG
    print(said)
    return OK
