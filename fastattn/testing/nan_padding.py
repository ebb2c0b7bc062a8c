"""Masks that hide queries and keys from everybody, and problems with junk in what is hidden: what the tests of every
backend share.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastattn.masks import Causal, Chunked, Dense, Full, Lengths, Mask, Packed, Prefix, Segments, Window
from fastattn.masks.paged import Paged
from fastattn.testing.cases import Case, Problem, make_inputs

BATCH, NUM_HEADS, NUM_KV_HEADS = 2, 4, 2


def _table(q_len: int, kv_len: int) -> Mask:
    """Columns that nobody sees, one that a single head of a group sees, and a row that sees nothing."""
    table = torch.rand(BATCH, NUM_HEADS, q_len, kv_len, generator=torch.Generator().manual_seed(0)) < 0.4
    table[..., 5:30] = False
    table[:, 1, :, 12] = True
    table[:, :, 7] = False
    return Dense(table)


def _ids(n: int, seed: int | None = None) -> Tensor:
    """Four documents in order, or three scattered ones, the last quarter padding."""
    generator = torch.Generator().manual_seed(seed or 0)
    ids = torch.arange(n) * 4 // n if seed is None else torch.randint(0, 3, (n,), generator=generator)
    ids[n - n // 4 :] = -1
    return ids[None]


def _ints(*values: int) -> Tensor:
    return torch.tensor(values)


PADDED: dict[str, Callable[[int, int], Mask]] = {
    "lengths": lambda q, kv: Lengths(_ints(kv - 3, 20), _ints(q - q // 4, 7), _ints(0, 17)),
    "lengths-none": lambda q, kv: Lengths(_ints(0, kv)),
    "causal-empty-rows": lambda q, kv: Causal(offset=-20),
    "causal-unseen-keys": lambda q, kv: Causal(align="top-left"),
    "window": lambda q, kv: Window(9, 0, offset=25) & Lengths(_ints(kv, kv - 20)),
    "chunked": lambda q, kv: Chunked(8, 0, 0, offset=_ints(16, -9)),
    "prefix": lambda q, kv: Prefix(_ints(9, 0), offset=-17),
    "segments-sorted": lambda q, kv: Segments(_ids(q), _ids(kv), sorted=True),
    "segments-scattered": lambda q, kv: Segments(_ids(q, 1), _ids(kv, 2)),
    "packed": lambda q, kv: Packed(_ints(0, q // 3, q // 3, q - 2), _ints(0, 20, 25, kv - 9)),
    "table": _table,
    "table-and": lambda q, kv: _table(q, kv) & Lengths(_ints(kv - 3, 20)),
    "or": lambda q, kv: Window(4, 0, align="top-left") | Lengths(_ints(3, 0)),
    "three-terms": lambda q, kv: Window(4, 0, offset=-9) | Window(1, 1, offset=12) | Lengths(_ints(3, 0)),
}
"""By (q_len, kv_len), for 8 queries and 50 keys or more."""


FEATURES: dict[str, dict[str, Any]] = {
    "softcap": {"softcap": 2.0}, "sinks": {"sinks": True}, "dropout": {"dropout_p": 0.3},
    "bias": {"bias": (BATCH, NUM_HEADS, 1, 1)},
}  # fmt: skip
"""What junk may pass through besides the mask: arguments of `Case`."""


def hidden_pair(
    name: str, q_len: int, kv_len: int, device: torch.device | str, **features: Any
) -> tuple[Problem, Problem]:
    """A problem under a mask of PADDED, and the same with junk in every query, key, value and gradient that no partner
    sees. `features` go to the `Case`.
    """
    batch = 1 if name == "packed" else BATCH
    mask = torch.utils._pytree.tree_map(lambda each: each.to(device), PADDED[name](q_len, kv_len))
    case = Case(name, q_len, kv_len, batch, NUM_HEADS, NUM_KV_HEADS, mask=lambda *_: mask, **features)
    clean = make_inputs(case, device)
    seen = mask.dense(q_len, kv_len, device=torch.device(device)).expand(batch, NUM_HEADS, q_len, kv_len)
    return clean, with_junk(clean, seen)


def with_junk(clean: Problem, seen: Tensor) -> Problem:
    """The problem with junk in every query, key, value and gradient that no partner sees; `seen` bool
    [batch, num_heads, q_len, kv_len]. ValueError where everybody is seen.
    """
    spec = clean.spec
    row = seen.any(-1)
    column = seen.unflatten(1, (spec.num_kv_heads, spec.group)).any(3).any(2)
    if row.all() and column.all():
        raise ValueError("seen: somebody must be hidden from all, and nobody is")
    query, key, value = (
        torch.where(kept[..., None], each, _junk_like(each))
        for kept, each in zip((row, column, column), clean.inputs[:3], strict=True)
    )
    d_out, d_lse = (
        torch.where(kept, each, _junk_like(each))
        for kept, each in zip((row[..., None], row), (clean.d_out, clean.d_lse), strict=True)
    )
    inputs = clean.inputs._replace(query=query, key=key, value=value)
    return dataclasses.replace(clean, inputs=inputs, d_out=d_out, d_lse=d_lse)


_SPARE = (-1, 2**31 - 1, -(2**31))
"""What a table of blocks says of those that hold nothing."""


def in_blocks(
    case: Case,
    mask: Mask | None,
    held: tuple[int, ...],
    block_size: int,
    *,
    heads_in_rows: bool = False,
    device: torch.device | str = "cpu",
) -> tuple[Problem, Problem]:
    """A problem in which item b sees `mask` of its first held[b] keys; and the same keys in scattered blocks of pools
    that are NaN everywhere else, found by a table that goes on in junk. `heads_in_rows`: the pools are [blocks,
    block_size, heads, dim].
    """
    lengths = torch.tensor(held, device=device)
    seen = (mask or Full()) & Lengths(lengths)
    whole = make_inputs(dataclasses.replace(case, batch=len(held), mask=lambda *_: seen), device)
    columns = -(-case.kv // block_size)
    used = [-(-length // block_size) for length in held]
    order = torch.randperm(sum(used) + 2, generator=torch.Generator().manual_seed(5)).tolist()
    pools = []
    for tensor in whole.inputs[1:3]:
        heads, dim = tensor.shape[1], tensor.shape[3]
        shape = (len(order), block_size, heads, dim) if heads_in_rows else (len(order), heads, block_size, dim)
        pool = torch.full(shape, torch.nan, dtype=tensor.dtype, device=device)
        pools.append(pool.transpose(1, 2) if heads_in_rows else pool)
    table = torch.tensor(_SPARE, dtype=torch.int32).repeat(len(held), columns)[:, :columns]
    for item, count in enumerate(used):
        for column in range(count):
            block = order.pop()
            table[item, column] = block
            first, last = column * block_size, min((column + 1) * block_size, held[item])
            for pool, tensor in zip(pools, whole.inputs[1:3], strict=True):
                pool[block, :, : last - first] = tensor[item, :, first:last]
    bias = whole.inputs.bias
    if bias is not None and bias.shape[-1] > 1:  # as wide as the table's capacity
        bias = torch.nn.functional.pad(bias, (0, columns * block_size - case.kv), value=torch.nan)
    inputs = whole.inputs._replace(key=pools[0], value=pools[1], bias=bias)
    paged = dataclasses.replace(whole, inputs=inputs, mask=Paged(seen, table.to(device), block_size))
    return whole, paged


def _junk_like(tensor: Tensor) -> Tensor:
    """NaN and both infinities in turn: a maximum skips the one and keeps the others."""
    values = torch.tensor([torch.nan, torch.inf, -torch.inf], dtype=tensor.dtype, device=tensor.device)
    return values[torch.arange(tensor.numel(), device=tensor.device) % 3].view(tensor.shape)
