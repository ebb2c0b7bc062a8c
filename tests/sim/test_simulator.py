"""testing/simulator.py: what is built once is found again, what has changed is built anew, what is refused says why."""

import ctypes
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from fastattn.building import compiler
from fastattn.building.compiler import BuildError, sources
from fastattn.testing import simulator

KERNEL = """
#include "{arch}/arch.h"
#include "count.h"
using namespace fastattn::arch;
__global__ void count(int* out) {{ atomicAdd(out, kEach); }}
EXPORT run(int* out) {{
  Launch how;
  how.grid = dim3(3);
  how.threads = 64;
  return launch(count, how, out);
}}
"""
EXPORT = '#define EXPORT extern "C" __attribute__((visibility("default"))) const char*\n'

pytestmark = pytest.mark.skipif(simulator.why_not() is not None, reason=simulator.why_not() or "")


@pytest.fixture
def source(tmp_path, monkeypatch):
    runtime = simulator._runtime(compiler.find_compiler(), "plain")  # not compiled once more
    shutil.copytree(runtime, tmp_path / "cache" / "simulator" / runtime.name)
    monkeypatch.setenv("FASTATTN_CACHE_DIR", str(tmp_path / "cache"))
    path = tmp_path / "kernel.cu"
    path.write_text(EXPORT + KERNEL.format(arch=sources() / "cuda" / "arch"))
    (tmp_path / "count.h").write_text("constexpr int kEach = 2;\n")
    return path


def counted(path):
    out = ctypes.c_int(0)
    library = simulator.load(path)
    library.run.restype = ctypes.c_char_p
    assert library.run(ctypes.byref(out)) is None
    return out.value


def test_a_build_is_kept_until_something_it_includes_changes(source):
    first = simulator.build(source)
    assert simulator.build(source) == first and counted(first) == 3 * 64 * 2
    (source.parent / "count.h").write_text("constexpr int kEach = 5;\n")
    second = simulator.build(source)
    assert second != first and counted(second) == 3 * 64 * 5
    source.write_text(source.read_text().replace("arch.h", "no_such.h"))
    with pytest.raises(BuildError, match=r"no_such\.h"):
        simulator.build(source)


def test_an_unknown_flavour_is_refused(source):
    with pytest.raises(ValueError, match="flavour='fast' is none of plain, checked, addresses"):
        simulator.build(source, "fast")


def test_a_machine_that_cannot_simulate_says_so(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert "on Linux on x86-64, and this is darwin" in simulator.why_not()
    monkeypatch.undo()
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "CXX=no-such-compiler" in simulator.why_not()


def test_it_is_no_part_of_an_import():
    code = "import sys, fastattn; print('fastattn.testing.simulator' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "False"


def test_what_several_want_at_once_is_made_by_one_and_seen_whole(tmp_path):
    """A reader that came in between would find a file too short."""
    path, made = tmp_path / "library.so", []

    def make(folder):
        part = folder / "part"
        with part.open("w") as file:
            for _ in range(20):
                file.write("x" * 100)
                file.flush()
                time.sleep(0.01)
        made.append(part)
        return part

    with ThreadPoolExecutor(4) as pool:
        found = [pool.submit(lambda: simulator.once(path, make).read_text()) for _ in range(4)]
        assert [len(each.result()) for each in found] == [2000] * 4
    assert len(made) == 1
    assert sorted(each.name for each in tmp_path.iterdir()) == ["library.json", "library.lock", "library.so"]


def test_a_file_that_is_another_than_was_made_is_made_again(tmp_path):
    def make(folder):
        (folder / "part").write_text("whole")
        return folder / "part"

    path = simulator.once(tmp_path / "library.so", make)
    path.write_text("whol")
    assert simulator.once(path, make).read_text() == "whole"
    path.unlink()
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BuildError, match="is a link"):
        simulator.once(path, make)
