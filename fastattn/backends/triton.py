"""The adapter of the Triton backend: what it can do, and the way in. Imports triton only when it is about to run."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import os
import sys
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType

import torch
from torch import Tensor

from fastattn import low_parts
from fastattn.backends.inputs import Gradients, readable
from fastattn.low_parts import NONE, LowParts
from fastattn.spec import AttnInputs, AttnSpec

OLDEST = (3, 6)
READS_BLOCKS = True
HAS_BACKWARD = True
READS_BLOCKS_BACKWARD = False
LOOKS_AT_STORAGE = False
ROUNDS_LSE: str | None = (
    "its backward has lse as a float32 rounds it, and beside large scores its weights are off by that (docs/triton.md)"
)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
WITHOUT_INTERVAL = ("Segments", "Dense")  # masks with a rule that is none
MAX_HEAD_DIM = 512
MAX_LEN = 2**28  # the sum of a position, an offset and a tile fits an int32, and so does an opaque one
SMALLEST_CAPABILITY = (8, 0)
WIDE_FLOAT32 = (256, 163 * 1024)  # float32 gradients of wider heads need this much shared memory, in bytes


def why_not(spec: AttnSpec) -> str | None:
    """The first reason why this backend cannot run the call, as a sentence; None if it can."""
    if spec.device.type != "cuda" and not (spec.device.type == "cpu" and _interpreting()):
        return (
            f"the tensors are on {spec.device.type}, and Triton runs on CUDA devices "
            "(on the CPU only in its interpreter, with TRITON_INTERPRET=1)"
        )
    return _missing(_interpreting()) or _device_reason(spec) or _feature_reason(spec)


def prepare(spec: AttnSpec, *, by_name: bool = False) -> str | None:
    """As `why_not`: Triton compiles while it runs."""
    return why_not(spec)


def why_not_backward(spec: AttnSpec) -> str | None:
    """The first reason why the backward of a call that `why_not` lets pass cannot run."""
    width, needed = WIDE_FLOAT32
    if spec.device.type == "cpu" or spec.dtype != torch.float32 or max(spec.head_dim, spec.head_dim_v) <= width:
        return None
    has = torch.cuda.get_device_properties(spec.device).shared_memory_per_block_optin  # type: ignore[attr-defined]
    if has >= needed:
        return None
    return (
        f"float32 gradients at head_dim above {width} need {needed // 1024} KiB of shared memory a block, "
        f"the device has {has // 1024}; bfloat16 and float16 need less"
    )


def needs_asking(spec: AttnSpec) -> str | None:
    """The interpreter works for whoever asks for it by name only."""
    return "Triton's interpreter is slow and runs only with backend='triton'" if spec.device.type == "cpu" else None


def notes(spec: AttnSpec, inputs: AttnInputs) -> list[str]:
    """Nothing is to be said of a verdict that names this backend."""
    return []


def kernel_name(spec: AttnSpec) -> str:
    """The kernels of the forward."""
    return "attn_fwd"


def kernel_name_backward(spec: AttnSpec) -> str:
    """The kernels of the backward."""
    return "attn_delta, attn_dq, attn_dkv" + (", attn_dbias" if spec.bias_shape is not None else "")


def forward(spec: AttnSpec, inputs: AttnInputs) -> tuple[Tensor, Tensor]:
    """out [batch, num_heads, q_len, head_dim_v], lse [batch, num_heads, q_len] float32."""
    launch, run = _kernels()
    inputs = readable(inputs)
    out, lse = spec.empty_out(inputs.query), spec.empty_lse(inputs.query)
    with _on(spec.device):
        run.forward(spec, inputs, out, lse, launch.target_for(spec.device))
    return out, lse


def forward_with_low(spec: AttnSpec, inputs: AttnInputs) -> tuple[Tensor, Tensor, LowParts]:
    """out and lse; what their rounding takes is not kept."""
    return low_parts.not_kept(spec, *forward(spec, inputs))


def backward(
    spec: AttnSpec,
    inputs: AttnInputs,
    out: Tensor,
    lse: Tensor,
    d_out: Tensor,
    d_lse: Tensor | None,
    *,
    wants_dbias: bool = True,
    low: LowParts = NONE,
) -> Gradients:
    """dq, dk, dv, dbias, dsinks in their inputs' shapes and dtypes; no dbias where nobody wants it."""
    launch, run = _kernels()
    inputs, d_out = readable(inputs), d_out.resolve_neg()
    d_lse = None if d_lse is None else d_lse.resolve_neg().contiguous()
    dq, dk, dv = (torch.empty_like(each) for each in inputs[:3])
    target = launch.target_for(spec.device)
    dbias = launch.empty_dbias(spec, inputs.bias) if inputs.bias is not None and wants_dbias else None
    dsinks = None if inputs.sinks is None else launch.empty_dsinks(spec, inputs.sinks, target)
    terms = launch.empty_terms(spec, lse)
    tensors = launch.Backward(out, lse, d_out, d_lse, *terms, dq, dk, dv, dbias, dsinks)
    with _on(spec.device):
        run.backward(spec, inputs, tensors, target)
    if inputs.sinks is not None and dsinks is not None:
        dsinks = dsinks.sum((0, 2)).to(inputs.sinks.dtype)
    if inputs.bias is not None and dbias is not None:
        if dbias.shape != inputs.bias.shape:
            dbias = dbias.sum_to_size((1,) * (4 - inputs.bias.dim()) + inputs.bias.shape).reshape(inputs.bias.shape)
        dbias = dbias.to(inputs.bias.dtype)
    return dq, dk, dv, dbias, dsinks


def weights(
    spec: AttnSpec, inputs: AttnInputs, lse: Tensor | None, rows: Tensor | None, *, mean: bool
) -> Tensor | None:
    """None: the plain formulation computes them."""
    return None


@functools.cache
def _kernels() -> tuple[ModuleType, ModuleType]:
    """kernels.host.launch and kernels.host.run, which import triton."""
    from fastattn.kernels.host import launch, run

    return launch, run


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _missing(interpreting: bool) -> str | None:
    """What the installation lacks."""
    if importlib.util.find_spec("triton") is None:
        hint = "pip install 'fastattn[triton]'" if sys.platform == "linux" else "Triton exists for Linux only"
        return f"the package triton is not installed ({hint})"
    version = importlib.metadata.version("triton")
    if _numbers(version) < OLDEST:
        return f"triton {version} is too old, {'.'.join(map(str, OLDEST))} or newer is needed"
    if interpreting and _numbers(version) < (3, 7) and _numbers(importlib.metadata.version("numpy")) >= (2, 4):
        return f"the interpreter of triton {version} needs numpy below 2.4"
    return None


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2])


def _device_reason(spec: AttnSpec) -> str | None:
    launch = sys.modules.get("fastattn.kernels.host.launch")
    if launch is not None and _interpreting() != launch.INTERPRETED:
        return "TRITON_INTERPRET has changed since the kernels were loaded; set it before the first call"
    if spec.device.type == "cpu":
        return None
    if _interpreting():
        return "TRITON_INTERPRET=1 is set, and the interpreter works on CPU tensors"
    capability = _capability(spec.device.index)
    if capability < SMALLEST_CAPABILITY:
        return f"the device has compute capability {capability[0]}.{capability[1]}, 8.0 or newer is needed"
    return None


@functools.cache
def _capability(index: int | None) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def _feature_reason(spec: AttnSpec) -> str | None:
    if spec.dtype not in DTYPES:
        return f"dtype {spec.dtype} has no kernel; float16, bfloat16 and float32 have"
    for mask in spec.mask.atoms():
        if not mask.is_interval and type(mask).__name__ not in WITHOUT_INTERVAL:
            return f"mask {type(mask).__name__} has neither a Triton rule nor an interval; `Dense` of its table has one"
    if max(spec.q_len, spec.kv_len) > MAX_LEN:
        return f"length {max(spec.q_len, spec.kv_len)} is above {MAX_LEN}"
    if max(spec.head_dim, spec.head_dim_v) > MAX_HEAD_DIM:
        return f"head_dim {max(spec.head_dim, spec.head_dim_v)} is above {MAX_HEAD_DIM}"
    return None


def _on(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on the current device."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)
