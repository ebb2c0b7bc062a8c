"""From a spec and tensors to kernel launches. A launch is a value first, so that it can be compiled and not run."""

import functools
import os
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastattn.kernels import lower
from fastattn.kernels.attn_bwd_dbias import attn_dbias_kernel
from fastattn.kernels.attn_bwd_delta import attn_delta_kernel
from fastattn.kernels.attn_bwd_dkv import attn_dkv_kernel
from fastattn.kernels.attn_bwd_dq import attn_dq_kernel
from fastattn.kernels.attn_fwd import attn_fwd_kernel, attn_merge_kernel
from fastattn.kernels.configs import (
    PROCESSORS,
    TileConfig,
    pick,
    pick_forward,
    section_of,
    splits_of,
    stages_of,
    target_of,
    tiles_of,
)
from fastattn.kernels.dropout import threshold_of
from fastattn.kernels.kind import bias_axes, kind_of
from fastattn.kernels.operands import named, operands
from fastattn.kernels.scores import Scales, score_of
from fastattn.kernels.veil import veil
from fastattn.kernels.walk import Sizes
from fastattn.spec import AttnInputs, AttnSpec

ROW_PAD = 16
"""Rows; Triton knows of a stride that 16 divides."""
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether the kernels above were made for Triton's interpreter: it reads the variable when a kernel is defined."""


class Launch(NamedTuple):
    """One kernel with all it is launched with, and the row of the tile table behind it."""

    kernel: Any
    programs: int
    args: tuple
    options: dict[str, Any]
    row: TileConfig

    def run(self) -> None:
        """An empty grid is an error in CUDA and nothing to do here."""
        if self.programs:
            self.kernel[(self.programs,)](*self.args, **self.options)


def target_for(device: torch.device) -> str:
    """The tile table's name for a device."""
    return target_of(None if INTERPRETED else torch.cuda.get_device_capability(device))


@functools.cache
def _processors(device: torch.device) -> int:
    """How many programs run at once on a device; 0 where there is none."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 0


class Problem:
    """What the launches of one pass share: the mask's lowering, the kind, scales, sizes."""

    def __init__(self, spec: AttnSpec, inputs: AttnInputs, target: str) -> None:
        self.spec, self.inputs, self.target = spec, inputs, target
        self.mask = lower.lower(spec)
        kept = 1.0 - spec.dropout_p
        self.scales = Scales(
            score_of(spec)[1],
            float(spec.scale),
            1.0 if spec.softcap is None else float(spec.softcap),
            threshold_of(spec.dropout_p),
            1.0 / kept if kept else 0.0,
        )
        bias = inputs.bias
        # [batch, num_heads, q_len, kv_len] without a copy
        self.bias = None if bias is None else bias.expand(spec.batch, spec.num_heads, spec.q_len, spec.kv_len)

    def sizes(self, programs: int, section: int, splits: int = 1) -> Sizes:
        spec = self.spec
        heads = spec.num_heads, spec.num_kv_heads, spec.group
        section = max(1, min(section, spec.batch * spec.num_heads))  # its tiles are counted in 32 bits
        return Sizes(*map(veil, (spec.batch, *heads, spec.q_len, spec.kv_len, programs, section, splits)))

    def walking(
        self,
        kernel: Any,
        row: TileConfig,
        programs: int,
        section: int,
        operands: tuple,
        *,
        splits: int = 1,
        mirror: bool = False,
        **flags: bool,
    ) -> Launch:
        """A kernel whose programs own tiles and walk the other side."""
        lists = None if self.mask.terms else lower.block_lists(self.spec, row.block_m, row.block_n, mirror=mirror)
        tables = (bias_axes(self.spec) == "qk") + self.mask.rules.count("Dense")
        args = (*operands, self.sizes(programs, section, splits), self.scales, self.mask.args, lists)
        if row.persistent:
            programs = min(programs, _processors(self.spec.device) or PROCESSORS[self.target])
        launch = self.launch(kernel, row, programs, args, persistent=row.persistent, **flags)
        return launch._replace(options=launch.options | {"num_stages": stages_of(self.spec, row, tables)})

    def resting(self, kernel: Any, row: TileConfig, operands: tuple, splits: int = 1) -> Launch:
        """A kernel whose programs own rows of queries and walk nothing."""
        programs = tiles_of(self.spec.q_len, row.block_m) * self.spec.num_heads * self.spec.batch
        return self.launch(kernel, row, programs, (*operands, self.sizes(programs, 1, splits)))

    def launch(self, kernel: Any, row: TileConfig, programs: int, args: tuple, **flags: bool) -> Launch:
        kind = kind_of(self.spec, self.mask, interpreted=INTERPRETED, **flags)
        blocks = {"BLOCK_M": row.block_m} | ({"BLOCK_N": row.block_n} if row.block_n else {})
        options = {"KIND": kind, **blocks, "num_warps": row.num_warps, "num_stages": row.num_stages}
        return Launch(kernel, programs, args, options, row)


def forward(spec: AttnSpec, inputs: AttnInputs, out: Tensor, lse: Tensor, target: str) -> list[Launch]:
    """Writes out and lse."""
    problem, row = Problem(spec, inputs, target), pick_forward(spec, target)
    # A group's heads share a tile, and so what it visits.
    packed = spec.group > 1 and row.kernel != "fwd" and not problem.mask.by_head
    heads, rows = (spec.num_kv_heads, spec.q_len * spec.group) if packed else (spec.num_heads, spec.q_len)
    programs = tiles_of(rows, row.block_m) * heads * spec.batch
    splits = splits_of(spec, row, target, programs)
    part_out, part_lse = out, lse
    if splits > 1:
        part_out = torch.empty(splits * spec.batch, *out.shape[1:], dtype=torch.float32, device=out.device)
        part_lse = torch.empty(part_out.shape[:3], dtype=torch.float32, device=out.device)
    # A packed tile's queries lie in several heads, which no descriptor spans.
    whole = {"query": (inputs.query, row.block_m), "out": (part_out, row.block_m)}
    tiled = {"key": (inputs.key, row.block_n), "value": (inputs.value, row.block_n)}
    strided: dict[str, Tensor | None] = {"bias": problem.bias}
    for here, told in ((packed, whole), (spec.pages is not None, tiled)):
        strided |= {name: tensor for name, (tensor, _) in told.items()} if here else {}
    tensors = operands(
        row.descriptors,
        {name: each for name, each in (tiled | whole).items() if name not in strided},
        strided,
        spec.pages,
        lse=part_lse,
        sinks=inputs.sinks,
        seed=inputs.dropout_seed,
    )
    section = section_of(spec, spec.kv_len) * (1 if packed else spec.group)
    first = problem.walking(
        attn_fwd_kernel, row, programs * splits, section, tensors, splits=splits, packed=packed, split=splits > 1
    )
    if splits == 1:
        return [first]
    merged = operands(False, {}, {"part_out": part_out, "out": out}, part_lse=part_lse, lse=lse, sinks=inputs.sinks)
    return [first, problem.resting(attn_merge_kernel, pick(spec, "merge", target), merged, splits)]


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
    total, delta = lse.new_empty(2, spec.batch, spec.num_heads, padded, dtype=torch.float32)
    return total, delta


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
    """Writes delta, then the gradients."""
    problem = Problem(spec, inputs, target)
    axes = bias_axes(spec)
    given = operands(
        False,
        {},
        {"out": grads.out, "d_out": grads.d_out, "total": grads.total, "delta": grads.delta},
        lse=grads.lse,
        d_lse=grads.d_lse,
        sinks=inputs.sinks,
    )
    launches = [problem.resting(attn_delta_kernel, pick(spec, "delta", target), given)]
    rest = {"sinks": inputs.sinks, "seed": inputs.dropout_seed}
    bias = {"bias": problem.bias}
    terms = {"total": grads.total, "delta": grads.delta}
    q_side = {"query": inputs.query, "d_out": grads.d_out}
    kv_side = {"key": inputs.key, "value": inputs.value}

    row = pick(spec, "dq", target)
    tiled = _tiled(row.block_m, **q_side, dq=grads.dq) | _tiled(row.block_n, **kv_side)
    by_rows = grads.dbias if axes in ("q", "1") else None
    own = {"d_lse": grads.d_lse, "dsinks": grads.dsinks, "dbias": by_rows}
    given = operands(row.descriptors, tiled, bias | terms, **rest, **own)
    programs = tiles_of(spec.q_len, row.block_m) * spec.num_heads * spec.batch
    section = section_of(spec, spec.kv_len) * spec.group
    launches.append(problem.walking(attn_dq_kernel, row, programs, section, given))

    row = pick(spec, "dkv", target)
    tiled = _tiled(row.block_m, **q_side, **terms) | _tiled(row.block_n, **kv_side, dk=grads.dk, dv=grads.dv)
    by_keys = grads.dbias if axes == "k" else None
    given = operands(row.descriptors, tiled, bias, **rest, dbias=by_keys)
    programs = tiles_of(spec.kv_len, row.block_n) * spec.num_kv_heads * spec.batch
    section = section_of(spec, spec.q_len * spec.group)
    launches.append(problem.walking(attn_dkv_kernel, row, programs, section, given, mirror=True))

    if axes == "qk" and grads.dbias is not None:
        launches.append(_dbias(problem, grads, q_side | kv_side | terms | bias, rest))
    return launches


def _dbias(problem: Problem, grads: Backward, strided: dict[str, Tensor | None], rest: dict[str, Any]) -> Launch:
    """The gradient of a bias that varies over queries and keys, for one table or several."""
    spec, row = problem.spec, pick(problem.spec, "dbias", problem.target)
    table = _four_dims(grads.dbias)
    batch, heads, q_len, kv_len = table.shape
    given = operands(False, {}, strided | {"dbias": table}, **rest)
    programs = tiles_of(q_len, row.block_m) * tiles_of(kv_len, row.block_n) * heads * batch
    shared = named(
        own_heads=veil(heads), heads=veil(spec.num_heads // max(heads, 1)), batches=veil(spec.batch // max(batch, 1))
    )
    args = (*given, problem.sizes(programs, 1), problem.scales, problem.mask.args, shared)
    return problem.launch(attn_dbias_kernel, row, programs, args)


def _four_dims(tensor: Any) -> Tensor:
    return tensor[(None,) * (4 - tensor.dim())]


def _tiled(rows: int, **tensors: Tensor) -> dict[str, tuple[Tensor, int]]:
    return {name: (tensor, rows) for name, tensor in tensors.items()}
