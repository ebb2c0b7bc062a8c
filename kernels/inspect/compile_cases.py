"""The calls that kernels are compiled for where there is no GPU: each case turns on what compiles to other code."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from fastattn.masks import Causal, Chunked, Dense, Full, Lengths, Mask, Prefix, Segments, Window
from fastattn.masks.paged import Paged
from fastattn.spec import AttnInputs, AttnSpec

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
FORWARD = ("fwd", "short", "decode", "merge")
WALKING = ("fwd", "dq", "dkv")


@dataclass(frozen=True)
class CompileCase:
    """A call that kernels are compiled for, and those of its kernels that are compiled."""

    kernels: tuple[str, ...] = (*FORWARD, "delta", "dq", "dkv", "dbias")
    rows: str = "all"  # of the tile table that `table_plan` compiles in this case: all, sm90 (its half precision), fp32
    mask: Callable[[], Mask] = Full
    batch: int = 2
    num_heads: int = 8
    num_kv_heads: int = 8
    q_len: int = 4096
    kv_len: int = 4096
    bias: bool = False
    sinks: bool = False
    softcap: float | None = None
    dropout_p: float = 0.0
    block_size: int | None = None  # keys and values in blocks of so many tokens
    float32: str = "highest"  # as torch.set_float32_matmul_precision has it


def _zeros(*shape: int, of: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.zeros(shape, dtype=of)


def _spans() -> Mask:
    """Each rule that is walked in closed form, and an OR."""
    return (
        Causal(offset=_zeros(2, of=torch.int64))
        & Window(8, None)
        & Window(None, 8, offset=_zeros(2))
        & Chunked(64, 1, offset=_zeros(2))
        & Lengths(_zeros(2), _zeros(2), _zeros(2))
        & Segments(_zeros(2, 4096), _zeros(2, 4096), sorted=True)
    ) | Prefix(_zeros(2))


def _lists() -> Mask:
    """The rules that need block lists."""
    return Dense(_zeros(4096, 4096, of=torch.bool)) & Segments(_zeros(2, 4096), _zeros(2, 4096))


BARE = CompileCase()
EVERYTHING: dict[str, Any] = {"mask": _spans, "bias": True, "sinks": True, "softcap": 30.0, "dropout_p": 0.1}
SHORT = replace(BARE, kernels=FORWARD, q_len=8, num_kv_heads=1)
SHORT_EVERYTHING = EVERYTHING | {"mask": lambda: Causal() & Lengths(_zeros(2)) | Window(4, 4)}
DECODE = replace(SHORT, q_len=1)
COMPILE_CASES = {
    "bare": BARE,
    "every-feature": replace(BARE, **EVERYTHING),
    "bias": replace(BARE, kernels=("dbias",), bias=True),
    "short": SHORT,
    "short-every-feature": replace(SHORT, **SHORT_EVERYTHING),
    "decode": DECODE,
    "decode-every-feature": replace(DECODE, **SHORT_EVERYTHING),
    "decode-in-blocks": replace(DECODE, rows="sm90", mask=lambda: Lengths(_zeros(2)), block_size=16),
    "causal": replace(BARE, kernels=WALKING, rows="sm90", mask=Causal),
    "spans": replace(BARE, kernels=WALKING, mask=_spans, sinks=True, softcap=30.0),
    "lists": replace(BARE, kernels=WALKING, rows="sm90", mask=_lists),
    "one-token": CompileCase(rows="sm90", mask=Causal, batch=1, num_heads=1, num_kv_heads=1, q_len=1, kv_len=1),
    "tf32": replace(BARE, kernels=WALKING, rows="fp32", float32="high"),
}
"""Nothing hidden; all at once; a bias for its gradient alone; few queries; one; one with a paged cache; the commonest
mask; all that takes no tables and no dropout; block lists; sizes of 1 (Triton makes constants of them, which its
interpreter does not); float32 multiplied the other way."""


def call(case: CompileCase, head_dim: int, dtype: torch.dtype, device: str = "meta") -> tuple[AttnSpec, AttnInputs]:
    """The case as a spec and tensors, zeros of a device or without memory."""
    with torch.device(device):
        return _call(case, head_dim, dtype)


def _call(case: CompileCase, head_dim: int, dtype: torch.dtype) -> tuple[AttnSpec, AttnInputs]:
    mask, keys = case.mask(), (case.batch, case.num_kv_heads, case.kv_len, head_dim)
    if case.block_size is not None:
        blocks = case.kv_len // case.block_size
        mask = Paged(mask, _zeros(case.batch, blocks), case.block_size)
        keys = (case.batch * blocks, case.num_kv_heads, case.block_size, head_dim)
    inputs = AttnInputs(
        _zeros(case.batch, case.num_heads, case.q_len, head_dim, of=dtype),
        _zeros(*keys, of=dtype),
        _zeros(*keys, of=dtype),
        _zeros(case.batch, case.num_heads, case.q_len, case.kv_len, of=dtype) if case.bias else None,
        _zeros(case.num_heads, of=torch.float32) if case.sinks else None,
        _zeros(1, of=torch.int64) if case.dropout_p else None,
    )
    return AttnSpec.of(inputs, mask=mask, softcap=case.softcap, dropout_p=case.dropout_p), inputs
