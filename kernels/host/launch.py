"""From a spec and tensors to kernel launches. A launch is a value first, so that it can be compiled and not run."""

import functools
import os
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastattn.kernels.host import mask_lowering
from fastattn.kernels.host.kernel_variant import bias_axes, variant_of
from fastattn.kernels.host.tensor_arguments import Pointer, block_table, fill, named, take_out, tensor_arguments
from fastattn.kernels.host.tile_table import (
    PROCESSORS,
    TileConfig,
    l2_group_of,
    pick,
    pick_forward,
    splits_of,
    stages_of,
    target_of,
    tiles_of,
)
from fastattn.kernels.opaque_int import opaque
from fastattn.kernels.passes.attn_bwd_dbias import attn_dbias_kernel
from fastattn.kernels.passes.attn_bwd_delta import attn_delta_kernel
from fastattn.kernels.passes.attn_bwd_dkv import attn_dkv_kernel
from fastattn.kernels.passes.attn_bwd_dq import attn_dq_kernel
from fastattn.kernels.passes.attn_fwd import attn_fwd_kernel, attn_merge_kernel
from fastattn.kernels.rules.dropout import threshold_of
from fastattn.kernels.rules.scores import Scales, score_of
from fastattn.kernels.tiling.walk import Sizes
from fastattn.spec import AttnInputs, AttnSpec

ROW_PAD = 16
"""Rows; Triton knows of a stride that 16 divides."""
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether the kernels above were made for Triton's interpreter: it reads the variable when a kernel is defined."""


class Launch(NamedTuple):
    """One kernel with all it is launched with, and the row of the tile table behind it.

    In a plan, the places of tensors hold their names (tensor_arguments.py); bound, they hold the tensors.
    """

    kernel: Any
    programs: int
    args: tuple
    options: dict[str, Any]
    row: TileConfig
    lists: tuple[int, int, bool] | None = None
    """Of a kernel that walks block lists: BLOCK_M, BLOCK_N, and whether it walks queries."""

    def block_lists(self, spec: AttnSpec) -> dict[str, Tensor]:
        """The lists that it walks, by the names of its arguments."""
        if self.lists is None:
            return {}
        block_m, block_n, mirror = self.lists
        lists = mask_lowering.block_lists(spec, block_m, block_n, mirror=mirror)
        return {"counts": lists.counts, "tiles": lists.tiles}

    def bound(self, tensors: dict[str, Tensor]) -> "Launch":
        """The same with tensors in their places."""
        return self._replace(args=fill(self.args, tensors))

    def run(self) -> Any:
        """Launches it, bound, and gives the compiled kernel. An empty grid, an error in CUDA, is nothing to do here."""
        return self.kernel[(self.programs,)](*self.args, **self.options) if self.programs else None


class LaunchPlan(NamedTuple):
    """The launches of one pass, for every call of its structure and with tensors that lie alike."""

    launches: tuple[Launch, ...]
    splits: int = 1
    reads_mask: bool = False
    """Whether the mask has tensors, which are lowered anew for each call."""

    def more_tensors(self, spec: AttnSpec, given: dict[str, Tensor]) -> dict[str, Tensor]:
        """What a call's launches take besides: the mask's tensors, the memory of parts."""
        more: dict[str, Tensor] = {}
        if self.reads_mask:
            take_out(mask_lowering.lower(spec).args, MASK, more)
        if self.splits > 1:
            out = given["out"]
            parts = torch.empty(self.splits * spec.batch, *out.shape[1:], dtype=torch.float32, device=out.device)
            more |= {"part_out": parts, "part_lse": parts.new_empty(parts.shape[:3])}
        return more

    def bound(self, spec: AttnSpec, given: dict[str, Tensor]) -> list[Launch]:
        """The launches of one call."""
        tensors = given | self.more_tensors(spec, given)
        return [each.bound(tensors | each.block_lists(spec)) for each in self.launches]


MASK = "mask"
"""What the names of the mask's tensors begin with."""


@functools.cache
def target_for(device: torch.device) -> str:
    """The tile table's name for a device."""
    return target_of(None if INTERPRETED else torch.cuda.get_device_capability(device))


@functools.cache
def _processors(device: torch.device) -> int:
    """How many programs run at once on a device; 0 where there is none."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 0


class LaunchBuilder:
    """What the launches of one pass share: the mask's lowering, the variant's flags, scales, sizes."""

    def __init__(self, spec: AttnSpec, target: str) -> None:
        self.spec, self.target = spec, target
        self.mask = mask_lowering.lower(spec)
        self.mask_tensors: dict[str, Tensor] = {}
        self.mask_args = take_out(self.mask.args, MASK, self.mask_tensors)
        kept = 1.0 - spec.dropout_p
        self.scales = Scales(
            score_of(spec)[1],
            float(spec.scale),
            1.0 if spec.softcap is None else float(spec.softcap),
            threshold_of(spec.dropout_p),
            1.0 / kept if kept else 0.0,
        )

    def plan(self, *launches: Launch, splits: int = 1) -> LaunchPlan:
        return LaunchPlan(launches, splits, bool(self.mask_tensors))

    def sizes(self, programs: int, l2_group: int, splits: int = 1) -> Sizes:
        spec = self.spec
        heads = spec.num_heads, spec.num_kv_heads, spec.group
        l2_group = max(1, min(l2_group, spec.batch * spec.num_heads))  # its tiles are counted in 32 bits
        return Sizes(*map(opaque, (spec.batch, *heads, spec.q_len, spec.kv_len, programs, l2_group, splits)))

    def walking(
        self,
        kernel: Any,
        row: TileConfig,
        programs: int,
        l2_group: int,
        arguments: tuple,
        *,
        splits: int = 1,
        mirror: bool = False,
        **flags: bool,
    ) -> Launch:
        """A kernel whose programs own tiles and walk the other side."""
        walked = lists = None
        if not self.mask.terms:
            walked = row.block_m, row.block_n, mirror
            made = mask_lowering.block_lists(self.spec, row.block_m, row.block_n, mirror=mirror)
            lists = made._replace(counts=Pointer("counts"), tiles=Pointer("tiles"))
        tables = (bias_axes(self.spec) == "qk") + self.mask.rules.count("Dense")
        args = (*arguments, self.sizes(programs, l2_group, splits), self.scales, self.mask_args, lists)
        if row.persistent:
            programs = min(programs, _processors(self.spec.device) or PROCESSORS[self.target])
        launch = self.launch(kernel, row, programs, args, persistent=row.persistent, **flags)
        options = launch.options | {"num_stages": stages_of(self.spec, row, tables)}
        return launch._replace(options=options, lists=walked)

    def resting(self, kernel: Any, row: TileConfig, arguments: tuple, splits: int = 1) -> Launch:
        """A kernel whose programs own rows of queries and walk nothing."""
        programs = tiles_of(self.spec.q_len, row.block_m) * self.spec.num_heads * self.spec.batch
        return self.launch(kernel, row, programs, (*arguments, self.sizes(programs, 1, splits)))

    def launch(self, kernel: Any, row: TileConfig, programs: int, args: tuple, **flags: bool) -> Launch:
        variant = variant_of(self.spec, self.mask, interpreted=INTERPRETED, **flags)
        blocks = {"BLOCK_M": row.block_m} | ({"BLOCK_N": row.block_n} if row.block_n else {})
        options = {"VARIANT": variant, **blocks, "num_warps": row.num_warps, "num_stages": row.num_stages}
        return Launch(kernel, programs, args, options, row)


def forward(spec: AttnSpec, inputs: AttnInputs, out: Tensor, lse: Tensor, target: str) -> list[Launch]:
    """The launches that write out and lse."""
    given = forward_tensors(spec, inputs, out, lse)
    return plan_forward(spec, given, target).bound(spec, given)


def forward_tensors(spec: AttnSpec, inputs: AttnInputs, out: Tensor, lse: Tensor) -> dict[str, Tensor]:
    """The forward's tensors by the names of its plan."""
    given = _inputs_by_name(spec, inputs)
    given["out"], given["lse"] = out, lse
    return given


def _inputs_by_name(spec: AttnSpec, inputs: AttnInputs) -> dict[str, Tensor]:
    query, key, value, bias, sinks, seed = inputs
    given = {"query": query, "key": key, "value": value}
    if bias is not None:
        given["bias"] = bias
    if sinks is not None:
        given["sinks"] = sinks
    if seed is not None:
        given["seed"] = seed
    if spec.pages is not None:
        given["table"] = block_table(spec.pages.table)
    return given


def plan_forward(spec: AttnSpec, given: dict[str, Tensor], target: str) -> LaunchPlan:
    """Of tensors only their dtypes and how they lie are read."""
    builder, row = LaunchBuilder(spec, target), pick_forward(spec, target)
    # A group's heads share a tile, and so what it visits.
    packed = spec.group > 1 and row.kernel != "fwd" and not builder.mask.by_head
    heads, rows = (spec.num_kv_heads, spec.q_len * spec.group) if packed else (spec.num_heads, spec.q_len)
    programs = tiles_of(rows, row.block_m) * heads * spec.batch
    splits = splits_of(spec, row, target, programs)
    out, written = given["out"], {}
    if splits > 1:  # the kernel writes parts, contiguous and float32
        out = torch.empty(splits * spec.batch, *out.shape[1:], dtype=torch.float32, device="meta")
        written = {"out": "part_out", "lse": "part_lse"}
    # A packed tile's queries lie in several heads, which no descriptor spans; nor does one span a pool's blocks.
    own, walked = (None if packed else row.block_m), (None if spec.pages is not None else row.block_n)
    moved = {name: (given[name], walked) for name in ("key", "value")}
    first = builder.walking(
        attn_fwd_kernel,
        row,
        programs * splits,
        l2_group_of(spec, spec.kv_len) * (1 if packed else spec.group),
        tensor_arguments(
            row.descriptors,
            {"query": (given["query"], own), **moved, "out": (out, own)},
            {"bias": _bias(spec, given)},
            spec.pages,
            written,
            lse=given["lse"],
            sinks=given.get("sinks"),
            seed=given.get("seed"),
        ),
        splits=splits,
        packed=packed,
        split=splits > 1,
    )
    if splits == 1:
        return builder.plan(first)
    tensors = {"part_out": out, "out": given["out"]}
    merged = tensor_arguments(False, {}, tensors, part_lse=out, lse=given["lse"], sinks=given.get("sinks"))
    merge = builder.resting(attn_merge_kernel, pick(spec, "merge", target), merged, splits)
    return builder.plan(first, merge, splits=splits)


def _bias(spec: AttnSpec, given: dict[str, Tensor]) -> Tensor | None:
    """[batch, num_heads, q_len, kv_len] without a copy."""
    bias = given.get("bias")
    return None if bias is None else bias.expand(spec.batch, spec.num_heads, spec.q_len, spec.kv_len)


class Backward(NamedTuple):
    """The tensors of a backward pass: saved, incoming, to be written.

    `total` and `delta` are for the kernels alone: see empty_terms. `dbias` is the table's gradient, or a
    float32 part of it: [batch, num_heads, q_len, 1] where it varies over queries or neither, [..., 1, kv_len] where
    over keys. `dsinks` float32 [batch, num_heads, tiles].
    """

    out: Tensor
    lse: Tensor
    d_out: Tensor
    d_lse: Tensor | None
    total: Tensor
    delta: Tensor
    dq: Tensor
    dk: Tensor
    dv: Tensor
    dbias: Tensor | None
    dsinks: Tensor | None


def empty_terms(spec: AttnSpec, lse: Tensor) -> tuple[Tensor, Tensor]:
    """total and delta of each row (attn_bwd_delta.py), float32 [batch, num_heads, q_len padded]: with whole steps of
    TMA_BYTES the copy engine can move them, and a program's loads are aligned whatever the length.
    """
    padded = tiles_of(spec.q_len, ROW_PAD) * ROW_PAD
    total = torch.empty(spec.batch, spec.num_heads, padded, dtype=torch.float32, device=lse.device)
    return total, torch.empty_like(total)


def empty_dbias(spec: AttnSpec, bias: Tensor) -> Tensor:
    """Where the kernels leave a bias's gradient: see Backward."""
    axes = bias_axes(spec)
    if axes == "qk":
        return torch.empty_like(bias)
    rest = (1, spec.kv_len) if axes == "k" else (spec.q_len, 1)
    return bias.new_empty(spec.batch, spec.num_heads, *rest, dtype=torch.float32)


def empty_dsinks(spec: AttnSpec, sinks: Tensor, target: str) -> Tensor:
    """Where the kernels leave the sinks' gradients, tile by tile."""
    tiles = tiles_of(spec.q_len, pick(spec, "dq", target).block_m)
    return sinks.new_empty(spec.batch, spec.num_heads, tiles, dtype=torch.float32)


def backward(spec: AttnSpec, inputs: AttnInputs, grads: Backward, target: str) -> list[Launch]:
    """The launches that write delta, then the gradients."""
    given = backward_tensors(spec, inputs, grads)
    return plan_backward(spec, given, target).bound(spec, given)


def backward_tensors(spec: AttnSpec, inputs: AttnInputs, grads: Backward) -> dict[str, Tensor]:
    """The backward's tensors by the names of its plan."""
    own = {name: each for name, each in zip(grads._fields, grads, strict=True) if each is not None}
    return _inputs_by_name(spec, inputs) | own


def plan_backward(spec: AttnSpec, given: dict[str, Tensor], target: str) -> LaunchPlan:
    """Of tensors only their dtypes and how they lie are read."""
    builder = LaunchBuilder(spec, target)
    axes = bias_axes(spec)
    dbias = given.get("dbias")
    rows = {name: given[name] for name in ("out", "d_out", "total", "delta")}
    sinks, d_lse = given.get("sinks"), given.get("d_lse")
    args = tensor_arguments(False, {}, rows, lse=given["lse"], d_lse=d_lse, sinks=sinks)
    delta = builder.resting(attn_delta_kernel, pick(spec, "delta", target), args)
    terms = {name: given[name] for name in ("total", "delta")}
    bias = {"bias": _bias(spec, given)}
    rest = {"sinks": sinks, "seed": given.get("seed")}

    row = pick(spec, "dq", target)
    sides = {"query": row.block_m, "key": row.block_n, "value": row.block_n, "d_out": row.block_m, "dq": row.block_m}
    by_rows = dbias if axes in ("q", "1") else None
    own = {"d_lse": d_lse, "dsinks": given.get("dsinks"), "dbias": by_rows}
    args = tensor_arguments(row.descriptors, _moved(given, sides), terms | bias, **rest, **own)
    programs = tiles_of(spec.q_len, row.block_m) * spec.num_heads * spec.batch
    l2_group = l2_group_of(spec, spec.kv_len) * spec.group
    dq = builder.walking(attn_dq_kernel, row, programs, l2_group, args)

    row = pick(spec, "dkv", target)
    sides = {"query": row.block_m, "key": row.block_n, "value": row.block_n, "d_out": row.block_m}
    sides |= {"total": row.block_m, "delta": row.block_m, "dk": row.block_n, "dv": row.block_n}
    by_keys = dbias if axes == "k" else None
    args = tensor_arguments(row.descriptors, _moved(given, sides), bias, **rest, dbias=by_keys)
    programs = tiles_of(spec.kv_len, row.block_n) * spec.num_kv_heads * spec.batch
    l2_group = l2_group_of(spec, spec.q_len * spec.group)
    dkv = builder.walking(attn_dkv_kernel, row, programs, l2_group, args, mirror=True)

    if axes != "qk" or dbias is None:
        return builder.plan(delta, dq, dkv)
    pairs = {name: given[name] for name in ("query", "key", "value", "d_out")}
    return builder.plan(delta, dq, dkv, _plan_dbias(builder, dbias, pairs | terms | bias, rest))


def _plan_dbias(
    builder: LaunchBuilder, dbias: Tensor, strided: dict[str, Tensor | None], rest: dict[str, Tensor | None]
) -> Launch:
    """The gradient of a bias that varies over queries and keys, for one table or several."""
    spec, row = builder.spec, pick(builder.spec, "dbias", builder.target)
    table = dbias[(None,) * (4 - dbias.dim())]
    batch, heads, q_len, kv_len = table.shape
    args = tensor_arguments(False, {}, strided | {"dbias": table}, **rest)
    programs = tiles_of(q_len, row.block_m) * tiles_of(kv_len, row.block_n) * heads * batch
    shared = named(
        own_heads=opaque(heads),
        heads=opaque(spec.num_heads // max(heads, 1)),
        batches=opaque(spec.batch // max(batch, 1)),
    )
    args = (*args, builder.sizes(programs, 1), builder.scales, builder.mask_args, shared)
    return builder.launch(attn_dbias_kernel, row, programs, args)


def _moved(given: dict[str, Tensor], rows: dict[str, int]) -> dict[str, tuple[Tensor, int | None]]:
    return {name: (given[name], count) for name, count in rows.items()}
