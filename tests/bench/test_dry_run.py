"""`make gpu` as a GPU's machine gets it, two commands with the first one killed, where no GPU is: the real pipeline and
its processes, on a machine that says it has an H200 (tests/plugins/stub_gpu).
"""

import collections
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("rich", reason="make gpu needs rich")
pytest.importorskip("xdist", reason="make gpu runs tests with it")

STUB = Path(__file__).resolve().parents[1] / "plugins" / "stub_gpu"
CUT, HANGS = (
    "cell causal/bf16/B1-H2-N64",
    ("smoke fastattn.backends.triton", "test_that_may_hang", "cell self/bf16/B1-H2-N64-D128/bwd"),
)
WITHIN = 400.0
"""Seconds, of a machine that does much else; it takes a tenth where it is idle."""


def start(folder, log, *flags):
    """The pipeline in a folder of its own: nothing of the checkout is read, and nothing is left there."""
    folder.mkdir()
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "FASTATTN_"))}
    environment |= {
        "PYTHONPATH": str(STUB), "PATH": f"{STUB}:{os.environ['PATH']}", "PYTHONUNBUFFERED": "1",
        "STUB_GPU_FEW": "1", "STUB_GPU_LOG": str(log), "STUB_GPU_HANGS": ",".join([CUT, *HANGS]),
    }  # fmt: skip
    command = [
        sys.executable,
        "-m",
        "fastattn.bench.gpu.pipeline",
        "--jobs",
        "1",
        "--budget",
        str(WITHIN),
        "--out",
        "out",
    ]
    return subprocess.Popen(
        [*command, *flags], cwd=folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def killed_at(process, folder, log, word):
    """Waits for a line of the log and for the rows of the cell before it, which the pipeline hears and writes while the
    next cell begins; then kills the pipeline as a machine that is taken away does.
    """

    def reached():
        return log.exists() and word in log.read_text() and written(folder)[1].get("rows")

    until = time.monotonic() + WITHIN
    while not reached():
        assert time.monotonic() < until and process.poll() is None, process.communicate()[0]
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    return process.communicate()[0]


def written(folder):
    [path] = folder.glob("out/*.json")
    return path, json.loads(path.read_text())


def test_two_commands_one_killed_end_with_every_step(tmp_path):
    log = tmp_path / "log"
    said = killed_at(start(tmp_path / "first", log), tmp_path / "first", log, CUT)
    path, record = written(tmp_path / "first")
    # What was said until then is there, and a call that hung is named and left out.
    assert re.search("hung: .*sitecustomize.py:.* in begins", record["smoke"]["triton"]["words"]), said
    assert record["steps"]["smoke"]["words"].endswith("triton fails and is left out")
    assert [(row["room"], row["ok"]) for row in record["checks"]] == [("cuda", True)] * 3
    assert {row["op"] for row in record["rows"]} == {"self"} and record["steps"]["headline"]["words"] == "was cut"

    # Another machine, to which this file alone was carried.
    carried = tmp_path / "carried.json"
    path.rename(carried)
    process = start(tmp_path / "second", log, "--resume", str(carried))
    said = process.communicate(timeout=2 * WITHIN)[0]
    path, record = written(tmp_path / "second")
    steps = ("build", "smoke", "check", "headline", "instructions", "tests", "sweep", "flex", "sanitizers")
    assert tuple(record["steps"]) == steps and process.returncode == 0, said
    nothing = ("instructions", "sanitizers")
    assert {name: step["ok"] for name, step in record["steps"].items()} == {
        name: None if name in nothing else True for name in steps
    }, said
    assert re.search("failed: .*few_tests.py::test_that_may_hang: hung", said), said
    assert re.search(r"self/bf16/B1-H2-N64-D128/bwd: hung: .* in begins", said), said
    before = [each["name"].rpartition("::")[2].split("/")[0] for each in record["failed_before"]]
    assert sorted(before) == ["self", "test_that_may_hang", "triton"], said
    tests = record["tests"]["tests"]["tests"]
    assert sorted(test["outcome"] for test in tests.values()) == ["passed"] * 4 + ["skipped"]
    assert len({row["name"] for row in record["rows"]}) == len(record["rows"])

    # What went well ran once; what hung, and the cell that the kill cut, twice.
    twice = [what for what, times in collections.Counter(log.read_text().splitlines()).items() if times > 1]
    assert sorted(word for word in (CUT, *HANGS) for what in twice if word in what) == sorted([CUT, *HANGS]), twice
    assert len(twice) == 1 + len(HANGS), twice
    assert str(Path.home()) not in path.read_text() and str(STUB.parents[2]) not in path.read_text()
