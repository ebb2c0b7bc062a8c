"""A compiled kernel's launch with its parameters in one buffer: what never changes is written once, by the plan.

Triton's launcher parses every argument and encodes every descriptor at every launch. Here a launch writes the tensors'
addresses, into descriptors by cuTensorMapReplaceAddress, and calls cuLaunchKernelEx. The bytes are those that Triton's
launcher hands over (tests/kernels/test_launcher.py). What cannot be packed is left to Triton's launcher.
"""

import ctypes
import functools
import re
import struct
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple

from triton.backends.nvidia import driver as nvidia
from triton.runtime import driver

from fastattn.kernels.host.tensor_arguments import Box, Pointer

MAP_BYTES = 128
"""Of a CUtensorMap, and what its own address is a multiple of in a PyCUtensorMap (Triton's driver.c)."""
NUMBERS = {"i32": "i", "i64": "q", "fp32": "f"}
"""struct's letters of the types that a kernel's numbers have."""
DECLARED = re.compile(r"\.param (?:\.align \d+ )?\.[bfus](\d+) (?:\.ptr (?:\.\w+ )*(?:\d+ )?)?\w+(?:\[(\d+)\])?")
ENTRY = re.compile(r"\.entry\s+\w+\((.*?)\)", re.DOTALL)
SCRATCH = struct.pack("QQ", 0, 0)
"""Triton's last two parameters: no scratch memory, neither a kernel's own nor a profiler's."""


class Part(NamedTuple):
    """One parameter: its bytes, and the tensor whose address is its own or, of a descriptor, lies within."""

    data: bytes
    name: str | None = None

    @property
    def is_map(self) -> bool:
        return self.name is not None and len(self.data) == MAP_BYTES


class LaunchConfig(ctypes.Structure):
    """CUlaunchConfig (CUDA driver API)."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("attribute_count", ctypes.c_uint),
    )


@functools.cache
def _libcuda() -> ctypes.CDLL | None:
    """NVIDIA's driver: the library that Triton's launcher calls. None where it lacks one of these: drivers before
    CUDA 12 know no descriptors.
    """
    try:
        library = ctypes.CDLL("libcuda.so.1")
        library.cuTensorMapReplaceAddress.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
        library.cuLaunchKernelEx.argtypes = [ctypes.c_void_p] * 4
        library.cuGetErrorString.argtypes = [ctypes.c_int, ctypes.POINTER(ctypes.c_char_p)]
    except (OSError, AttributeError):
        return None
    return library


class PackedLaunch:
    """The launch of one kernel with one grid."""

    def __init__(self, library: ctypes.CDLL, compiled: Any, programs: int, parts: list[Part]) -> None:
        self.name, self.lock, self.library = compiled.name, threading.Lock(), library
        offsets, size = [], 0
        for part in parts:
            aligned = MAP_BYTES if part.is_map else 8
            size = -(-size // aligned) * aligned
            offsets.append(size)
            size += len(part.data)
        self._memory = ctypes.create_string_buffer(size + MAP_BYTES)
        base = -(-ctypes.addressof(self._memory) // MAP_BYTES) * MAP_BYTES
        for offset, part in zip(offsets, parts, strict=True):
            ctypes.memmove(base + offset, part.data, len(part.data))
        self._words = (ctypes.c_uint64 * (size // 8 + 1)).from_address(base)
        self._parameters = (ctypes.c_void_p * len(parts))(*(base + offset for offset in offsets))
        placed = [(part, offset) for part, offset in zip(parts, offsets, strict=True) if part.name is not None]
        self.pointers = [(part.name, offset // 8) for part, offset in placed if not part.is_map]
        self.maps = [(part.name, base + offset) for part, offset in placed if part.is_map]
        self._mapped = [0] * len(self.maps)
        warps, _, shared = compiled.packed_metadata[:3]
        config = LaunchConfig((programs, 1, 1), (32 * warps, 1, 1), shared, None, None, 0)
        self._config, self._at = config, ctypes.addressof(config)
        self._compiled, self._function = compiled, compiled.function  # Triton unloads what nobody holds

    def run(self, addresses: dict[str, int], stream: int) -> None:
        """Launches it on a stream of the current device. RuntimeError with the driver's words where that fails."""
        words, library = self._words, self.library
        with self.lock:  # one buffer for all threads
            for name, place in self.pointers:
                words[place] = addresses[name]
            for n, (name, place) in enumerate(self.maps):
                address = addresses[name]
                if address != self._mapped[n]:
                    self._check(library.cuTensorMapReplaceAddress(place, address), "a descriptor of " + name)
                    self._mapped[n] = address
            self._config.stream = stream
            self._check(library.cuLaunchKernelEx(self._at, self._function, self._parameters, None), "the launch")

    def _check(self, error: int, what: str) -> None:
        if error:
            words = ctypes.c_char_p()
            self.library.cuGetErrorString(error, ctypes.byref(words))
            raise RuntimeError(f"{self.name}: {what} failed: {(words.value or b'').decode()} (CUDA error {error})")


def pack(compiled: Any, programs: int, planned: tuple, bound: tuple) -> PackedLaunch | None:
    """The packed launch of a compiled kernel, from its arguments as planned and with tensors in their places; None
    where Triton's launcher does more than hand over parameters.
    """
    metadata = compiled.metadata
    plain = metadata.num_ctas == 1 and not (metadata.launch_pdl or metadata.launch_cooperative_grid)
    if metadata.target.backend != "cuda" or not plain or metadata.global_scratch_size or metadata.profile_scratch_size:
        return None
    library, ptx = _libcuda(), compiled.asm.get("ptx")  # TRITON_STORE_BINARY_ONLY keeps no PTX
    if library is None or ptx is None:
        return None
    descriptors = iter(getattr(metadata, "tensordesc_meta", None) or ())
    types = tuple(compiled.src.signature.values())[: len(planned)]  # the rest are constants
    found = list(_parts(types, planned, bound, descriptors))
    parts = [each for each in found if each is not None]
    if len(parts) < len(found):
        return None
    parts += [Part(SCRATCH[:8]), Part(SCRATCH[8:])]
    if declared(ptx) != [len(part.data) for part in parts]:
        return None
    return PackedLaunch(library, compiled, programs, parts)


def declared(ptx: str) -> list[int]:
    """The bytes of each parameter that a kernel's PTX declares."""
    [parameters] = ENTRY.findall(ptx)
    return [int(bits) // 8 * int(count or 1) for bits, count in DECLARED.findall(parameters)]


def _parts(type_: Any, planned: Any, given: Any, descriptors: Iterator[dict[str, Any]]) -> Iterator[Part | None]:
    """The parameters that an argument of a type, as Triton names it, becomes; None is one that is not known here."""
    if isinstance(type_, tuple):
        for each in zip(type_, planned, given, strict=True):
            yield from _parts(*each, descriptors)
    elif type_ == "constexpr":
        return
    elif type_.startswith("*") and isinstance(planned, Pointer):
        yield Part(bytes(8), planned.name)
    elif type_.startswith("tensordesc") and isinstance(planned, Box):
        data = _tensor_map(given, next(descriptors, None))
        yield None if data is None else Part(data, planned.name)
        yield from (Part(struct.pack("i", each)) for each in given.shape)
        yield from (Part(struct.pack("q", each)) for each in given.strides)
    elif type_ in NUMBERS:
        yield Part(struct.pack(NUMBERS[type_], given))
    else:
        yield None


def _tensor_map(descriptor: Any, metadata: dict[str, Any] | None) -> bytes | None:
    """A descriptor as Triton's driver encodes it, read out of the object that holds it."""
    if metadata is None or metadata["fp4_padded"]:
        return None
    utils = driver.active.utils
    encode = getattr(utils, "fill_tma_descriptor_tiled", None) or utils.fill_tma_descriptor
    made = encode(
        descriptor.base.data_ptr(),
        metadata["swizzle"],
        metadata["elem_size"],
        nvidia.TMA_DTYPE_DEVICE_TO_HOST[metadata["elem_type"]],
        metadata["block_size"],
        descriptor.shape,
        descriptor.strides,
        1 if descriptor.padding == "nan" else 0,
    )
    if type(made).__basicsize__ != 2 * MAP_BYTES:
        return None
    return ctypes.string_at(id(made) + MAP_BYTES, MAP_BYTES)
