"""DTensors: attention is computed where its shards lie, batch item by batch item and head by head.

For each dimension of the device mesh the query's placement decides: sharded over the batch (`Shard(0)`) or over the
heads (`Shard(1)`), everything is brought to lie likewise, and each rank computes its own part; a sharded length is
refused; anything else is computed whole on every rank. Heads stay together with the key heads they look at, so that the
mesh must divide those; dropout's bits belong to places in the whole problem, which is computed whole with it. Plain
tensors beside DTensors, a mask's too, are taken for the same on every rank.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn.masks import Dense, Mask, Packed, serialize
from fastattn.spec import AttnInputs, AttnSpec

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

BATCH, HEADS = "batch", "heads"
LENGTH = 2
"""The dimension of query, key and value that no backend takes in parts yet."""
_TORCH_SDPA = torch._C._nn.scaled_dot_product_attention
Axes = tuple[str, ...]
"""What each dimension of the mesh shards; "" where all ranks have it all."""
Dims = dict[str, int]
"""Which dimension of a tensor is the batch, and which the heads, where it has them."""


def is_sharded(tensor: object) -> bool:
    """Whether it is a DTensor; by name, as torch.distributed.tensor is a heavy import."""
    return type(tensor).__name__ == "DTensor"


def refuse_context_parallel() -> None:
    """Refuse a call inside of torch's `context_parallel`, whose plain tensors are one rank's part of each length.

    Raises:
        ValueError: the call is inside.
    """
    torchs: object = F.scaled_dot_product_attention
    if torchs is not _TORCH_SDPA and _splits_lengths(torchs):
        raise ValueError(
            "query, key, value: inside of torch.distributed.tensor.experimental.context_parallel each rank holds a "
            "part of the length, and fastattn has no context parallelism yet; leave this call to torch's own "
            "F.scaled_dot_product_attention outside of fastattn.patch() (its ring attention runs on GPUs), or end the "
            "context and shard the batch or the heads"
        )


def _splits_lengths(function: object) -> bool:
    """Whether it is what `context_parallel` puts in the place of torch's attention."""
    return str(getattr(function, "__module__", "")).startswith("torch.distributed.tensor.experimental")


_splits_lengths._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _refuse_lengths(**tensors: Any) -> None:
    """Refuse DTensors whose ranks hold parts of the length; where a mesh dimension has one rank, that holds it all."""
    for name, tensor in tensors.items():
        if not is_sharded(tensor):
            continue
        places = tensor.placements
        over = [getattr(place, "dim", None) for size, place in zip(tensor.device_mesh.shape, places, strict=True)
                if size > 1]  # fmt: skip
        if LENGTH in over or LENGTH - 4 in over:
            raise ValueError(
                f"{name}: a DTensor sharded over the length (dimension {LENGTH}) is refused, as fastattn has no "
                f"context parallelism yet, got placements {tuple(places)}; shard the batch (Shard(0)) or the heads "
                "(Shard(1)), or bring it together with redistribute(placements=[Replicate()])"
            )


class Part(NamedTuple):
    """What one rank computes: its inputs, its spec, its rows of an lse that was given, and what makes a DTensor of its
    out, lse or weights [batch, num_heads, ...], or with `summed` of weights [batch, ...] that are a sum over its heads.
    """

    inputs: AttnInputs
    spec: AttnSpec
    lse: Tensor | None
    gathered: Callable[..., Any]


def localized(inputs: AttnInputs, spec: AttnSpec, lse: Tensor | None = None) -> Part:
    """This rank's part of a problem on DTensors.

    Raises:
        ValueError: query, key and value are not all DTensors on one mesh, one is sharded over the length, or the keys
            lie in blocks.
    """
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

    if spec.pages is not None:
        raise ValueError(
            "key, value: a cache in blocks cannot be of DTensors, as its pool has no batch to share out; give each "
            "rank a cache of its own heads, or keep the sequences in one piece (KVCache.static, KVCache.growing)"
        )

    query: Any
    key: Any
    value: Any
    query, key, value, bias, sinks, seed = inputs
    mesh = next(tensor for tensor in (query, key, value) if is_sharded(tensor)).device_mesh
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if not is_sharded(tensor) or tensor.device_mesh != mesh:
            got = "a DTensor on another mesh" if is_sharded(tensor) else f"a {type(tensor).__name__}"
            raise ValueError(f"{name}: query, key and value must all be DTensors on one mesh, got {got}")
    _refuse_lengths(query=query, key=key, value=value)
    axes = _axes(query, spec)

    def here(tensor: Any, dims: Dims, *, summed: bool = False) -> Any:
        """The part of a tensor that this rank needs; `dims` says which of its dimensions is the batch, the heads."""
        if tensor is None:
            return None
        places = [Shard(dims[axis]) if axis in dims else Replicate() for axis in axes]
        grads = [
            Partial() if summed and axis and isinstance(place, Replicate) else place
            for axis, place in zip(axes, places, strict=True)
        ]
        return alike(tensor, query).redistribute(placements=places).to_local(grad_placements=grads)

    whole: Dims = {BATCH: 0, HEADS: 1}
    local = AttnInputs(
        here(query, whole),
        here(key, whole),
        here(value, whole),
        None if bias is None else here(bias, _table_dims(bias), summed=True),
        here(sinks, {HEADS: 0}, summed=True),
        here(seed, {}),
    )
    code, numbers, tensors = serialize.pack(spec.mask)
    parts = [here(tensor, dims) for tensor, dims in zip(tensors, _mask_dims(spec.mask, tensors), strict=True)]
    local_spec = AttnSpec.of(
        local,
        mask=serialize.unpack(code, numbers, parts),
        scale=spec.scale,
        softcap=spec.softcap,
        dropout_p=spec.dropout_p,
        deterministic=spec.deterministic,
    )

    def gathered(part: Tensor, *, summed: bool = False) -> DTensor:
        places: list[Any] = [Shard(whole[axis]) if axis in whole else Replicate() for axis in axes]
        if not summed:
            return DTensor.from_local(part, mesh, places, run_check=False)
        heads = [Partial() if axis == HEADS else place for axis, place in zip(axes, places, strict=True)]
        alike = [Replicate() if axis == HEADS else place for axis, place in zip(axes, places, strict=True)]
        return DTensor.from_local(part, mesh, heads, run_check=False).redistribute(placements=alike)

    return Part(local, local_spec, here(lse, whole), gathered)


def alike(tensor: Tensor, sharded: Any) -> Any:
    """A plain tensor that is the same on every rank, as a DTensor beside `sharded` where that is one."""
    if is_sharded(tensor) or not is_sharded(sharded):
        return tensor
    from torch.distributed.tensor import DTensor, Replicate

    mesh = sharded.device_mesh
    return DTensor.from_local(tensor, mesh, [Replicate()] * mesh.ndim, run_check=False)


def _axes(query: Any, spec: AttnSpec) -> Axes:
    """What each dimension of the mesh shards, as far as the sizes divide evenly."""
    from torch.distributed.tensor import Shard

    left = {BATCH: spec.batch, HEADS: spec.num_kv_heads}
    names = {0: BATCH, 1: HEADS}
    axes: list[str] = []
    for size, place in zip(query.device_mesh.shape, query.placements, strict=True):
        axis = names.get(place.dim, "") if type(place) is Shard else ""
        if not axis or spec.dropout_p > 0 or not left[axis] or left[axis] % size:
            axes.append("")
            continue
        left[axis] //= size
        axes.append(axis)
    return tuple(axes)


def _table_dims(table: Tensor) -> Dims:
    """Of what broadcasts to [batch, num_heads, q_len, kv_len]."""
    first = 4 - table.dim()
    places = ((BATCH, 0 - first), (HEADS, 1 - first))
    return {axis: dim for axis, dim in places if dim >= 0 and table.shape[dim] > 1}


def _mask_dims(mask: Mask, tensors: list[Tensor]) -> list[Dims]:
    """Of each of a mask's tensors: a table, or numbers for each batch item, or for the one row of Packed."""
    found: dict[int, Dims] = {}
    for atom in mask.atoms():
        for tensor in atom.tensors:
            if isinstance(atom, Dense):
                found[id(tensor)] = _table_dims(tensor)
            elif isinstance(atom, Packed) or tensor.shape[0] == 1:
                found[id(tensor)] = {}
            else:
                found[id(tensor)] = {BATCH: 0}
    return [found[id(tensor)] for tensor in tensors]
