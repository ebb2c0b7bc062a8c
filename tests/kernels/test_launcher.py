"""Triton's own launcher where no GPU is: launcher_cases.py and launcher_costs.py, in processes without Triton's
interpreter.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
CALLS = ("plain", "causal", "decode")


RUNS = {
    "sm90": ("launcher_cases.py", "-k", "sm90"),
    "sm80": ("launcher_cases.py", "-k", "sm80"),
    "costs": ("launcher_costs.py",),
}


@pytest.mark.parametrize("name", RUNS)
def test_what_a_launch_hands_to_the_driver(name):
    if torch.cuda.is_available():
        pytest.skip("a driver is here: tests marked gpu launch on it")
    if shutil.which(os.environ.get("CC", "gcc")) is None and shutil.which("clang") is None:
        pytest.skip("Triton's launcher is C, and no compiler is here")
    path = filter(None, [os.environ.get("PYTHONPATH")])
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:randomly"]
    done = subprocess.run(
        [*command, *RUNS[name]],
        cwd=HERE,
        env=os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join([str(HERE / "stub"), *path])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert re.search(r"\b\d+ passed", done.stdout), done.stdout


def test_the_page_says_what_was_measured():
    """The figures of docs/triton.md are those of the file that launcher_costs.py writes."""
    measured = json.loads((ROOT / "bench" / "results" / "host" / "triton.json").read_text())
    median = {each["param"]: each["stats"]["median"] * 1e6 for each in measured["benchmarks"]}
    page = (ROOT / "docs" / "triton.md").read_text()
    for name in CALLS:
        figures = " | ".join(f"{median[f'{name}-{part}']:.1f}" for part in ("forward", "backward", "call", "training"))
        assert f"| {name} | {figures} |" in page
    assert f"of these {median[None]:.1f} are torch's" in page
