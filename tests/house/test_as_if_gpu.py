"""Some of the tests that want a GPU, tried without one (tests/plugins/as_if_gpu.py): their Python, no more."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fastattn.testing import simulator

TESTS = Path(__file__).resolve().parents[1]
SOME = {
    "sim/test_instructions.py": ("barriers or max_nan or (wgmma and n64) or (load and rank)", 20),
    "cuda/test_gpu.py": ("one-by-one or dim40 or first_of or multiple_of_16 or (gradient and gqa)", 7),
}
"""Of each file: which, and how many there are at least."""


@pytest.mark.parametrize("file", SOME)
def test_tests_of_a_gpu_run(file):
    refused = simulator.why_not()
    if refused is not None:
        pytest.skip(refused)
    which, least = SOME[file]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "as_if_gpu", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, "-m", "gpu", "-k", which, str(TESTS / file)], cwd=TESTS.parent,
        env=os.environ | {"PYTHONPATH": str(TESTS / "plugins")}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    passed = re.search(r"(\d+) passed", done.stdout)
    assert done.returncode == 0 and passed and int(passed[1]) >= least, done.stdout[-3000:] + done.stderr[-2000:]
