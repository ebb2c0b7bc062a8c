"""A module that has moved is found by its former name: the very module, unharmed, and nothing else is."""

import importlib
import importlib.util
import os
import subprocess
import sys

import pytest

from fastattn.stable_names import FORMER_NAMES, FormerNames, install

NEEDS = {"testing.strategies": "hypothesis", "integrations.transformers": "transformers", "bench.gpu": "rich"}
"""What must be installed to import a module whose name begins so."""


@pytest.mark.parametrize("former", FORMER_NAMES)
def test_a_former_name_is_the_module_itself(former):
    name = FORMER_NAMES[former]
    for start, needed in NEEDS.items():
        if name.startswith(start):
            pytest.importorskip(needed)
    module = importlib.import_module(f"fastattn.{name}")
    spec = module.__spec__
    try:
        assert importlib.import_module(f"fastattn.{former}") is module
    finally:
        sys.modules.pop(f"fastattn.{former}", None)
    assert module.__spec__ is spec and spec.name == module.__name__ == f"fastattn.{name}"


@pytest.mark.parametrize("former", FORMER_NAMES)
def test_a_former_name_is_nobodys_now(former):
    """A module of that name would be found first, and the former one never."""
    assert isinstance(next(f for f in sys.meta_path if f.find_spec(f"fastattn.{former}", path_of(former))), FormerNames)


def path_of(former):
    package = f"fastattn.{former}".rpartition(".")[0]
    return importlib.import_module(package).__path__


@pytest.mark.parametrize("name", ["fastattn.nothing", "fastattn.masks.mask", "mask", "fastattn.integrations.nothing"])
def test_any_other_name_is_still_missing(name):
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module(name)


def test_importing_fastattn_again_asks_one_finder():
    install()
    assert [type(each) for each in sys.meta_path].count(FormerNames) == 1


@pytest.mark.parametrize(
    ("module", "words", "says"),
    [
        ("fastattn.bench.pipeline", ["--help"], "--budget"),
        ("fastattn.simulator", ["missing.cu"], "missing.cu"),
    ],
)
def test_a_former_name_still_runs(module, words, says, tmp_path):
    if "bench" in module:
        pytest.importorskip("rich")
    done = subprocess.run(
        [sys.executable, "-m", module, *words], cwd=tmp_path, capture_output=True, text=True, timeout=120,
        env=os.environ | {"FASTATTN_BUILD": "never"},
    )  # fmt: skip
    assert says in (done.stdout + done.stderr).lower(), done.stderr
