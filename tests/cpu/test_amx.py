"""The kernels on AMX tiles, which few machines have: the backend's tests once more on a library that emulates the tile
instructions, and a look at the instructions that the usual library has.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
EMULATED = [HERE / f"test_{name}.py" for name in ("attention", "extremes", "large_scores", "weights")]
EMULATED += [HERE.parent / "fastattn" / "test_overflow.py"]


@pytest.mark.skipif(
    not (Path("/proc/cpuinfo").exists() and " avx512_bf16" in Path("/proc/cpuinfo").read_text()),
    reason="the tiles' kernels use AVX-512 with bfloat16 beside them, and this machine has none",
)
def test_the_backend_is_right_on_emulated_tiles(tmp_path):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment |= {
        "CXXFLAGS": "-O1 -DFASTATTN_EMULATE_AMX",
        "FASTATTN_CACHE_DIR": str(tmp_path),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "pytest", "-q", "-k", "amx", "-p", "no:cacheprovider", *map(str, EMULATED)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) > 100 and "failed" not in done.stdout


@pytest.mark.skipif(shutil.which("objdump") is None, reason="objdump, which reads machine code, is not installed")
def test_the_library_has_the_tile_instructions(library):
    text = subprocess.run(["objdump", "-d", str(library.path)], capture_output=True, text=True, check=True).stdout
    if "amx" not in text:
        pytest.skip("the library is for another architecture")
    kernels = "".join(part for part in text.split("\n\n") if "3amx" in part.partition("\n")[0])
    products = set(re.findall(r"tdpbf16ps (\S+)", kernels))
    assert products == {"%tmm6,%tmm4,%tmm0", "%tmm7,%tmm4,%tmm1", "%tmm6,%tmm5,%tmm2", "%tmm7,%tmm5,%tmm3"}
    assert all(name in kernels for name in ("ldtilecfg", "tilerelease", "tileloadd", "tilestored"))
    assert "tilezero" not in kernels
