"""What a wheel holds and says of itself."""

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from surface_text import ROOT

RENAMED = {
    "fastattn/csrc/cpu/dispatch.cpp": "fastattn/csrc/cpu/room.cpp",
    "fastattn/csrc/cpu/dispatch.h": "fastattn/csrc/cpu/room.h",
    "fastattn/csrc/cuda/dispatch.cu": "fastattn/csrc/cuda/room.cu",
    "fastattn/csrc/cuda/dispatch.h": "fastattn/csrc/cuda/room.h",
    "fastattn/csrc/cpu/decode.h": "fastattn/csrc/cpu/narrow.h",
    "fastattn/csrc/cpu/decode_half.h": "fastattn/csrc/cpu/narrow_half.h",
    "fastattn/csrc/cpu/decode_rows.h": "fastattn/csrc/cpu/narrow_rows.h",
}
"""C++ files that have another name than when the list was written: new name -> name in the list."""
BUILD = "import sys; from setuptools import build_meta; print(build_meta.build_wheel(sys.argv[1]))"


def wheel():
    """What a wheel holds beside Python modules (test_packaging.py has those by rule), and what it says of itself."""
    with tempfile.TemporaryDirectory() as folder:
        checkout = Path(folder) / "checkout"
        for name in ("fastattn", "kernels", "bench", "csrc"):
            ignored = shutil.ignore_patterns("__pycache__", "out", "lib", "*.egg-info")
            shutil.copytree(ROOT / name, checkout / name, ignore=ignored)
        for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
            shutil.copy(ROOT / name, checkout / name)
        environment = {name: value for name, value in os.environ.items() if name != "FASTATTN_BUILD"}
        done = subprocess.run(
            [sys.executable, "-c", BUILD, folder], cwd=checkout, capture_output=True, text=True, env=environment
        )
        if done.returncode != 0:
            raise RuntimeError(done.stdout + done.stderr)
        with zipfile.ZipFile(Path(folder) / done.stdout.split()[-1]) as archive:
            files = archive.namelist()
            said = {Path(name).name: archive.read(name).decode() for name in files if ".dist-info/" in name}
    metadata = said["METADATA"].split("\n\n")[0].splitlines()
    kept = ("Name:", "Requires-Python:", "License-Expression:", "Provides-Extra:", "Requires-Dist:")
    code = [name for name in files if name.endswith(".py") and not name.startswith("fastattn/csrc/")]
    inside = [name for name in files if ".dist-info/" not in name and name not in code]
    return {
        "files that are no Python modules": sorted(RENAMED.get(name, name) for name in inside),
        "of dist-info": sorted(said),
        "entry points": said["entry_points.txt"].strip().split("\n"),
        "metadata": [line.replace(" ", "").replace("'", '"') for line in metadata if line.startswith(kept)],
        "tag": [line for line in said["WHEEL"].splitlines() if line.startswith(("Tag:", "Root-Is-Purelib:"))],
    }
