"""From a spec and tensors to kernel launches. A launch is a value first, so that it can be compiled and not run."""

import os
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from fastattn.kernels import masks
from fastattn.kernels.attn_bwd_dkv import attn_dkv_kernel
from fastattn.kernels.attn_bwd_dq import attn_delta_kernel, attn_dq_kernel
from fastattn.kernels.attn_fwd import attn_fwd_kernel
from fastattn.kernels.configs import TileConfig, pick, target_of
from fastattn.kernels.online import NORMALIZERS
from fastattn.kernels.scores import SCORES
from fastattn.spec import AttnInputs, AttnSpec

LOG2E = 1.4426950408889634
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether the kernels above were made for Triton's interpreter: it reads the variable when a kernel is defined."""


class Launch(NamedTuple):
    """One kernel with all it is launched with."""

    kernel: Any
    programs: int
    args: tuple
    options: dict[str, Any]

    def run(self) -> None:
        """An empty grid is an error in CUDA and nothing to do here."""
        if self.programs:
            self.kernel[(self.programs,)](*self.args, **self.options)


def target_for(device: torch.device) -> str:
    """The tile table's name for a device."""
    return target_of(None if INTERPRETED else torch.cuda.get_device_capability(device))


def forward(spec: AttnSpec, inputs: AttnInputs, out: Tensor, lse: Tensor, target: str) -> list[Launch]:
    """Writes out and lse."""
    config = pick(spec, "fwd", target)
    args = (
        (*inputs[:3], out, lse),
        _strides(*inputs[:3], out),
        (spec.num_heads, spec.group, spec.q_len, spec.kv_len),
        spec.scale * LOG2E,
    )
    programs = _tiles(spec.q_len, config.block_m) * spec.num_heads * spec.batch
    return [_launch(attn_fwd_kernel, programs, spec, args, config)]


class Backward(NamedTuple):
    """The tensors of a backward pass: saved, incoming, to be written."""

    out: Tensor
    lse: Tensor
    d_out: Tensor
    d_lse: Tensor | None
    delta: Tensor
    dq: Tensor
    dk: Tensor
    dv: Tensor


def backward(spec: AttnSpec, inputs: AttnInputs, tensors: Backward, target: str) -> list[Launch]:
    """Writes delta, then dq, dk and dv."""
    query, key, value = inputs[:3]
    out, lse, d_out, d_lse, delta, dq, dk, dv = tensors
    sizes = (spec.num_heads, spec.group, spec.q_len, spec.kv_len)
    scales = (spec.scale * LOG2E, spec.scale)
    heads = spec.num_heads * spec.batch
    small, for_dq, for_dkv = (pick(spec, kernel, target) for kernel in ("delta", "dq", "dkv"))
    first = Launch(
        attn_delta_kernel,
        _tiles(spec.q_len, small.block_m) * heads,
        ((out, d_out, lse, d_lse, delta), _strides(out, d_out), (spec.num_heads, spec.q_len)),
        {
            "HEAD_DIM_V": spec.head_dim_v,
            "BLOCK_DV": _wide(spec.head_dim_v),
            "BLOCK_M": small.block_m,
            "num_warps": small.num_warps,
        },
    )
    of_dq = ((query, key, value, d_out, dq, lse, delta), _strides(query, key, value, d_out, dq), sizes, scales)
    of_dkv = (
        (query, key, value, d_out, dk, dv, lse, delta),
        _strides(query, key, value, d_out, dk, dv),
        (spec.num_kv_heads, *sizes[1:]),
        scales,
    )
    kv_programs = _tiles(spec.kv_len, for_dkv.block_n) * spec.num_kv_heads * spec.batch
    return [
        first,
        _launch(attn_dq_kernel, _tiles(spec.q_len, for_dq.block_m) * heads, spec, of_dq, for_dq),
        _launch(attn_dkv_kernel, kv_programs, spec, of_dkv, for_dkv),
    ]


def _launch(kernel: Any, programs: int, spec: AttnSpec, args: tuple, config: TileConfig) -> Launch:
    """What the attention kernels share: mask, score, normaliser, widths, tiles, precision."""
    rules, mask_args = masks.lower(spec)
    full = spec.dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest"
    options = {
        "MASK": rules,
        "SCORE": SCORES[type(spec.score).__name__],
        "NORMALIZER": NORMALIZERS[type(spec.normalizer).__name__],
        "HEAD_DIM": spec.head_dim,
        "BLOCK_D": _wide(spec.head_dim),
        "HEAD_DIM_V": spec.head_dim_v,
        "BLOCK_DV": _wide(spec.head_dim_v),
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "PRECISION": "ieee" if full else "tf32",
        "BF16_BY_HAND": INTERPRETED and spec.dtype == torch.bfloat16,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }
    return Launch(kernel, programs, (*args, mask_args), options)


def _strides(*tensors: Tensor) -> tuple[tuple[int, ...], ...]:
    return tuple(tensor.stride() for tensor in tensors)


def _tiles(length: int, block: int) -> int:
    return triton.cdiv(length, block)


def _wide(dim: int) -> int:
    """The tile's width for a head: a power of two, and what a matrix product needs at least."""
    return max(triton.next_power_of_2(dim), MIN_DOT)


MIN_DOT = 16
