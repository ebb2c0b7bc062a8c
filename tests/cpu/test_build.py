"""Building the library: with compilers that are made up, in a cache of its own; and without any."""

import os
import subprocess
import sys
import textwrap
import time
import warnings

import pytest
import torch
from torch._subclasses import FakeTensorMode

import fastattn
from fastattn.building import build_cache, compiler, library_files
from fastattn.building.cpu_library import LIBRARY
from fastattn.cli import main

QUERY = torch.randn(1, 2, 5, 8)


def left_in(folder):
    return sorted(path.suffix for path in folder.iterdir() if not path.name.startswith("build-"))


def test_it_is_built_once_and_says_so_on_one_line(fake, way, tmp_path, capsys):
    log = fake()
    path = LIBRARY.build()
    units = len(log()) - 1
    assert path.read_text() == "half\n" and path.parent == tmp_path / "cache"
    assert "-shared" in log()[-1]
    assert capsys.readouterr().err == f"fastattn: building the CPU library, {units} files with made-up 1.0 ... 0 s\n"
    assert LIBRARY.build() == path and len(log()) == units + 1
    assert LIBRARY.build(force=True) == path and len(log()) == 2 * units + 2
    assert left_in(path.parent) == [".json", ".lock", library_files.SUFFIX]


@pytest.mark.parametrize("fails", ["dispatch.cpp", "ops.cpp", "-shared"])
def test_a_failed_build_says_why_and_is_remembered(fails, fake, way, tmp_path, capsys):
    log = fake(fails=fails)
    with pytest.raises(compiler.BuildError) as failure:
        LIBRARY.build()
    said = str(failure.value)
    assert "the compiler says: x.cpp:3:1: error: no such thing\nthe command was: " in said
    assert fails in said.splitlines()[-1] and "`fastattn build` tries again" in said
    assert "... failed after 0 s\n" in capsys.readouterr().err
    assert left_in(tmp_path / "cache") == [".failed", ".lock"]  # and nothing half-written
    calls = len(log())
    with pytest.raises(compiler.BuildError, match="no such thing") as again:
        LIBRARY.build()
    (mark,) = (tmp_path / "cache").glob("*.failed")
    first, *rest = str(again.value).splitlines()
    assert first == f"the CPU library could not be built before, says {mark}; `fastattn build` tries again"
    assert rest == said.splitlines()[1:] and len(log()) == calls
    assert main(["build"]) == 1
    assert len(log()) > calls
    fake()
    assert LIBRARY.build(retry=True).exists()
    assert left_in(tmp_path / "cache") == [".json", ".lock", library_files.SUFFIX]


def test_the_key_is_sources_flags_and_compiler(fake, monkeypatch, tmp_path):
    keys = []

    def note():
        keys.append(LIBRARY.files.cached_name())

    fake()
    note()
    fake(version="made-up 1.1")
    note()
    monkeypatch.setenv("CXXFLAGS", "-O1")
    note()
    monkeypatch.setattr(compiler, "source_digest", lambda backend: "other sources")
    note()
    monkeypatch.setattr(torch, "__version__", "9.9")
    note()
    assert len(set(keys)) == 5
    monkeypatch.setattr(compiler, "sources", lambda: tmp_path / "elsewhere")  # where they lie is nothing to it
    note()
    assert keys[-1] == keys[-2]


BUILD = "from fastattn.building.cpu_library import LIBRARY; print(LIBRARY.build())"


def test_processes_that_want_it_at_once_build_it_once(fake):
    log = fake(seconds=0.2)
    started = [
        subprocess.Popen([sys.executable, "-c", BUILD], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    said = [process.communicate(timeout=120) for process in started]
    assert len({out for out, _ in said}) == 1 and said[0][0].strip().endswith(library_files.SUFFIX)
    assert sum("building" in err for _, err in said) == 1
    assert sum("-shared" in line for line in log()) == 1


def test_a_builder_that_is_killed_leaves_nothing_that_is_taken_for_the_library(fake, tmp_path):
    log = fake(seconds=30)
    process = subprocess.Popen([sys.executable, "-c", BUILD], stderr=subprocess.DEVNULL)
    while not log():
        time.sleep(0.05)
    process.kill()
    process.wait()
    assert LIBRARY.find() is None
    fake()
    assert LIBRARY.build().exists()


def test_a_library_that_cannot_be_loaded(fake, unloaded):
    fake()
    LIBRARY.build()
    with pytest.warns(RuntimeWarning, match="plain reference on the CPU.*cannot be loaded"):
        assert "FASTATTN_BUILD=force" in LIBRARY.prepare()
    assert LIBRARY.available() is None


def test_never_and_nonsense(fake, unloaded, monkeypatch):
    log = fake()
    monkeypatch.setenv("FASTATTN_BUILD", "never")
    assert "FASTATTN_BUILD=never forbids it" in LIBRARY.why_not()
    with pytest.warns(RuntimeWarning, match="FASTATTN_BUILD=never"):
        out = fastattn.attention(QUERY, QUERY, QUERY)
    assert torch.equal(out, fastattn.attention(QUERY, QUERY, QUERY, backend="reference"))
    with pytest.raises(fastattn.BackendUnavailable, match="FASTATTN_BUILD=never"):
        fastattn.attention(QUERY, QUERY, QUERY, backend="cpu")
    monkeypatch.setattr(LIBRARY, "failure", None)
    monkeypatch.setenv("FASTATTN_BUILD", "perhaps")
    with pytest.raises(ValueError, match="FASTATTN_BUILD: one of auto, never, force is needed, got 'perhaps'"):
        LIBRARY.why_not()
    assert log() == []


def test_explaining_builds_nothing_and_says_what_a_call_would(fake, unloaded):
    log = fake()
    verdict = fastattn.explain(QUERY, QUERY, QUERY)
    assert verdict.backend == "cpu"
    assert verdict.notes[-1] == "the CPU library is not built yet: the first call builds it and waits"
    assert log() == []


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_no_build_starts_while_tracing(fake, unloaded):
    log = fake()
    traced = torch.jit.trace(lambda each: fastattn.attention(each, each, each), QUERY, check_trace=False)
    with FakeTensorMode(allow_non_fake_inputs=True):
        fastattn.attention(QUERY, QUERY, QUERY)
    assert log() == []
    with pytest.warns(RuntimeWarning, match="cannot be loaded"):
        traced(QUERY)
    assert log()


def no_program(folder):
    path = folder / "no-program"
    path.write_text("not a program")
    path.chmod(0o755)
    return {"CXX": str(path)}


BROKEN = {
    "a file that is no program": (no_program, "no C++ compiler is found"),
    "a folder": (lambda folder: {"CXX": str(folder)}, "no C++ compiler is found"),
    "an open quote": (lambda folder: {"CXX": "c++ '"}, "CXX=c++ ' is no command line"),
    "an open quote in the flags": (lambda folder: {"CXXFLAGS": "'-O1"}, "CXXFLAGS='-O1 is no command line"),
}


@pytest.mark.parametrize(("broken", "says"), BROKEN.values(), ids=BROKEN)
def test_whatever_is_wrong_with_the_compiler_the_reference_serves(fake, unloaded, tmp_path, monkeypatch, broken, says):
    fake()
    for name, value in broken(tmp_path).items():
        monkeypatch.setenv(name, value)
    compiler._find_compiler.cache_clear()
    with pytest.raises(compiler.BuildError) as refusal:
        LIBRARY.build()
    assert says in str(refusal.value)
    assert says in fastattn.explain(QUERY, QUERY, QUERY).reasons["cpu"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # said once a process
        assert fastattn.attention(QUERY, QUERY, QUERY).isfinite().all()


def test_a_file_lock_that_is_refused_is_a_sentence(fake, monkeypatch):
    fake()
    fcntl = pytest.importorskip("fcntl", reason="locks files by fcntl")

    def refuse(file, how):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(compiler.BuildError, match=r"cannot be used \(.*No locks available.*name another"):
        LIBRARY.build()


def test_a_cache_folder_that_cannot_be_written(fake, tmp_path, monkeypatch):
    fake()
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FASTATTN_CACHE_DIR", str(tmp_path / "file" / "cache"))
    with pytest.raises(compiler.BuildError, match=r"cannot be used .*name another in FASTATTN_CACHE_DIR"):
        LIBRARY.build()


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("FASTATTN_CACHE_DIR", "~/somewhere")
    assert build_cache.asked_folder() == tmp_path / "home" / "somewhere"
    monkeypatch.delenv("FASTATTN_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert build_cache.asked_folder() == tmp_path / "fastattn"
    for relative in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", relative)
        assert build_cache.asked_folder() == tmp_path / "home" / ".cache" / "fastattn"


def test_a_library_within_the_package_comes_first_where_its_sources_are_the_ones_beside_it(fake, tmp_path, monkeypatch):
    fake()
    monkeypatch.setattr(library_files, "__file__", str(tmp_path / "package" / "building" / "library_files.py"))
    folder = tmp_path / "package" / "lib"
    folder.mkdir(parents=True)
    (folder / f"fastattn_cpu_of-other-sources{library_files.SUFFIX}").touch()
    assert LIBRARY.find() is None
    assert LIBRARY.ship(folder, build=True)
    shipped = folder / LIBRARY.shipped_name()
    assert LIBRARY.find() == shipped
    shipped.write_text("hald\n")
    assert LIBRARY.find() is None and any("is damaged" in each for each in LIBRARY.damaged)
    shipped.write_text("half\n")
    assert LIBRARY.find() == shipped
    shipped.with_suffix(".json").unlink()
    assert LIBRARY.find() is None


NO_COMPILER = """
import warnings
import torch, fastattn
query = torch.randn(1, 2, 5, 8)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(3):
        fastattn.attention(query, query, query)
print(len(caught), caught[0].message)
print(fastattn.explain(query, query, query))
"""


def test_without_a_compiler_the_reference_serves_and_a_warning_says_it_once(tmp_path):
    clean = {
        name: value for name, value in os.environ.items() if name not in ("CXX", "FASTATTN_BUILD", "FASTATTN_BACKEND")
    }
    environment = clean | {"PATH": str(tmp_path), "FASTATTN_CACHE_DIR": str(tmp_path / "cache")}
    run = lambda *words: subprocess.run(
        [sys.executable, *words], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300
    )  # fmt: skip
    (tmp_path / "call.py").write_text(textwrap.dedent(NO_COMPILER))
    done = run("call.py")
    assert done.returncode == 0, done.stderr
    first, *rest = done.stdout.splitlines()
    assert first.startswith("1 fastattn computes with its plain reference on the CPU, slowly: no C++ compiler is found")
    assert "runs this call: plain PyTorch" in "\n".join(rest)
    assert not (tmp_path / "cache").exists()
    told = run("-m", "fastattn.cli", "info")
    assert "no C++ compiler is found" in " ".join(told.stdout.split()), told.stderr
    built = run("-m", "fastattn.cli", "build")
    assert built.returncode == 1 and "install g++ or clang++" in built.stderr
