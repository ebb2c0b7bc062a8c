"""What is installed: from an sdist through a wheel, and editable; against the tree, and tried in cold processes."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = {"fastattn": "fastattn", "kernels": "fastattn/kernels", "bench": "fastattn/bench", "csrc": "fastattn/csrc"}
NOT_CODE = {".git", ".venv", "build", "dist", "out"}
BUILD = "import sys; from setuptools import build_meta; print(build_meta.build_{0}(sys.argv[1]))"

TRY = """
import sys, json, importlib.util as util, importlib.metadata as metadata, importlib.resources as resources
assert not any(path in ("", ".") for path in sys.path), sys.path
import fastattn, fastattn.kernels, fastattn.bench
got = metadata.metadata("fastattn")
print(json.dumps({
    "files": [module.__file__ for module in (fastattn, fastattn.kernels, fastattn.bench)],
    "bare": [name for name in ("kernels", "bench", "tests", "csrc") if util.find_spec(name)],
    "extras": got.get_all("Provides-Extra"),
    "requires": [line for line in got.get_all("Requires-Dist") if "extra" not in line],
    "version": [got["Version"], fastattn.__version__],
    "typed": resources.files("fastattn").joinpath("py.typed").is_file(),
    "sentences": len(resources.files("fastattn.bench").joinpath("data/sentences.txt").read_text()) > 0,
}))
"""

pytestmark = pytest.mark.skipif(importlib.util.find_spec("pip") is None, reason="needs pip in this environment")


def run(command, cwd, **environment):
    """Standard output; what went wrong is the failure's text."""
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, capture_output=True, text=True, env=os.environ | environment, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def pip(python, *arguments, cwd):
    offline = ["--no-index", "--no-deps", "--no-build-isolation", "--disable-pip-version-check"]
    return run([sys.executable, "-m", "pip", "--python", python, "install", "-q", *offline, *arguments], cwd)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the tree, so that nothing is built in the checkout."""
    target = tmp_path_factory.mktemp("checkout") / "work tree"
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info", ".*_cache", ".hypothesis", ".benchmarks")

    def ignored(folder, names):
        return ignore(folder, names) | (NOT_CODE & set(names) if Path(folder) == ROOT else set())

    shutil.copytree(ROOT, target, ignore=ignored)
    return target


@pytest.fixture(scope="module")
def sdist(checkout, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sdist")
    return folder / run([sys.executable, "-c", BUILD.format("sdist"), folder], checkout).split()[-1]


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory):
    """The wheel that the sdist gives, as a person without the checkout builds it."""
    folder = tmp_path_factory.mktemp("wheel")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder)
    source = folder / sdist.name.removesuffix(".tar.gz")
    return folder / run([sys.executable, "-c", BUILD.format("wheel"), folder], source).split()[-1]


@pytest.fixture
def python(tmp_path):
    """A new environment that sees this one's packages, after its own, but none of its editable installs."""
    venv.create(tmp_path / "env", with_pip=False, symlinks=True)
    binary = tmp_path / "env" / "bin" / "python"
    inner = run([binary, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], tmp_path).strip()
    outer = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *map(os.path.dirname, torch_folders())}
    Path(inner, "outer.pth").write_text("\n".join(sorted(outer)) + "\n")
    return binary


def torch_folders():
    return importlib.util.find_spec("torch").submodule_search_locations


def tried(python, cwd):
    """What a cold process elsewhere sees. A script's folder is on the path instead of the working one, on 3.10 too."""
    script = cwd / "script" / "try.py"
    script.parent.mkdir()
    script.write_text(TRY)
    return json.loads(run([python, script], cwd))


def check(found, base):
    """`base` is where the packages must lie; None: anywhere in the environment."""
    assert found["bare"] == []
    assert found["typed"] and found["sentences"]
    assert set(found["extras"]) == {"triton", "test", "lint", "bench", "plot", "models", "vision", "all"}
    assert [line.replace(" ", "") for line in found["requires"]] == ["torch>=2.11"]
    assert len(set(found["version"])) == 1
    assert all(str(Path(file).resolve()).startswith(str(base.resolve())) for file in found["files"])


def test_the_wheel_holds_every_file_of_the_packages_and_no_other(wheel):
    expected = {
        f"{package}/{path.relative_to(ROOT / folder)}"
        for folder, package in PACKAGES.items()
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", ".h", ".cpp", ".cu")
        or path.name == "py.typed"
        or (folder == "bench" and path.parent.name == "data")
        if "__pycache__" not in path.parts and "out" not in path.relative_to(ROOT).parts
    }
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert names == expected


def made_up(path, says):
    """A compiler that says its version and writes a word."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'''#!/bin/sh
case "$*" in *--version*) echo "{says}"; exit 0;; esac
for last; do :; done
echo made > "$last"
''')
    path.chmod(0o755)
    return path


@pytest.mark.skipif(sys.platform == "win32", reason="compilers that are shell scripts")
@pytest.mark.parametrize("built", [False, True], ids=["the CUDA library is not built", "the CUDA library is built"])
def test_a_wheel_brings_the_libraries(checkout, tmp_path, built):
    """The CPU backend's is built for the wheel, the CUDA backend's taken along."""
    nvcc = made_up(tmp_path / "cuda" / "bin" / "nvcc", "nvcc: release 13.0, V13.0.0")
    tools = {
        "CXX": str(made_up(tmp_path / "bin" / "c++", "made-up 1.0")),
        "CUDA_HOME": str(nvcc.parents[1]),
        "FASTATTN_CACHE_DIR": str(tmp_path / "cache"),
        "PYTHONPATH": str(checkout),
    }
    if built:
        run(
            [sys.executable, "-c", "from fastattn.building.cuda_library import LIBRARY; LIBRARY.build()"],
            checkout,
            **tools,
        )
    name = run([sys.executable, "-c", BUILD.format("wheel"), tmp_path], checkout, FASTATTN_BUILD="force", **tools)
    name = name.split()[-1]
    assert name.startswith("fastattn-") and name.split("-")[-1] != "any.whl"
    inside = {Path(each).name for each in zipfile.ZipFile(tmp_path / name).namelist() if "fastattn/lib/" in each}
    backends = {"cpu", "cuda"} if built else {"cpu"}
    within = "from fastattn.building.{0}_library import LIBRARY; print(LIBRARY.shipped_name())"
    names = {run([sys.executable, "-c", within.format(backend)], checkout).strip() for backend in backends}
    assert inside == names | {str(Path(name).with_suffix(".json")) for name in names}


def test_the_sdist_holds_what_a_clone_needs(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    needed = ("Makefile", "LICENSE", "pyproject.toml", "setup.py", ".ci/setup_venv.py", "tests/conftest.py")
    assert set(needed) <= names
    assert not [name for name in names if "__pycache__" in name or name.startswith((".git", ".venv", "bench/out"))]


def test_the_wheel_works_away_from_the_checkout(wheel, python, tmp_path):
    pip(python, wheel, cwd=tmp_path)
    check(tried(python, tmp_path), python.parent.parent)
    assert run([python.parent / "fastattn", "--version"], tmp_path).strip()
    assert "usage" in run([python, "-m", "fastattn.bench", "--help"], tmp_path)


def test_an_editable_install_works_and_follows_edits(checkout, python, tmp_path):
    pip(python, "-e", checkout, cwd=tmp_path)
    check(tried(python, tmp_path), checkout)
    added = checkout / "kernels" / "added_later.py"
    added.write_text("HERE = __name__\n")
    code = "from fastattn.kernels.added_later import HERE; print(HERE)"
    assert run([python, "-c", code], tmp_path).strip() == "fastattn.kernels.added_later"
    added.unlink()


@pytest.mark.parametrize("package", ["kernels", "bench"])
def test_a_package_says_so_when_it_is_imported_under_its_folders_name(checkout, package):
    done = subprocess.run([sys.executable, "-c", f"import {package}"], cwd=checkout, capture_output=True, text=True)
    assert done.returncode == 1
    assert f"is imported as fastattn.{package}, not as a top-level '{package}'" in done.stderr


def test_a_checkout_that_is_not_installed_says_so(checkout, python, tmp_path):
    done = subprocess.run([python, "-c", "import fastattn"], cwd=checkout, capture_output=True, text=True)
    assert done.returncode == 1
    assert "pip install --no-build-isolation -e ." in done.stderr


def test_setup_says_so_when_setuptools_is_too_old(checkout, tmp_path):
    (tmp_path / "setuptools.py").write_text("__version__ = '65.5.0'\nDistribution = find_packages = setup = None\n")
    done = subprocess.run(
        [sys.executable, "setup.py"],
        cwd=checkout,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
    )
    assert done.returncode == 1
    assert "setuptools 77 or newer, and this environment has 65.5.0" in done.stderr
