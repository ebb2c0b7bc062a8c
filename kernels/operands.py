"""Tensors as kernels take them: a pointer with strides, or a tensor descriptor where the copy engine can read it."""

import collections
import functools
from typing import Any

from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fastattn.kernels.kind import wide
from fastattn.kernels.veil import veil, veiled

TMA_BYTES = 16
"""What the copy engine wants addresses and strides to be multiples of (CUDA driver API, cuTensorMapEncodeTiled)."""


def operands(
    descriptors: bool,
    tiled: dict[str, tuple[Tensor, int]],
    strided: dict[str, Tensor | None],
    pages: Any = None,
    **plain: Tensor | None,
) -> tuple[Any, Any]:
    """The tensors of a kernel by name, and their strides.

    Args:
        descriptors: whether the target has a copy engine.
        tiled: [batch, heads, length, dim] tensors with how many rows are moved at a time, and [batch, heads, length]
            ones with how many numbers.
        strided: tensors whose elements are addressed one by one, or None.
        pages: where the spec says that "key" and "value", then among `strided`, lie in blocks.
        plain: contiguous tensors, or None.
    """
    tensors: dict[str, Any] = {}
    strides: dict[str, Any] = {}
    for name, (tensor, count) in tiled.items():
        rows = tensor if tensor.dim() == 4 else tensor[:, :, None]
        described = descriptors and movable(rows)
        block = [count, wide(tensor.shape[3])] if tensor.dim() == 4 else [1, count]
        tensors[name] = _descriptor(rows, block) if described else tensor
        strides[name] = () if described else _strides(tensor)
    for name, table in strided.items():
        tensors[name], strides[name] = table, () if table is None else _strides(table)
    if pages is not None:
        strides |= {name: in_blocks(tensors[name], pages.table) for name in ("key", "value")}
    return named(**tensors, **plain), named(**strides)


def in_blocks(pool: Tensor, table: Tensor) -> tuple:
    """Five in place of four strides: the pool's own, the table int32 [batch, blocks of an item] with adjacent columns
    (a copy where they are not), its row's step, a block's length, how many blocks there are.
    """
    blocks, _, size, _ = pool.shape
    table = table if table.stride(1) == 1 else table.contiguous()
    return _strides(pool), table, veil(table.stride(0)), veil(size), veil(blocks)


def _strides(tensor: Tensor) -> tuple:
    """Those of [batch, heads, length] have steps that 16 divides."""
    return veiled(tensor.stride()) if tensor.dim() == 4 else tensor.stride()


def movable(tensor: Tensor) -> bool:
    """Whether the copy engine can move tiles of a [batch, heads, length, dim] tensor: rows without gaps, addresses and
    steps of whole 16 bytes, nothing repeated, nothing empty.
    """
    steps = [stride for stride, size in zip(tensor.stride()[:3], tensor.shape[:3], strict=True) if size > 1]
    aligned = tensor.data_ptr() % TMA_BYTES == 0
    steady = all(step > 0 and step * tensor.itemsize % TMA_BYTES == 0 for step in steps)
    return aligned and steady and tensor.numel() > 0 and (tensor.stride(3) == 1 or tensor.shape[3] == 1)


def _descriptor(tensor: Tensor, block: list[int]) -> TensorDescriptor:
    """Moves [rows, columns] at a time. The step of an axis of size 1 is never taken and may be anything legal."""
    sizes = list(tensor.shape)
    steps = [
        stride if size > 1 else TMA_BYTES // tensor.itemsize
        for stride, size in zip(tensor.stride()[:3], sizes[:3], strict=True)
    ]
    return TensorDescriptor(tensor, sizes, [*steps, 1], [1, 1, *block])


def named(**fields: Any) -> Any:
    """The values under their names, as kernels read them."""
    return _record(tuple(fields))(*fields.values())


@functools.cache
def _record(names: tuple[str, ...]) -> Any:
    return collections.namedtuple("_Record", names)
