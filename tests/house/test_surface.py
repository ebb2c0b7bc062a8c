"""The public surface is what it was written down to be, in surface/: names and signatures, operators, state_dict keys,
options, environment names, JSON, the wheel; and what an earlier version pickled or exported still loads.

Anything that differs fails, additions too. If it is meant: python tests/house/surface/make.py, and read its diff.
"""

import ast
import difflib
import importlib.metadata
import importlib.util
import pickle
import pickletools
import re
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = {"fastattn.kernels": "kernels", "fastattn.bench": "bench", "fastattn": "fastattn"}
PLACES = re.compile(rb"/(?:root|tmp|work|mnt|opt|home|Users|var)/[\w.-]+")

with mock.patch.object(sys, "path", [str(Path(__file__).parent / "surface"), *sys.path]):
    import make
    from surface_values import EXPORTED, PICKLES, PROGRAMS, VALUES

HEADINGS = [(file, heading) for file, headings in make.BY_HEADING.items() for heading in headings]
MADE_BY = "2.13"
"""The torch that exported the programs. A later one reads them; an earlier one may not."""

FRESH = """
import pickle, sys
from pathlib import Path
for path in sorted(Path(sys.argv[1]).glob("*.pkl")):
    try:
        pickle.loads(path.read_bytes())
    except Exception as failure:
        print(f"{path.name}: {type(failure).__name__}: {failure}")
"""


def compare(file, heading, lines):
    """Fail with the lines that differ, as a diff."""
    before, now = make.kept(file).get(heading), [line.rstrip() for line in lines]
    before = [line for line in before or ["(this heading is new)"] if line]
    if before == now:
        return
    diff = difflib.unified_diff(before, now, f"{file}, {heading}", "today", lineterm="")
    pytest.fail(
        "\n".join([*diff, "", "The public surface has changed. If it is meant to: python tests/house/surface/make.py"]),
        pytrace=False,
    )


def builds_wheels():
    """Asked of its metadata: it cannot be imported once the standard library's distutils is."""
    try:
        return int(importlib.metadata.version("setuptools").split(".")[0]) >= 77
    except importlib.metadata.PackageNotFoundError:
        return False


@pytest.fixture(autouse=True)
def plain_definition(monkeypatch):
    """The same backend on every machine."""
    monkeypatch.setenv("FASTATTN_BACKEND", "reference")


@pytest.mark.parametrize(("file", "heading"), HEADINGS, ids=[f"{file[:-4]}-{heading}" for file, heading in HEADINGS])
def test_the_surface_is_as_it_was_written_down(file, heading):
    try:
        lines = make.made(file, heading)
    except ImportError as missing:
        library = getattr(missing.__cause__, "name", None) or missing.name
        if library is None or library.startswith("fastattn"):
            raise
        pytest.skip(f"{heading}: {library} is not installed")
    compare(file, heading, lines)


@pytest.mark.parametrize("file", make.WHOLE)
def test_the_rest_is_as_it_was_written_down(file):
    if file == "wheel.txt" and not builds_wheels():
        pytest.skip("a wheel is built with setuptools 77 or newer")
    found = make.WHOLE[file]()
    assert list(found) == list(make.kept(file))
    for heading, lines in found.items():
        compare(file, heading, lines)


@pytest.mark.parametrize("path", sorted((ROOT / "bench" / "results").glob("*.json")), ids=lambda path: path.stem)
def test_a_run_of_before_is_read(path, tmp_path):
    pytest.importorskip("rich")
    from fastattn.cli import main

    assert main(["bench", "--from", str(path), "--json", str(tmp_path / "again.json")]) in (0, 1)


# ---- what people have kept


def test_each_pickle_and_program_is_there_and_no_other():
    assert sorted(path.stem for path in PICKLES.iterdir()) == sorted(VALUES)
    assert sorted(path.stem for path in EXPORTED.iterdir()) == sorted(PROGRAMS)


@pytest.mark.parametrize("path", sorted([*PICKLES.iterdir(), *EXPORTED.iterdir()]), ids=lambda path: path.stem)
def test_a_kept_file_names_no_place_of_a_machine(path):
    assert PLACES.findall(path.read_bytes()) == []


def test_every_pickle_of_before_loads_in_a_process_that_has_imported_nothing(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", FRESH, str(PICKLES)], capture_output=True, text=True, cwd=tmp_path, timeout=120
    )
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr


@pytest.mark.parametrize("name", VALUES)
def test_a_pickle_of_before_is_what_is_made_today(name):
    make_it, same = VALUES[name]
    same(pickle.loads((PICKLES / f"{name}.pkl").read_bytes()), make_it())


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_of_before_computes_what_its_module_does(name):
    path = EXPORTED / f"{name}.pt2"
    try:
        program = torch.export.load(path)
    except Exception as failure:
        if tuple(map(int, torch.__version__.split(".")[:2])) >= tuple(map(int, MADE_BY.split("."))):
            raise
        pytest.skip(f"torch {torch.__version__} does not read a program of torch {MADE_BY}: {failure}")
    model, arguments = PROGRAMS[name]()
    with torch.no_grad():
        found, expected = (of(*arguments) for of in (program.module(), model))
    for each, want in zip(*(out if isinstance(out, tuple) else (out,) for out in (found, expected)), strict=True):
        assert torch.equal(each, want)


# ---- files that git has


def tracked():
    """Paths that git knows; a skip where this is no checkout of its own."""
    try:
        done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    except OSError:
        pytest.skip("git is not installed")
    files = set(filter(None, done.stdout.split("\0")))
    if done.returncode != 0 or "fastattn/__init__.py" not in files:
        pytest.skip("there is no git checkout here")
    return files


def places(module):
    """Where a module of ours lies, as a file or as a folder."""
    package = next(package for package in FOLDERS if module == package or module.startswith(f"{package}."))
    rest = module.removeprefix(package).strip(".").replace(".", "/")
    path = "/".join(filter(None, [FOLDERS[package], rest]))
    return [f"{path}.py", f"{path}/__init__.py"]


def imported(source):
    """(module, names taken out of it) of each import of ours, anywhere in a file."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((name.name, []) for name in node.names if name.name.split(".")[0] == "fastattn")
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "fastattn":
            yield node.module, [name.name for name in node.names]


def untracked(source, files, exists):
    """What a file imports of ours that git does not have."""
    for module, names in imported(source):
        if not files.intersection(places(module)):
            yield module
        for name in names:  # a module, or something in one
            inside = places(f"{module}.{name}")
            if any(map(exists, inside)) and not files.intersection(inside):
                yield f"{module}.{name}"


def test_git_has_every_module_that_is_imported():
    files = tracked()
    code = [path for folder in set(FOLDERS.values()) | {"tests"} for path in (ROOT / folder).rglob("*.py")]
    lost = {
        f"{path.relative_to(ROOT)}: {module}"
        for path in code
        for module in untracked(path.read_text(encoding="utf-8"), files, lambda name: (ROOT / name).exists())
    }
    assert lost == set(), "git does not have these (does .gitignore name a folder of theirs?)"


def test_the_checks_see_what_they_look_for():
    files = {"fastattn/__init__.py", "fastattn/spec.py", "kernels/__init__.py"}
    there = {"fastattn/build/nvcc.py", "fastattn/build/__init__.py"}.__contains__
    seen = {
        source: list(untracked(source, files, there))
        for source in ("import fastattn.spec", "from fastattn import spec, nothing", "from fastattn import build",
                       "def f():\n    from fastattn.build.nvcc import Nvcc", "from fastattn.kernels import x")
    }  # fmt: skip
    assert list(seen.values()) == [[], [], ["fastattn.build"], ["fastattn.build.nvcc"], []]
    assert PLACES.findall(b"\x00/tmp/a.py") and not PLACES.findall(b"archive/data/a")
    with pytest.raises(pytest.fail.Exception, match=r"(?s)\+def f\(\).*make.py"):
        compare("operators.txt", next(iter(make.kept("operators.txt"))), ["def f()"])


def modules_in_pickles():
    """Every module of ours that a pickle names: its path must stay importable, wherever its code lies."""
    found = set()
    for path in PICKLES.iterdir():
        words = {word for _, word, _ in pickletools.genops(path.read_bytes()) if isinstance(word, str)}
        found |= {word for word in words if re.fullmatch(r"fastattn(\.[a-z_]+)*", word)}
    return found


@pytest.mark.parametrize("name", sorted(modules_in_pickles()))
def test_a_module_that_pickles_name_can_be_found(name):
    assert importlib.util.find_spec(name) is not None
