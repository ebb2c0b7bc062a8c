"""The command line: `fastattn bench | build | check | info | inspect | models`.

Sub-commands import what they need, help little.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys

OK, USAGE = 0, 2

NO_RICH = "fastattn's tables are drawn with rich, which is not installed; pip install 'fastattn[bench]' brings it."


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    # A pipe on a system with another encoding still gets its check marks.
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    parser = _parser()
    # Its words and flags come in any order, which argparse allows to no command of a command.
    namespace = parser.parse_args(argv[:1] if argv[:1] == ["bench"] else argv)
    if namespace.version:
        return _print_version()
    if namespace.command is None:
        parser.print_help()
        return USAGE
    if importlib.util.find_spec("rich") is None:
        print(NO_RICH, file=sys.stderr)
        return USAGE
    try:
        return namespace.run(namespace, argv)
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    from fastattn.cli import build as building
    from fastattn.cli import check as checking
    from fastattn.cli import info, inspect_triton, models

    parser = argparse.ArgumentParser("fastattn", description="Every kind of attention as one fused call.")
    parser.add_argument("--version", action="store_true", help="print the version and leave")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    bench = commands.add_parser("bench", help="time attention beside PyTorch's own, and a real model")
    bench.set_defaults(run=_bench)
    build = commands.add_parser("build", help="build a library now, instead of at the first call that needs it")
    building.add_arguments(build)
    build.set_defaults(run=building.run)
    check = commands.add_parser("check", help="hold every backend against float64 on this machine")
    checking.add_arguments(check)
    check.set_defaults(run=checking.run)
    inspected = commands.add_parser("inspect", help="compile the GPU kernels, without a GPU, and show what they became")
    inspect_triton.add_arguments(inspected)
    inspected.set_defaults(run=inspect_triton.run)
    compared = commands.add_parser("models", help="hold real architectures against their library's eager attention")
    models.add_arguments(compared)
    compared.set_defaults(run=models.run)
    here = commands.add_parser("info", help="what this machine has, which backends run, and why not the others")
    here.set_defaults(run=info.run)
    return parser


def _print_version() -> int:
    from fastattn import __version__

    print(f"fastattn {__version__}")
    return OK


def _bench(namespace: argparse.Namespace, argv: list[str]) -> int:
    from fastattn.bench import command, options
    from fastattn.bench.report import compare, doc_tables

    for word, verb in (("compare", compare.main), ("report", doc_tables.main)):
        if argv[1:2] == [word]:
            return verb(argv[2:])
    return command.main(options.parse(argv[1:]))


if __name__ == "__main__":
    sys.exit(main())
