"""Every example runs, and shows what it says; one that needs a library which is not installed says which."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = sorted((Path(__file__).resolve().parents[2] / "examples").glob("*.py"))
LONGEST = 20


@pytest.fixture
def diffusers_as_before():
    """A model that chooses a backend chooses it for all of diffusers, and its reset does not take that back."""
    yield
    dispatch = sys.modules.get("diffusers.models.attention_dispatch")
    if dispatch is not None:
        usual = dispatch.AttentionBackendName(dispatch.DIFFUSERS_ATTN_BACKEND)
        dispatch._AttentionBackendRegistry.set_active_backend(usual)


@pytest.mark.usefixtures("diffusers_as_before")
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
@pytest.mark.filterwarnings("ignore:enable_nested_tensor", "ignore::DeprecationWarning", "ignore::FutureWarning")
def test_an_example(path, capsys):
    torch.manual_seed(0)
    try:
        runpy.run_path(str(path), run_name="__main__")
    except ModuleNotFoundError as missing:
        pytest.skip(f"{missing.name} is not installed (extra models or vision)")


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_is_short_and_says_what_it_is(path):
    lines = [line for line in path.read_text().splitlines() if line.strip() and not line.startswith(("import", "from"))]
    assert lines[0].startswith('"""') and len(lines) <= LONGEST


def test_the_one_for_several_processes_runs_in_two(tmp_path):
    path = next(path for path in EXAMPLES if path.stem == "dtensor")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", path]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    assert "each of 2 ranks computed 4 heads" in done.stdout
