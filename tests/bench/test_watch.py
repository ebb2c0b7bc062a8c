"""Children of `make gpu` that hang: in processes of their own, each is named and costs itself alone."""

import json
import os
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest

from fastattn.bench.gpu import pytest_lines, watchdog
from fastattn.bench.gpu.child import Child, Ending
from fastattn.bench.gpu.children import Queue, objects

SOON = "15"
"""Seconds of silence: what is meant to hang has begun by then, and what is not begins its silence anew."""

WORKER = """
import json, sys, time
from fastattn.bench.gpu.watchdog import Watch

def piece(name):
    if name == "hangs":
        time.sleep(3600)
    if name == "dies":
        sys.exit(70)

watch = Watch()
for name in sys.argv[1:]:
    print(json.dumps({"begin": name}), flush=True)
    print(json.dumps({"at": "its first half"}), flush=True)
    watch.heard()
    piece(name)
    print(json.dumps({"done": name}), flush=True)
"""


class Parent:
    """As much of a run as a queue needs."""

    def __init__(self):
        self.lock, self.saved = threading.RLock(), 0

    def now(self):
        return 0.0

    def listen(self, child):
        return child.lines()

    def save(self):
        self.saved += 1


def test_what_hangs_or_dies_costs_itself_alone_and_says_where_it_stood():
    done, lost = [], {}
    command = lambda names, seconds: Child(
        [sys.executable, "-c", WORKER, *names], 1e3, environment={watchdog.SILENCE: SOON}
    )
    queue = Queue(Parent(), command, lambda line: done.append(line["done"]), lambda *how: lost.update([how]))
    assert queue.go(["first", "hangs", "second", "dies", "third"], 1.0) == []
    assert done == ["first", "second", "third"] and list(lost) == ["hangs", "dies"]
    assert lost["hangs"].words == "hung" and lost["hangs"].stack[0].endswith("in piece")
    assert lost["dies"].words == "ended with 70" and lost["dies"].stack == ()


def test_the_innermost_calls_of_the_main_thread_are_the_stack():
    said = """
a line before
Timeout (0:00:30)!
Thread 0x00007f01 (most recent call first):
  File "threading.py", line 1 in wait

Thread 0x00007f02 (most recent call first):
  File "synchronize.py", line 1083 in synchronize
  File "smoke.py", line 40 in main
"""
    assert watchdog.stack(said.splitlines()) == ("synchronize.py:1083 in synchronize", "smoke.py:40 in main")
    assert watchdog.stack(["a line"]) is None


def test_without_the_variable_nothing_is_watched(monkeypatch):
    monkeypatch.delenv(watchdog.SILENCE, raising=False)
    armed = []
    monkeypatch.setattr(watchdog.faulthandler, "dump_traceback_later", lambda *how, **more: armed.append(how))
    watchdog.Watch().heard()
    assert armed == []


def test_a_kernel_that_triton_compiles_is_a_sign_of_life(monkeypatch):
    monkeypatch.setenv(watchdog.SILENCE, "30")
    armed = []
    monkeypatch.setattr(watchdog.faulthandler, "dump_traceback_later", lambda *how, **more: armed.append(how))
    triton = SimpleNamespace(knobs=SimpleNamespace(compilation=SimpleNamespace(listener=None)))
    monkeypatch.setitem(sys.modules, "triton", triton)
    watchdog.Watch().heard()
    triton.knobs.compilation.listener(src=None, times=None)
    assert armed == [(30.0,), (30.0,)]


@pytest.mark.parametrize("broken", [None, "CUDA error: an illegal instruction was encountered"])
def test_a_broken_context_is_found(monkeypatch, broken):
    def synchronize():
        if broken is not None:
            raise RuntimeError(f"{broken}\nFor debugging consider passing CUDA_LAUNCH_BLOCKING=1")

    monkeypatch.setattr("torch.cuda.is_initialized", lambda: True)
    monkeypatch.setattr("torch.cuda.synchronize", synchronize)
    assert watchdog.broken_device() == broken


TESTS = """
import time
import pytest
import torch

@pytest.fixture
def breaks_at_its_end():
    yield
    raise ValueError("the end is wrong")

@pytest.mark.parametrize("number", range(3))
def test_right(number): pass

def test_wrong(): assert 1 + 1 == 3, "the sum is off"

def test_hangs(): time.sleep(3600)

def test_ends_badly(breaks_at_its_end): pass

def test_spoils():
    def synchronize(): raise RuntimeError("CUDA error: an illegal instruction was encountered")
    torch.cuda.is_initialized, torch.cuda.synchronize = (lambda: True), synchronize

@pytest.mark.skip(reason="no second GPU")
def test_skipped(): pass
"""


def lines_of(folder, *flags, **variables):
    """What a pytest of its own says; ids are without the file."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", pytest_lines.__name__, *flags]
    environment = os.environ | {"PYTHONSAFEPATH": "1", pytest_lines.STACKS: str(folder), **variables}
    environment.pop("PYTEST_XDIST_WORKER", None)
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    lines = list(objects(done.stdout.splitlines()))
    tests = {line["test"].partition("::")[2]: line for line in lines if "test" in line}
    return done, lines, tests


def test_every_outcome_of_pytest_is_a_line(tmp_path):
    pytest.importorskip("xdist")
    (tmp_path / "test_some.py").write_text(TESTS)
    (tmp_path / "done.txt").write_text("test_some.py::test_right[1]\n")
    (tmp_path / "test_more.py").write_text("def test_first(): pass\n\ndef test_last(): pass")
    variables = {watchdog.SILENCE: SOON, pytest_lines.DONE: str(tmp_path / "done.txt")}
    _, lines, tests = lines_of(tmp_path, "-n", "1", "test_some.py", "test_more.py", **variables)
    outcomes = {name: line["outcome"] for name, line in tests.items()}
    assert outcomes == {
        "test_right[0]": "passed", "test_right[2]": "passed", "test_wrong": "failed", "test_hangs": "failed",
        "test_ends_badly": "error", "test_spoils": "failed", "test_skipped": "skipped",
        "test_first": "passed", "test_last": "passed",
    }  # fmt: skip
    # A test of each file in turn.
    assert [line["begin"].partition("::")[2] for line in lines if "begin" in line][:4] == [
        "test_right[0]", "test_first", "test_right[2]", "test_last",
    ]  # fmt: skip
    assert "AssertionError: the sum is off" in tests["test_wrong"]["words"]
    assert tests["test_hangs"]["words"] == "hung" and tests["test_hangs"]["stack"][0].endswith("in test_hangs")
    assert "the end is wrong" in tests["test_ends_badly"]["words"]
    assert "no later test can use: CUDA error: an illegal instruction" in tests["test_spoils"]["words"]
    assert tests["test_skipped"]["words"] == "no second GPU"
    assert {"begin": "test_some.py::test_hangs"} in lines


@pytest.mark.parametrize("processes", [[], ["-n", "1"]], ids=["here", "xdist"])
def test_a_file_that_cannot_be_collected_says_why(tmp_path, processes):
    if processes:
        pytest.importorskip("xdist")
    (tmp_path / "test_others.py").write_text("import a_module_that_is_not_there")
    done, lines, _ = lines_of(tmp_path, *processes, "test_others.py")
    [line] = [line for line in lines if "collection" in line]
    assert line["collection"] == "test_others.py" and line["outcome"] == "failed", done.stdout + done.stderr
    assert "No module named 'a_module_that_is_not_there'" in line["words"]


def test_an_ending_says_why_in_a_sentence():
    assert Ending(1, "hung", ("a", "b"), ("x.py:1 in f", "y.py:2 in g")).sentence == "hung: x.py:1 in f"
    assert Ending(-11, "was killed by SIGSEGV", ("last",)).sentence == "was killed by SIGSEGV: last"
    assert json.dumps(Ending(1, "ended with 1", ()).sentence) == '"ended with 1"'
