"""Tensors as kernels take them: a pointer with strides, or a tensor descriptor where the copy engine can read it.

A plan (launch.py) names them: a `Pointer` or a `Box` stands where an address will be, so that a plan serves every call
with tensors that lie alike. Descriptors are arguments of their own: Triton's launcher looks for them at the top level.
"""

import collections
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fastattn.kernels.host.kernel_variant import wide
from fastattn.kernels.opaque_int import opaque, opaque_strides

TMA_BYTES = 16
"""What the copy engine wants addresses and strides to be multiples of (CUDA driver API, cuTensorMapEncodeTiled)."""


@dataclass(frozen=True)
class Pointer:
    """Where the address of the tensor of that name goes."""

    name: str


@dataclass(frozen=True)
class Box:
    """Where a descriptor of the tensor of that name goes: its [batch, heads, length, dim], the steps in elements, and
    how much is moved at a time.
    """

    name: str
    shape: tuple[int, ...]
    steps: tuple[int, ...]
    block: tuple[int, ...]

    def of(self, tensor: Tensor) -> TensorDescriptor:
        return TensorDescriptor(tensor, list(self.shape), list(self.steps), list(self.block))


def tensor_arguments(
    descriptors: bool,
    moved: dict[str, tuple[Tensor, int | None]],
    strided: dict[str, Tensor | None],
    pages: Any = None,
    written: Mapping[str, str] = MappingProxyType({}),
    **plain: Tensor | None,
) -> tuple[Any, ...]:
    """The tensors of a kernel as its first arguments: each of `moved`, the rest by name, and the strides of all.

    Args:
        descriptors: whether the target has a copy engine.
        moved: tensors that may be descriptors, in the kernel's order: [batch, heads, length, dim] with how many rows
            are moved at a time, [batch, heads, length] with how many numbers; None where they are addressed one by one.
        strided: tensors whose elements are addressed one by one, or None.
        pages: where the spec says that "key" and "value" lie in blocks.
        written: arguments that take a tensor of another name.
        plain: contiguous tensors, or None.
    """
    first: list[Any] = []
    strides: dict[str, Any] = {}
    for name, (tensor, count) in moved.items():
        place = written.get(name, name)
        box = _box(place, tensor, count) if descriptors and count is not None else None
        first.append(Pointer(place) if box is None else box)
        strides[name] = _strides(tensor) if box is None else ()
    rest = {
        name: None if each is None else Pointer(written.get(name, name)) for name, each in (strided | plain).items()
    }
    strides |= {name: () if each is None else _strides(each) for name, each in strided.items()}
    if pages is not None:
        strides |= {name: _in_blocks(moved[name][0], pages.table) for name in ("key", "value")}
    return *first, named(**rest), named(**strides)


def _in_blocks(pool: Tensor, table: Tensor) -> tuple:
    """Five in place of four strides: the pool's own, the table int32 [batch, blocks of an item] with adjacent columns,
    its row's step, a block's length, how many blocks there are.
    """
    blocks, _, size, _ = pool.shape
    return _strides(pool), Pointer("table"), opaque(block_table(table).stride(0)), opaque(size), opaque(blocks)


def block_table(table: Tensor) -> Tensor:
    """A block table with adjacent columns; a copy where they are not."""
    return table if table.stride(1) == 1 else table.contiguous()


def _strides(tensor: Tensor) -> tuple:
    """Those of [batch, heads, length] have steps that 16 divides."""
    return opaque_strides(tensor.stride()) if tensor.dim() == 4 else tensor.stride()


def movable(tensor: Tensor) -> bool:
    """Whether the copy engine can move tiles of a [batch, heads, length, dim] tensor: rows without gaps, addresses and
    steps of whole 16 bytes, nothing repeated, nothing empty.
    """
    steps = [stride for stride, size in zip(tensor.stride()[:3], tensor.shape[:3], strict=True) if size > 1]
    aligned = tensor.data_ptr() % TMA_BYTES == 0
    steady = all(step > 0 and step * tensor.itemsize % TMA_BYTES == 0 for step in steps)
    return aligned and steady and tensor.numel() > 0 and (tensor.stride(3) == 1 or tensor.shape[3] == 1)


def _box(name: str, tensor: Tensor, count: int) -> Box | None:
    """Moves `count` rows, or numbers, at a time; None where the copy engine cannot."""
    rows = tensor if tensor.dim() == 4 else tensor[:, :, None]
    if not movable(rows):
        return None
    block = (1, 1, count, wide(rows.shape[3])) if tensor.dim() == 4 else (1, 1, 1, count)
    # The step of an axis of size 1 is never taken and may be anything legal.
    steps = (
        stride if size > 1 else TMA_BYTES // rows.itemsize
        for stride, size in zip(rows.stride()[:3], rows.shape[:3], strict=True)
    )
    return Box(name, tuple(rows.shape), (*steps, 1), block)


def fill(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Arguments of a plan with tensors in their places."""
    if isinstance(value, Pointer):
        return tensors[value.name]
    if isinstance(value, Box):
        return value.of(tensors[value.name])
    if isinstance(value, tuple):
        filled = [fill(each, tensors) for each in value]
        return value._make(filled) if hasattr(value, "_make") else tuple(filled)  # type: ignore[attr-defined]
    return value


def take_out(value: Any, name: str, found: dict[str, Tensor]) -> Any:
    """Arguments with pointers in the place of their tensors, which are put into `found` as name0, name1, ..."""
    if isinstance(value, Tensor):
        place = Pointer(f"{name}{len(found)}")
        found[place.name] = value
        return place
    if isinstance(value, tuple):
        parts = [take_out(each, name, found) for each in value]
        return value._make(parts) if hasattr(value, "_make") else tuple(parts)  # type: ignore[attr-defined]
    return value


def named(**fields: Any) -> Any:
    """The values under their names, as kernels read them."""
    return _record(tuple(fields))(*fields.values())


@functools.cache
def _record(names: tuple[str, ...]) -> Any:
    return collections.namedtuple("_Record", names)
