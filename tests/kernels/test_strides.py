"""Strides reach a kernel as they are or as opaque ints, and each is read as what it is, whatever lies beside it.

Triton names the instances of a jit function by its arguments' types with all tuples flattened. Two forms of strides
with the same types would be one instance: wrong numbers on a GPU, right ones in the interpreter, which has none.
"""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")

SCRIPT = Path(__file__).with_name("stride_cases.py")
CASES = runpy.run_path(str(SCRIPT))["CASES"]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """{case: the parameters that are decoded, those that are not}."""
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))}
    done = subprocess.run(
        [sys.executable, SCRIPT], env=environment, capture_output=True, text=True, timeout=900, cwd=SCRIPT.parent
    )
    assert done.returncode == 0, done.stderr
    return {name: found for name, *found in map(json.loads, done.stdout.splitlines())}


@pytest.mark.parametrize("name", CASES)
def test_opaque_strides_are_decoded_and_no_others(compiled, name):
    decoded, plain = compiled[name]
    _, opaque = CASES[name]
    assert len(decoded) == 3 * opaque
    assert set(decoded) & set(plain) == set()
