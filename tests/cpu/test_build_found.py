"""Which library is taken from the cache: without a compiler, whole, and made for what is asked for."""

import os
import shutil

import pytest
import torch

import fastattn
from fastattn.building import build_cache, commands, compiler, library_files
from fastattn.building.cpu_library import LIBRARY
from fastattn.building.manifest import Manifest
from fastattn.cli import main

pytestmark = pytest.mark.skipif(not build_cache.SUPPORTED, reason=build_cache.NOT_HERE)
QUERY = torch.randn(1, 2, 5, 8)


# ---- damage


DAMAGE = {
    "cut off": (lambda path: os.truncate(path, 3), "has 3 bytes, and 5 were made"),
    "empty": (lambda path: os.truncate(path, 0), "has 0 bytes"),
    "another of that size": (lambda path: path.write_bytes(b"hale\n"), "not those that were made"),
    "longer": (lambda path: path.write_bytes(b"half\n" * 9), "has 45 bytes"),
    "gone": (lambda path: path.unlink(), "is missing, and its record is there"),
}
RECORDS = {
    "no JSON": b"\x7fELF\xff\xfe",
    "a list": b"[1, 2]",
    "no keys": b"{}",
    "other kinds": b'{"made_for": 1, "version": 1, "command": 1, "program": 1, "named": 1, "size": "5", "sha256": 1}',
    "nothing": b"",
    "lists in lists": b"[" * 200_000,
    "keys in keys": b'{"made_for":' * 200_000,
    "a right one, and spaces without end": None,
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_library_is_named_and_built_again(fake, damage, capsys):
    log = fake()
    path = LIBRARY.build()
    calls = len(log())
    do, says = DAMAGE[damage]
    do(path)
    assert LIBRARY.find() is None
    (sentence,) = LIBRARY.damaged
    assert says in sentence and str(path) in sentence
    assert LIBRARY.build() == path == LIBRARY.find() and path.read_text() == "half\n"
    assert len(log()) == 2 * calls
    assert says in capsys.readouterr().err


@pytest.mark.parametrize("record", RECORDS)
def test_a_library_with_an_odd_record_is_named_and_built_again(fake, record, capsys):
    log = fake()
    path = LIBRARY.build()
    calls = len(log())
    kept = path.with_suffix(".json")
    kept.write_bytes(kept.read_bytes() + b" " * (1 << 20) if RECORDS[record] is None else RECORDS[record])
    assert LIBRARY.find() is None
    assert list(LIBRARY.damaged) == [f"{path} has a record that is damaged"]
    assert LIBRARY.build() == path == LIBRARY.find() and len(log()) == 2 * calls
    assert f"fastattn: {path} has a record that is damaged\n" in capsys.readouterr().err


def test_a_record_of_lists_in_lists_raises_nothing_out_of_a_call(fake, unloaded):
    fake()
    LIBRARY.build().with_suffix(".json").write_bytes(RECORDS["lists in lists"])
    with pytest.warns(RuntimeWarning, match="cannot be loaded"):  # it has been built again
        assert fastattn.attention(QUERY, QUERY, QUERY).isfinite().all()


OTHERS = {
    "machine": "another architecture",
    "sources": "other sources",
    "torch": "0.0",
    "platform": "another system",
    "commands": "other flags",
}


@pytest.mark.parametrize("what", OTHERS)
def test_a_library_under_this_name_that_was_made_for_another_is_not_taken(fake, what):
    """With its own record beside it, as a copied folder has."""
    fake()
    path = LIBRARY.build()
    record = Manifest.read(path.with_suffix(".json").read_bytes())
    record.made_for[what] = OTHERS[what]
    path.with_suffix(".json").write_bytes(record.to_bytes())
    assert LIBRARY.find() is None and LIBRARY.build() == path == LIBRARY.find()


def test_fastattn_build_builds_again_what_cannot_be_loaded(fake, unloaded, capsys):
    log = fake()
    LIBRARY.build()
    calls = len(log())
    assert main(["build"]) == 1
    assert len(log()) == 2 * calls and "cannot be loaded" in capsys.readouterr().err


# ---- which library


@pytest.fixture
def without_compiler(monkeypatch, tmp_path):
    """No compiler from now on, and whoever runs one is found out."""

    def take_away():
        monkeypatch.delenv("CXX", raising=False)
        monkeypatch.setenv("PATH", str(tmp_path / "no-such-folder"))
        monkeypatch.setattr(commands, "call", None)

    return take_away


def test_a_library_is_found_without_a_compiler(fake, without_compiler):
    fake()
    path = LIBRARY.build()
    without_compiler()
    assert LIBRARY.find() == path


def test_a_library_is_found_where_its_compiler_is_named_and_gone(fake, tmp_path):
    fake()
    path = LIBRARY.build()
    (tmp_path / "c++").unlink()
    compiler._find_compiler.cache_clear()
    assert LIBRARY.find() == path


def test_the_compiler_is_not_asked_where_the_library_is_there(fake, monkeypatch):
    fake()
    path = LIBRARY.build()
    compiler._find_compiler.cache_clear()
    monkeypatch.setattr(commands, "call", None)
    assert LIBRARY.find() == path


def test_other_flags_are_another_library(fake, monkeypatch, without_compiler):
    fake()
    plain = LIBRARY.build()
    monkeypatch.setenv("CXXFLAGS", "-O1")
    assert LIBRARY.find() is None
    flagged = LIBRARY.build()
    assert LIBRARY.find() == flagged != plain
    without_compiler()
    assert LIBRARY.find() == flagged
    monkeypatch.delenv("CXXFLAGS")
    assert LIBRARY.find() == plain


def test_a_compiler_that_is_named_must_have_made_it(fake, monkeypatch, tmp_path):
    fake()
    path = LIBRARY.build()
    other = tmp_path / "other" / "c++"
    other.parent.mkdir()
    other.write_bytes((tmp_path / "c++").read_bytes().replace(b"made-up 1.0", b"another 2.0"))
    other.chmod(0o755)
    monkeypatch.setenv("CXX", str(other))
    assert LIBRARY.find() is None
    own = LIBRARY.build()
    assert LIBRARY.find() == own != path
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")  # the first one is this machine's
    assert LIBRARY.find() == path
    monkeypatch.setenv("CXX", str(tmp_path / "c++") + " -pipe")
    assert LIBRARY.find() is None


# ---- which place


@pytest.fixture
def both(fake, tmp_path, monkeypatch):
    """A whole library in the folder that is asked for, and the same among temporary files; each could be loaded."""
    log = fake()
    path = LIBRARY.build()
    second = tmp_path / "temporary" / f"fastattn-{os.getuid()}"
    shutil.copytree(path.parent, second)
    before = len(log())
    monkeypatch.setattr(LIBRARY, "_load", lambda path, folder: path)
    return path, second / path.name, lambda: len(log()) - before


LACKS = {
    **{name: do for name, (do, _) in DAMAGE.items()},
    "no record": lambda path: path.with_suffix(".json").unlink(),
    "an odd record": lambda path: path.with_suffix(".json").write_bytes(b"[" * 200_000),
    "nothing at all": lambda path: (path.with_suffix(".json").unlink(), path.unlink()),
}


@pytest.mark.parametrize("lacks", LACKS)
def test_what_the_asked_folder_lacks_is_built_there_whatever_lies_among_temporary_files(both, unloaded, lacks, capsys):
    path, _, commands_run = both
    LACKS[lacks](path)
    assert LIBRARY.get() == path and commands_run() > 0
    assert LIBRARY.find() == path and path.read_text() == "half\n"
    if lacks in DAMAGE:
        said = capsys.readouterr().err
        assert str(path) in said and DAMAGE[lacks][1] in said


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_in_the_asked_folder_is_one_warning_where_there_is_no_compiler(both, unloaded, damage, without_compiler):
    path, _, _ = both
    DAMAGE[damage][0](path)
    without_compiler()
    with pytest.warns(RuntimeWarning) as caught:
        for _ in range(2):
            assert fastattn.attention(QUERY, QUERY, QUERY).isfinite().all()
    (said,) = [str(each.message) for each in caught]
    assert "no C++ compiler is found" in said and DAMAGE[damage][1] in said and str(path) in said
    LIBRARY.failure = None
    assert DAMAGE[damage][1] in LIBRARY.why_not()


@pytest.mark.parametrize("there", ["a whole library", "none", "a failed build"])
def test_a_folder_that_is_only_read_serves_and_what_it_lacks_is_found_elsewhere(
    both, unloaded, there, tmp_path, monkeypatch
):
    path, second, commands_run = both
    mark = path.with_suffix(library_files.MARK)
    real = os.access
    monkeypatch.setattr(os, "access", lambda at, *how, **named: at != path.parent and real(at, *how, **named))
    if there == "a whole library":
        assert LIBRARY.find() == path and not LIBRARY.unusable
        return
    LACKS["nothing at all"](path)
    if there == "a failed build":
        mark.write_text("x")
    assert LIBRARY.find() == second
    (sentence,) = LIBRARY.unusable
    assert f"{path.parent} cannot be written; name another in FASTATTN_CACHE_DIR" in sentence
    LACKS["nothing at all"](second)
    assert LIBRARY.why_not() is None
    assert LIBRARY.get() == second and commands_run() and not path.exists()


def test_a_library_among_temporary_files_serves_where_the_asked_folder_is_not_there(both):
    path, second, _ = both
    shutil.rmtree(path.parent)
    assert LIBRARY.find() == second
