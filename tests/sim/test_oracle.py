"""The simulator's fragments and layouts of shared memory against CuTe's, where nvidia-cutlass is installed."""

import importlib.util
import subprocess
from pathlib import Path

import pytest

from fastattn import nvcc
from fastattn.compiler import BuildError

SOURCE = Path(__file__).parent / "oracle.cpp"
COMPARED = 11


def test_fragments_and_layouts_are_those_of_cute(tmp_path):
    found = importlib.util.find_spec("cutlass_library")
    if found is None or found.origin is None:
        pytest.skip("needs CuTe's headers: pip install --no-deps nvidia-cutlass==4.2.0.0")
    try:
        compiler = nvcc.find_nvcc()  # a C++ compiler with CUDA's headers
    except BuildError as refusal:
        pytest.skip(str(refusal))
    headers = Path(found.origin).parent / "source" / "include"
    command = [*compiler.command, "-std=c++17", "-O1", "-Xcompiler", "-w", "-I", str(headers), str(SOURCE)]
    built = subprocess.run([*command, "-o", str(tmp_path / "oracle")], capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    said = subprocess.run([str(tmp_path / "oracle")], capture_output=True, text=True, check=True).stdout.splitlines()
    assert len(said) == COMPARED
    assert [line for line in said if not line.endswith(": 0")] == []
