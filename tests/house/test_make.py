"""`make` before anything is installed: which Python, which torch, what is said. Nothing is downloaded."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")

# `make test` hands its own flags and variables to what it starts.
OUTER = ("MAKEFLAGS", "MAKELEVEL", "MFLAGS", "MAKEOVERRIDES", "PYTHON", "TORCH", "TRITON", "ARGS", "JOBS")
CLEAN = {name: value for name, value in os.environ.items() if name not in OUTER}


def make(*arguments, **environment):
    """Exit code, and everything that was printed."""
    done = subprocess.run(
        ["make", "--no-print-directory", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=CLEAN | environment,
        timeout=60,
    )
    return done.returncode, done.stdout + done.stderr


def plan(*flags, **environment):
    """What the set-up would do."""
    command = [sys.executable, ROOT / ".ci" / "setup_venv.py", "--dry-run", *flags]
    return subprocess.run(command, capture_output=True, text=True, check=True, env=CLEAN | environment).stdout


def python_that_is(folder, version):
    """An executable that says it is another version of Python."""
    path = folder / "python-like"
    path.write_text(
        f'#!/bin/sh\nexec "{sys.executable}" -c "import sys; sys.version_info = {version}; exec(sys.argv[1])" "$2"\n'
    )
    path.chmod(0o755)
    return path


def fake_torch(folder, version):
    """A folder for PYTHONPATH in which a torch of that version is."""
    (folder / "torch").mkdir()
    (folder / "torch" / "__init__.py").touch()
    info = folder / f"torch-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n")
    return {"PYTHONPATH": str(folder)}


@pytest.fixture
def checkout(tmp_path):
    """A folder with as much of the tree as the set-up reads."""
    (tmp_path / ".ci").mkdir()
    for name in ("pyproject.toml", "setup.py", ".ci/setup_venv.py"):
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def refusal(checkout, before="pass"):
    """What the set-up says when it stops, `before` having happened in its process."""
    code = f"import sys, runpy; {before}; runpy.run_path('.ci/setup_venv.py', run_name='__main__')"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=checkout, capture_output=True, text=True, env=CLEAN, timeout=60
    )
    assert done.returncode == 1
    return done.stderr


def test_help_is_the_default_and_names_every_target():
    code, said = make()
    assert code == 0
    assert all(f"make {target}" in said for target in ("bench", "test", "lint", "setup", "clean"))


@pytest.mark.parametrize("version", [(3, 9, 18), (3, 14, 0)], ids=lambda version: f"{version[0]}.{version[1]}")
def test_a_python_out_of_range_is_refused_with_a_sentence(version, tmp_path):
    python = python_that_is(tmp_path, version)
    code, said = make("setup", f"PYTHON={python}")
    assert code != 0
    assert f"fastattn needs Python 3.10 to 3.13, and {python} is {version[0]}.{version[1]}; name another one" in said


def test_a_python_that_is_not_there_is_refused_with_a_sentence():
    code, said = make("bench", "PYTHON=python3.99")
    assert code != 0
    assert "python3.99 is not found; name a Python: make PYTHON=/path/to/python3" in said


@pytest.mark.parametrize("version", ["2.11.0", "2.11.0.post1", "2.13.0+cu130", "2.12.0a0+git1", "3.0.1"])
def test_a_torch_that_is_there_is_used(version, tmp_path):
    said = plan(**fake_torch(tmp_path, version))
    assert f"torch {version} is the one that this Python has" in said


@pytest.mark.parametrize("version", ["2.10.1", "1.13.0", "2.11.0a0+git1", "2.11.0rc2", "2.11.0.dev20260101"])
def test_a_torch_that_is_too_old_is_left_alone(version, tmp_path):
    said = plan(**fake_torch(tmp_path, version))
    assert f"torch {version} of this Python is older than 2.11, so torch==2.13.0 is installed beside it" in said


def test_a_torch_that_is_asked_for_wins_over_the_one_that_is_there(tmp_path):
    said = plan("--torch", "torch==2.12.1", "--own-torch", **fake_torch(tmp_path, "2.13.0"))
    assert "torch==2.12.1 is installed" in said


@pytest.mark.parametrize(
    ("arguments", "environment", "own"),
    [([], {}, False), (["TORCH=torch==2.12.1"], {}, True), ([], {"TORCH": "torch==2.12.1"}, True)],
    ids=["default", "argument", "environment"],
)
def test_make_passes_on_the_torch_that_is_asked_for(arguments, environment, own):
    _, said = make("-n", "setup", *arguments, **environment)
    assert ("--torch 'torch==2.12.1' --triton 'triton==3.6.0' --own-torch" in said) is own
    assert ("--torch 'torch==2.13.0'" in said) is not own


def test_a_python_that_cannot_make_environments_says_what_to_install(checkout):
    said = refusal(checkout, before="sys.modules['ensurepip'] = None")
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    assert f"on Debian and Ubuntu: sudo apt install python{version}-venv; then run make again" in said
    assert not (checkout / ".venv").exists()


def test_an_environment_of_somebody_else_is_left_alone(checkout):
    (checkout / ".venv").mkdir()
    (checkout / ".venv" / "theirs").touch()
    assert ".venv is there, but make did not make it; move it away" in refusal(checkout)
    assert (checkout / ".venv" / "theirs").exists()


@pytest.mark.parametrize("target", ["bench", "test", "lint"])
def test_every_target_sets_up_first(target):
    _, said = make("-n", target)
    lines = said.splitlines()
    setup = next(index for index, line in enumerate(lines) if ".ci/setup_venv.py" in line)
    assert any(".venv/bin/" in line for line in lines[setup + 1 :])


def test_lint_looks_at_python_and_at_cpp():
    _, said = make("-n", "lint")
    assert all(each in said for each in ("ruff check", "ruff format --check", "mypy", "clang_format", "-name '*.cu'"))


@pytest.mark.parametrize(
    ("arguments", "given"),
    [
        ([], "--device 'cuda' --budget '480'"),
        (["RESUME=1", "BUDGET=280"], "--device 'cuda' --budget '280'"),
        (["RESUME=run.json"], "--resume 'run.json'"),
        (["OUT=elsewhere"], "--out 'elsewhere'"),
    ],
    ids=" ".join,
)
def test_make_gpu_sets_up_without_a_network_and_counts_from_its_own_beginning(arguments, given):
    before = int(time.time())
    _, said = make("-n", "gpu", *arguments)
    assert ".ci/setup_venv.py --offline" in said and ".venv-offline/bin/python" in said and given in said
    began = re.search(r"--began '(\d+)'", said)
    assert began and before <= int(began[1]) <= time.time()


def test_every_step_of_make_gpu_has_a_target():
    from fastattn.bench.gpu.steps import DOES

    for step in DOES:
        _, said = make("-n", f"gpu-{step}")
        assert re.search(rf"fastattn.bench.gpu.pipeline .* {step}\b", said), said


def test_the_environment_that_would_be_made_anew_cannot_make_itself(checkout):
    said = refusal(checkout, before=f"sys.prefix = {str(checkout / '.venv')!r}")
    assert "lies in .venv, which is to be made anew; name the Python that it was made from" in said


def test_make_gpu_runs_on_a_cpu(tmp_path):
    """The whole way: what two busy cores do not reach within the budget is no failure, what is wrong is."""
    if Path(sys.prefix) != ROOT / ".venv":
        pytest.skip("make gpu DEVICE=cpu sets up .venv first, and these tests run elsewhere")
    # Built first, whose time is not the budget's: on a busy machine it took longer than the build step may.
    build = [sys.executable, "-m", "fastattn.cli", "build"]
    subprocess.run(build, cwd=ROOT, capture_output=True, check=True, env=CLEAN, timeout=900)
    command = ["make", "--no-print-directory", "gpu", "DEVICE=cpu", "BUDGET=120", f"OUT={tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=CLEAN, timeout=400)
    [path] = tmp_path.glob("cpu-*.json")
    record = json.loads(path.read_text())
    assert done.returncode == 0, done.stdout + done.stderr
    assert list(record["steps"]) == re.findall(r"gpu-(\w+)", make("help")[1])[:-1]
    assert record["steps"]["smoke"]["ok"] is not False and record["smoke"]["cpu"]["ok"]
    assert not [row for row in record["checks"] if row["ok"] is False] and record["checks"]
    assert path.name in done.stdout
