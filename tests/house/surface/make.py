"""Writes the public surface down again, where a change of it is meant: look at the diff, then commit it.

    python tests/house/surface/make.py                   what is text: names, operators, options, JSON, the wheel
    python tests/house/surface/make.py --binary NAME ... these pickles and exported programs too; `new`: those not there

A binary file stands for what people have kept of an earlier version: it stays until that version need not be read.
"""

import argparse
import os
from pathlib import Path

import surface_json
import surface_text
import surface_values
import surface_wheel
import torch

HERE = Path(__file__).resolve().parent

BY_HEADING = {
    "names.txt": {name: (surface_text.names, name) for name, _, _ in surface_text.MODULES},
    "commands.txt": {words: (surface_text.quietly, surface_text.command, words) for words in surface_text.COMMANDS},
    "json.txt": {heading: (function,) for heading, function in surface_json.JSON.items()},
}
WHOLE = {
    "operators.txt": surface_text.operators,
    "state_dicts.txt": surface_text.state_dicts,
    "environment.txt": surface_text.environment,
    "wheel.txt": surface_wheel.wheel,
}
"""What each file holds: a function for each heading, or one for all of them."""


def kept(file):
    """{heading: lines} as it was written down."""
    path = HERE / file
    return surface_text.parse(path.read_text(encoding="utf-8")) if path.exists() else {}


def made(file, heading):
    """The lines of today. ImportError where a library is missing that they are about."""
    function, *arguments = BY_HEADING[file][heading]
    return function(*arguments)


def write_texts():
    for file, headings in BY_HEADING.items():
        before, sections = kept(file), {}
        for heading in headings:
            try:
                sections[heading] = made(file, heading)
            except ImportError as missing:
                print(f"{file}: {heading} stays as it was: {missing}")
                sections[heading] = before[heading]
        write(file, sections)
    for file, function in WHOLE.items():
        write(file, function())


def write(file, sections):
    (HERE / file).write_text(surface_text.render(sections), encoding="utf-8")
    print(f"written: {file}")


def write_binaries(names):
    for folder, ending, known, content in (
        (surface_values.PICKLES, ".pkl", surface_values.VALUES, surface_values.pickled),
        (surface_values.EXPORTED, ".pt2", surface_values.PROGRAMS, surface_values.exported),
    ):
        folder.mkdir(exist_ok=True)
        for name in known:
            path = folder / f"{name}{ending}"
            if name in names or ("new" in names and not path.exists()):
                path.write_bytes(content(name))
                print(f"written: {path.name}, {path.stat().st_size} bytes, by torch {torch.__version__}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--binary", nargs="+", default=[], metavar="NAME", help="pickles and programs to make anew")
    options = parser.parse_args()
    os.environ["FASTATTN_BACKEND"] = "reference"
    os.environ.setdefault("TRITON_INTERPRET", "1")  # as where the tests run without a GPU
    write_binaries(options.binary)
    write_texts()
