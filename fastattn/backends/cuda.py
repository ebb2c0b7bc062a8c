"""The adapter of the CUDA backend: what it can do, and the way in. The library is built and loaded before it runs."""

from __future__ import annotations

import functools
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from fastattn import low_parts
from fastattn.backends.inputs import Gradients
from fastattn.building.cuda_library import LIBRARY, Operators
from fastattn.low_parts import NONE, LowParts
from fastattn.masks import program
from fastattn.masks.program import MaskProgram
from fastattn.spec import AttnInputs, AttnSpec

DTYPES = (torch.float16, torch.bfloat16)
READS_BLOCKS = True
HAS_BACKWARD = False
READS_BLOCKS_BACKWARD = False
LOOKS_AT_STORAGE = False
ROUNDS_LSE: str | None = None
CAPABILITY = (9, 0)  # Hopper: wgmma and TMA as these kernels use them are there and nowhere else
MAX_HEAD_DIM = 256
MAX_LEN = 2**28  # the sum of a position, an offset and a tile fits an int32
MOST_TERMS = 8  # of a mask that block lists are walked for; joined deepest first, they need a stack of four
LARGEST_SCALE = 8.0  # scores of larger ones are subtracted from their maximum before they become powers of two
ALIGNMENT = 8  # elements: 16 bytes, which the copy engine (TMA) wants addresses and strides to be multiples of

PLAIN, MASKED, GENERAL = 0, 1, 2  # KernelVariant of csrc/cuda/tiles.h
NO_BACKWARD = "the CUDA backend has no backward yet"
VARIANTS = ("every key visible", "intervals of keys", "every feature")


class Launch(NamedTuple):
    """What the operator is told of a spec beside its tensors."""

    variant: int
    hides: bool
    mask_program: MaskProgram
    listed: bool
    by_head: bool  # heads see different keys
    sizes: tuple[int, ...]


_KNOWN: WeakKeyDictionary[AttnSpec, Launch] = WeakKeyDictionary()
"""Of specs whose masks need no tensors: plain calls meet their spec again, and a graph would keep no table alive."""


def why_not(spec: AttnSpec) -> str | None:
    """The first reason why this backend cannot run the call, as a sentence; None if it can, after a build maybe."""
    return _spec_reason(spec) or _device_reason(spec.device) or LIBRARY.why_not()


def prepare(spec: AttnSpec, *, by_name: bool = False) -> str | None:
    """As `why_not`, just before a run: the library is there afterwards, or a sentence says why it is not."""
    return _spec_reason(spec) or _device_reason(spec.device) or LIBRARY.prepare(by_name=by_name)


def needs_asking(spec: AttnSpec) -> str | None:
    """A free choice takes it."""
    return None


def why_not_backward(spec: AttnSpec) -> str | None:
    """Nothing more than that there is none (HAS_BACKWARD)."""
    return None


def notes(spec: AttnSpec, inputs: AttnInputs) -> list[str]:
    """What is to be said of a verdict that names this backend: what a call would wait for, and what it would copy."""
    said = []
    if LIBRARY.available() is None:
        said.append("the CUDA library is not built yet: the first call builds it and waits")
    for name, tensor in zip(("query", "key", "value"), inputs[:3], strict=True):
        if type(tensor) not in (Tensor, torch.nn.Parameter) or _is_aligned(tensor, name == "query"):
            continue
        what = "all that the block table names, of" if spec.pages is not None and name != "query" else "the whole"
        said.append(
            f"each call copies {what} {name} first: the copy engine (TMA) takes columns side by side and rows at "
            f"multiples of {2 * ALIGNMENT} bytes, not strides {list(tensor.stride())}"
        )
    if spec.pages is not None and spec.pages.block_size < ALIGNMENT:
        many = f"keys lie in blocks of {spec.pages.block_size}, and each is a copy of its own"
        said.append(f"{many}; blocks of 16 or more are read faster")
    return said


def kernel_name(spec: AttnSpec) -> str:
    """The kernels of the forward."""
    return f"attention forward for Hopper ({VARIANTS[_variant(spec, _listed(spec))]})"


def kernel_name_backward(spec: AttnSpec) -> str:
    """There are none."""
    raise NotImplementedError(NO_BACKWARD)


def forward(spec: AttnSpec, inputs: AttnInputs) -> tuple[Tensor, Tensor]:
    """out [batch, num_heads, q_len, head_dim_v], lse [batch, num_heads, q_len] float32."""
    return run(LIBRARY.get(), spec, inputs)


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
    """There is none (HAS_BACKWARD)."""
    raise NotImplementedError(NO_BACKWARD)


def weights(
    spec: AttnSpec, inputs: AttnInputs, lse: Tensor | None, rows: Tensor | None, *, mean: bool
) -> Tensor | None:
    """None: the plain formulation computes them."""
    return None


def run(library: Operators, spec: AttnSpec, inputs: AttnInputs) -> tuple[Tensor, Tensor]:
    """The same with a library that is loaded: the backend's, or the simulator's."""
    out, lse = spec.empty_out(inputs.query), spec.empty_lse(inputs.query)
    if spec.kv_len == 0:
        return out.zero_(), lse.fill_(-torch.inf)
    if lse.numel() == 0:
        return out, lse
    in_place = spec.pages is not None and _is_aligned(inputs.key) and _is_aligned(inputs.value)
    if spec.pages is not None and not in_place:
        key, value = spec.pages.laid_out(inputs.key), spec.pages.laid_out(inputs.value)
        inputs = inputs._replace(key=key, value=value)
    inputs = _loadable(inputs)
    launch = _KNOWN.get(spec) or _launch(spec)
    mask = program.over_blocks(launch.mask_program, spec.pages.table) if in_place else launch.mask_program  # type: ignore[union-attr]
    tiles = library.tiles(launch.sizes, launch.variant, launch.by_head, lse.get_device())
    counts = listed = parts = part_lse = None
    taken = torch.zeros(1, dtype=torch.int32, device=lse.device) if tiles.counts else None
    if launch.listed:
        lists = spec.block_list(tiles.block_m, tiles.block_n)
        counts, listed = torch.stack([lists.checked, lists.full]), lists.tiles
    if tiles.splits > 1:
        parts = torch.empty(tiles.splits, *lse.shape, tiles.part_step, dtype=torch.float32, device=lse.device)
        part_lse = torch.empty(tiles.splits, *lse.shape, dtype=torch.float32, device=lse.device)
    library.forward(
        *inputs, *mask, spec.scale, spec.softcap or 0.0, spec.dropout_p,
        launch.variant, launch.hides, counts, listed, tiles.splits, taken, parts, part_lse, out, lse,
    )  # fmt: skip
    return out, lse


def _launch(spec: AttnSpec) -> Launch:
    found = program.make_program(spec.mask, spec.q_len, spec.kv_len, spec.device, bands=True)
    listed = _listed(spec)
    by_head = listed or any(_varies_by_head(each) for each in found.tensors)
    sizes = (spec.batch, spec.num_heads, spec.num_kv_heads, spec.q_len, spec.kv_len, spec.head_dim, spec.head_dim_v)
    launch = Launch(_variant(spec, listed), _hides(spec), found, listed, by_head, sizes)
    if not found.tensors:
        _KNOWN[spec] = launch
    return launch


def _listed(spec: AttnSpec) -> bool:
    """Whether keys are found by block lists: no one or two intervals say what each query sees."""
    return spec.mask.interval_count() is None


def _variant(spec: AttnSpec, listed: bool) -> int:
    plain = spec.softcap is None and spec.bias_shape is None and spec.dropout_p == 0 and 0 < spec.scale <= LARGEST_SCALE
    if listed or not plain:
        return GENERAL
    everything = program.band(spec.mask, spec.q_len, spec.kv_len) == (-program.UNBOUNDED, program.UNBOUNDED)
    return PLAIN if everything and spec.pages is None else MASKED


def _hides(spec: AttnSpec) -> bool:
    """Whether a key may be hidden from every query; False of a band that meets every row and every column."""
    if spec.bias_shape is not None:
        return True
    band = program.band(spec.mask, spec.q_len, spec.kv_len)
    if band is None:
        return True
    corner = spec.kv_len - spec.q_len
    return not (band[0] <= min(0, corner) and band[1] > max(0, corner))


def _varies_by_head(table: Tensor) -> bool:
    return table.dim() == 4 and table.shape[-3 if table.dtype == torch.bool else 2] > 1


def _loadable(inputs: AttnInputs) -> AttnInputs:
    """As the kernels read memory: no negated views, strides that TMA takes, sinks float32 and side by side."""
    query, key, value, bias, sinks, seed = inputs
    if bias is None and sinks is None and _is_aligned(query, True) and _is_aligned(key) and _is_aligned(value):
        return inputs
    if bias is not None:
        bias = bias.resolve_neg()
    if sinks is not None:
        sinks = sinks.resolve_neg().float().contiguous()
    return AttnInputs(_aligned(query, True), _aligned(key, False), _aligned(value, False), bias, sinks, seed)


def _aligned(tensor: Tensor, is_query: bool) -> Tensor:
    """The tensor, or a copy of it."""
    if _is_aligned(tensor, is_query):
        return tensor
    width = -(-tensor.shape[3] // ALIGNMENT) * ALIGNMENT
    return tensor.new_empty(*tensor.shape[:3], width)[..., : tensor.shape[3]].copy_(tensor)


def _is_aligned(tensor: Tensor, is_query: bool = False) -> bool:
    """Whether TMA takes it. All of a batch, and of the keys' heads, may be one and the same (stride 0)."""
    batch, heads, rows, step = tensor.stride()
    if step != 1 or tensor.data_ptr() % (2 * ALIGNMENT) or tensor.is_neg():
        return False
    if rows and (heads or not is_query) and not (batch | heads | rows) % ALIGNMENT:
        return True
    sizes = tensor.shape
    fits = all(size == 1 or not each % ALIGNMENT for size, each in zip(sizes, (batch, heads, rows), strict=False))
    return fits and (sizes[2] == 1 or rows > 0) and not (is_query and sizes[1] > 1 and heads == 0)


def _spec_reason(spec: AttnSpec) -> str | None:
    if spec.device.type != "cuda":
        return f"the tensors are on {spec.device.type}, and this backend runs on NVIDIA GPUs"
    return feature_reason(spec)


def feature_reason(spec: AttnSpec) -> str | None:
    """What of a call the kernels cannot do, wherever its tensors are."""
    if spec in _KNOWN:  # it has run
        return None
    if spec.dtype not in DTYPES:
        return f"dtype {spec.dtype} has no kernel; float16 and bfloat16 have"
    if max(spec.head_dim, spec.head_dim_v) > MAX_HEAD_DIM:
        return f"head_dim {max(spec.head_dim, spec.head_dim_v)} is above {MAX_HEAD_DIM}"
    if spec.pages is not None and (spec.head_dim % ALIGNMENT or spec.head_dim_v % ALIGNMENT):
        return (
            f"heads of {spec.head_dim} and {spec.head_dim_v} in blocks are not read in place here: the copy engine "
            f"takes rows of whole {ALIGNMENT} elements"
        )
    if max(spec.q_len, spec.kv_len) > MAX_LEN:
        return f"length {max(spec.q_len, spec.kv_len)} is above {MAX_LEN}"
    if _listed(spec) and len(spec.mask.atoms()) > MOST_TERMS:
        return f"the mask is made of {len(spec.mask.atoms())} masks, at most {MOST_TERMS} can be joined"
    return program.why_not(spec.mask)


@functools.cache
def _device_reason(device: torch.device) -> str | None:
    if torch.version.hip is not None:
        return "this torch is for AMD GPUs, and this backend runs on NVIDIA's"
    if not torch.cuda.is_available():
        return "torch sees no NVIDIA GPU here"
    capability = torch.cuda.get_device_capability(device)
    if capability == CAPABILITY:
        return None
    has = ".".join(map(str, capability))
    return (
        f"the device has compute capability {has}, and these kernels are for {CAPABILITY[0]}.{CAPABILITY[1]} (Hopper)"
    )
