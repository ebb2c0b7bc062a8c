"""Global memory: kernels with AddressSanitizer and UBSan, on buffers of the exact size, in a process of their own."""

import subprocess
import sys
from pathlib import Path

import pytest

from fastattn.building.compiler import BuildError
from fastattn.testing import simulator

SOURCE = Path(__file__).parent / "kernels" / "addresses.cu"
COUNT = 64

# Allocates through the sanitizer, whose red zones lie on both sides; torch would round the size up.
CHILD = """
import ctypes, sys
libc = ctypes.CDLL(None)
libc.aligned_alloc.restype = ctypes.c_void_p
data = libc.aligned_alloc(ctypes.c_size_t(16), ctypes.c_size_t(4 * {count}))
library = ctypes.CDLL(sys.argv[1])
library.run_addresses.restype = ctypes.c_char_p
library.fastattn_sim_options(ctypes.c_uint64(0), 0, 2)
said = library.run_addresses(ctypes.c_void_p(data), {count}, int(sys.argv[2]))
print("said", said)
"""

WRONG = {
    "a load past the end": (1, "heap-buffer-overflow", "addresses.cu"),
    "a store past the end": (2, "heap-buffer-overflow", "addresses.cu"),
    "cp.async past the end": (3, "heap-buffer-overflow", "copies.cpp"),
    "a bulk load past the end": (4, "heap-buffer-overflow", "copies.cpp"),
    "a bulk store past the end": (5, "heap-buffer-overflow", "copies.cpp"),
    "a tensor map larger than the tensor": (6, "heap-buffer-overflow", "tensor_map.cpp"),
    "a pointer past shared memory": (7, "use-after-poison", "addresses.cu"),
    "a store of 16 bytes past the end": (9, "heap-buffer-overflow", "stores.cpp"),
    "a signed overflow": (8, "signed integer overflow", "addresses.cu"),
}


@pytest.fixture(scope="module")
def run():
    refused = simulator.why_not()
    if refused is not None:
        pytest.skip(refused)
    try:
        environment = simulator.sanitized()
    except BuildError as refusal:
        pytest.skip(str(refusal))
    library = simulator.build(SOURCE, "addresses")

    def child(which):
        command = [sys.executable, "-c", CHILD.format(count=COUNT), str(library), str(which)]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    return child


@pytest.mark.parametrize("case", WRONG)
def test_a_sanitizer_names_the_line(run, case):
    which, kind, file = WRONG[case]
    done = run(which)
    assert done.returncode != 0 and kind in done.stderr and file in done.stderr, done.stderr


def test_a_sanitizer_has_nothing_to_say_of_a_right_kernel(run):
    done = run(0)
    assert done.returncode == 0 and done.stdout == "said None\n" and done.stderr == "", done.stdout + done.stderr
