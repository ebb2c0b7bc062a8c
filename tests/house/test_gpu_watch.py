"""tests/gpu_watch.py, tried without a GPU: a test that hangs or spoils the context is named, and the others run."""

import subprocess
import sys
from pathlib import Path

import pytest

WATCH = Path(__file__).resolve().parents[1] / "gpu_watch.py"
TESTS = """
import runpy, time
import pytest
watched = runpy.run_path({path!r})["watched"]
spoilt = []

def synchronize():
    if spoilt:
        raise RuntimeError("an illegal memory access was encountered")

@pytest.fixture(autouse=True)
def watch(request):
    with watched(request.node, synchronize, 1.0):
        yield

def test_before():
    pass

def test_wrong():
    {wrong}

def test_after():
    pass
"""


def run(folder, wrong, *options):
    (folder / "test_them.py").write_text(TESTS.format(path=str(WATCH), wrong=wrong))
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", *options, "test_them.py"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=120)


WRONG = {"time.sleep(60)": "Timeout (0:00:01)", "spoilt.append(1)": "an illegal memory access was encountered"}


@pytest.mark.parametrize("wrong", WRONG, ids=["hangs", "spoils"])
def test_the_test_at_fault_is_named(tmp_path, wrong):
    done = run(tmp_path, wrong)
    assert done.returncode != 0 and "test_before PASSED" in done.stdout
    assert WRONG[wrong] in done.stdout + done.stderr and "test_wrong" in done.stdout + done.stderr


@pytest.mark.parametrize("wrong", WRONG, ids=["hangs", "spoils"])
def test_the_others_run_in_another_process(tmp_path, wrong):
    pytest.importorskip("xdist")
    done = run(tmp_path, wrong, "-n", "1")
    assert "crashed while running 'test_them.py::test_wrong'" in done.stdout
    assert "PASSED test_them.py::test_after" in done.stdout and WRONG[wrong] in done.stdout + done.stderr


def test_nothing_is_said_where_all_is_well(tmp_path):
    done = run(tmp_path, "pass")
    assert done.returncode == 0 and "3 passed" in done.stdout
