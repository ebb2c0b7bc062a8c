"""Triton's own launcher where no GPU is: its driver for NVIDIA against a stand-in for libcuda (libcuda.c), which is
built here. For processes without Triton's interpreter and without a GPU.
"""

import ctypes
import os
import shutil
import struct
import subprocess
from pathlib import Path

import torch
from triton.backends.nvidia import driver as nvidia
from triton.runtime import driver
from triton.tools.tensor_descriptor import TensorDescriptor

SOURCE = Path(__file__).parent / "libcuda.c"
INCLUDE = Path(nvidia.__file__).parent / "include"
COMPILER = shutil.which(os.environ.get("CC", "gcc")) or shutil.which("clang")
SHARED_MEMORY = {97: {80: 166912, 90: 232448}, 81: {80: 167936, 90: 233472}}
"""CUDA's numbers of attributes -> by compute capability: bytes a block may opt in to, bytes of a multiprocessor."""
SCRATCH = 2 * [bytes(8)]
"""What Triton puts behind a kernel's own parameters: pointers to global and to profiler memory, here none."""
POINTER, INT32, INT64, FLOAT = "Q", "i", "q", "f"
MAP = "Q5Q4Q5I4H"
"""What libcuda.c writes into a tensor map."""
MAP_BYTES = 128


class Stub:
    """The loaded stand-in, and what it saw last."""

    def __init__(self, folder):
        path = folder / "libcuda.so.1"
        command = [COMPILER, "-shared", "-fPIC", "-O1", "-w", f"-I{INCLUDE}", "-Wl,-soname,libcuda.so.1"]
        subprocess.run([*command, "-o", str(path), str(SOURCE)], check=True)
        self.library = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)  # by its soname Triton's dlopen finds this one
        self.library.stub_bytes.restype = ctypes.POINTER(ctypes.c_ubyte)
        os.environ["TRITON_LIBCUDA_PATH"] = str(folder)

    def expect(self, sizes):
        self.library.stub_expect(len(sizes), (ctypes.c_int * len(sizes))(*sizes))

    def launched(self):
        """grid, threads of a block, shared bytes, launches so far, tensor maps so far."""
        numbers = (ctypes.c_uint32 * 9)()
        self.library.stub_launched(numbers)
        return tuple(numbers[:3]), numbers[3], numbers[6], numbers[7], numbers[8]

    def parameters(self, sizes):
        """The bytes of each parameter of the last launch."""
        data, starts = self.library.stub_bytes(), [sum(sizes[:n]) for n in range(len(sizes))]
        return [bytes(data[start : start + size]) for start, size in zip(starts, sizes, strict=True)]

    def activate(self, capability):
        """Triton launches on a device of this compute capability from here on."""
        for attribute, bytes_by_capability in SHARED_MEMORY.items():
            self.library.stub_set_attribute(attribute, bytes_by_capability[capability])
        if not hasattr(torch._C, "_cuda_getCurrentRawStream"):  # a torch without CUDA
            torch._C._cuda_getCurrentRawStream = lambda device: 0
        made = nvidia.CudaDriver()
        made.get_current_device = lambda: 0
        made.get_device_capability = lambda device=0: divmod(capability, 10)
        made.get_current_stream = lambda device=0: 0
        made.get_active_torch_device = lambda: torch.device("cpu")
        driver.set_active(made)


def expected(value):
    """The parameters that one argument becomes, each as bytes: a tensor its address, a descriptor its map, sizes and
    steps; numbers of the width that Triton gives them. 1 and None are constants of the kernel.
    """
    if value is None or (type(value) is int and value == 1):
        return []
    if isinstance(value, tuple):
        return [each for part in value for each in expected(part)]
    if isinstance(value, torch.Tensor):
        return [struct.pack(POINTER, value.data_ptr())]
    if isinstance(value, TensorDescriptor):
        sizes = [struct.pack(INT32, each) for each in value.shape]
        return [_tensor_map(value), *sizes, *(struct.pack(INT64, each) for each in value.strides)]
    if isinstance(value, float):
        return [struct.pack(FLOAT, value)]
    assert type(value) is int, value
    return [struct.pack(INT32 if -(2**31) <= value < 2**31 else INT64, value)]


TYPES = {torch.float16: 6, torch.bfloat16: 9, torch.float32: 7}
"""CUtensorMapDataType."""


def _tensor_map(descriptor):
    """But for the swizzle, which the compiler chooses."""
    tensor, rank = descriptor.base, len(descriptor.shape)
    fives = lambda numbers, many: [*reversed(numbers), *[0] * (many - len(numbers))]
    strides = [step * tensor.itemsize for step in descriptor.strides[:-1]]
    numbers = [*fives(descriptor.shape, 5), *fives(strides, 4), *fives(descriptor.block_shape, 5)]
    return struct.pack(MAP, tensor.data_ptr(), *numbers, TYPES[tensor.dtype], rank, 0, 0).ljust(MAP_BYTES, b"\0")


def differences(got, want):
    """What of a launch's parameters is not as expected, in words."""
    sizes = [[len(each) for each in parameters] for parameters in (got, want)]
    if sizes[0] != sizes[1]:
        return [f"sizes {sizes[0]} instead of {sizes[1]}"]
    pairs = enumerate(zip(got, want, strict=True))
    return [f"parameter {n}: {a.hex()} instead of {b.hex()}" for n, (a, b) in pairs if not _same(a, b)]


def _same(got, want):
    if len(got) != MAP_BYTES:
        return got == want
    got, want = list(struct.unpack_from(MAP, got)), list(struct.unpack_from(MAP, want))
    got[-2] = want[-2]  # the swizzle
    # A box is cut to what one copy engine instruction moves: a whole row or less.
    wide = slice(10, 15)
    fits = all(w % g == 0 for g, w in zip(got[wide], want[wide], strict=True) if g)
    got[wide] = want[wide]
    return fits and got == want


def tensors(*, q_len=64, kv_len=200, requires_grad=False, spare=0):
    """query, key, value; `spare` elements before the query's first."""
    query = torch.randn(8 * q_len * 128 + spare).bfloat16()[spare:].view(1, 8, q_len, 128)
    made = query, *torch.randn(2, 1, 2, kv_len, 128).bfloat16().unbind(0)
    return [each.detach().requires_grad_(requires_grad) for each in made]
