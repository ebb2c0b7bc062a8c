"""AttnSpec: everything about one attention problem but its numbers. Made and checked once, then read by everybody.

All shape, dtype and device checks of a call are here; masks and caches check the tensors that they are made of. The
spec crosses the operator border as primitives (`flat`, `from_flat`); the tensors travel beside it as `AttnInputs`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fastattn.dropout import check_dropout, check_number
from fastattn.masks import Mask, serialize, visible_pairs
from fastattn.masks.blocks import BlockList, Grid, block_list
from fastattn.masks.flex import as_mask
from fastattn.masks.paged import Paged
from fastattn.masks.program import MaskProgram, make_program
from fastattn.scores import DotProduct, Softmax

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MODES = ("fwd", "bwd", "fwd+bwd")


class AttnInputs(NamedTuple):
    """The tensors of one call.

    query [batch, num_heads, q_len, head_dim], key [batch, num_kv_heads, kv_len, head_dim],
    value [batch, num_kv_heads, kv_len, head_dim_v], bias broadcastable to [batch, num_heads, q_len, kv_len],
    sinks [num_heads], dropout_seed int64 [1].
    """

    query: Tensor
    key: Tensor
    value: Tensor
    bias: Tensor | None = None
    sinks: Tensor | None = None
    dropout_seed: Tensor | None = None

    def detached(self, *, requires_grad: bool = True) -> AttnInputs:
        """The same tensors as leaves of a new graph."""
        return self._over(lambda each: each.detach().requires_grad_(requires_grad))

    def double(self) -> AttnInputs:
        """The same numbers in float64."""
        return self._over(lambda each: each.detach().double())

    def resolved(self) -> AttnInputs:
        """The same numbers for who reads memory: torch marks negated views and leaves their memory alone."""
        return self._over(Tensor.resolve_neg)

    def _over(self, change: Callable[[Tensor], Tensor]) -> AttnInputs:
        query, key, value, bias, sinks = (None if each is None else change(each) for each in self[:5])
        return AttnInputs(query, key, value, bias, sinks, self.dropout_seed)  # type: ignore[arg-type]

    @property
    def differentiable(self) -> list[Tensor]:
        """Those of query, key, value, bias and sinks that are there."""
        return [each for each in self[:5] if each is not None]

    def in_place_of(self, values: Iterable[Tensor]) -> tuple[Tensor | None, ...]:
        """Spread one value for each of `differentiable` over five places, None where there is no such input."""
        rest = iter(values)
        return tuple(None if each is None else next(rest) for each in self[:5])


class FlatSpec(NamedTuple):
    """What of a spec the tensors' own shapes do not say, in types an operator schema knows."""

    mask_code: str
    mask_numbers: list[int]
    mask_tensors: list[Tensor]
    scale: float | None
    softcap: float | None
    dropout_p: float
    deterministic: bool
    needs_grad: bool


@dataclass(frozen=True, eq=False)
class AttnSpec:
    """One attention problem. Lengths in tokens; `device` and `dtype` are the query's."""

    batch: int
    num_heads: int
    num_kv_heads: int
    q_len: int
    kv_len: int
    head_dim: int
    head_dim_v: int
    dtype: torch.dtype
    device: torch.device
    mask: Mask
    scale: float
    softcap: float | None
    bias_shape: tuple[int, ...] | None
    has_sinks: bool
    dropout_p: float
    deterministic: bool
    needs_grad: bool
    score: DotProduct
    normalizer: Softmax
    pages: Paged | None = None
    """Where the keys and values lie that are in blocks; `mask` is then the one inside."""

    @classmethod
    def of(
        cls,
        inputs: AttnInputs,
        *,
        mask: Mask | Tensor | None = None,
        scale: float | None = None,
        softcap: float | None = None,
        score: object = None,
        normalizer: object = None,
        dropout_p: float = 0.0,
        deterministic: bool = True,
    ) -> AttnSpec:
        """Check one call and say what it is.

        Raises:
            TypeError: something that should be a tensor or a mask is not.
            ValueError: ranks, sizes, dtypes, devices or numbers that do not fit; the sentence names the argument.
        """
        call = _plain_call(inputs, mask, scale, softcap, (score, normalizer, dropout_p, deterministic))
        seen = None if call is None else _SEEN.get(call)
        if seen is not None:
            return seen
        _check_tensors(inputs)
        _check_hooks(score, normalizer)
        mask = as_mask(mask, inputs.query, inputs.key)
        packed = FlatSpec(*serialize.no_mask(), scale, softcap, dropout_p, deterministic, _needs_grad(inputs))
        spec = cls.from_flat(inputs, packed, mask=mask)
        _check_sizes(spec, inputs)
        _check_numbers(spec, inputs)
        if call is not None and serialize.is_plain(spec.mask):
            if len(_SEEN) >= MOST_SEEN:
                _SEEN.clear()
            _SEEN[call] = spec
        return spec

    @classmethod
    def from_flat(cls, inputs: AttnInputs, packed: FlatSpec, mask: Mask | None = None) -> AttnSpec:
        """The spec of tensors that have been checked before; `mask` saves unpacking it."""
        query, _, value, bias, sinks, _ = inputs
        batch, num_heads, q_len, head_dim = query.shape
        _, num_kv_heads, kv_len, head_dim_v = value.shape
        if mask is None:
            mask = serialize.unpack(packed.mask_code, packed.mask_numbers, packed.mask_tensors)
        pages = mask if isinstance(mask, Paged) else None
        if pages is not None:
            mask, kv_len = pages.inside, pages.kv_len
        scale = packed.scale
        if scale is None:
            scale = 1.0 / math.sqrt(head_dim) if head_dim else 1.0
        return cls(
            batch, num_heads, num_kv_heads, q_len, kv_len, head_dim, head_dim_v, query.dtype, query.device,
            mask, scale, packed.softcap, None if bias is None else tuple(bias.shape), sinks is not None,
            packed.dropout_p, packed.deterministic, packed.needs_grad, DotProduct(), Softmax(), pages,
        )  # fmt: skip

    def flat(self) -> FlatSpec:
        """The spec as primitives; `from_flat` of the same tensors brings it back."""
        mask = serialize.pack(self.pages or self.mask)
        return FlatSpec(*mask, self.scale, self.softcap, self.dropout_p, self.deterministic, self.needs_grad)

    def mask_structure(self) -> tuple[object, ...] | None:
        """All of the mask but what its tensors hold (serialize.structure)."""
        return serialize.structure(self.pages or self.mask)

    @property
    def group(self) -> int:
        """Query heads that share one key head."""
        return self.num_heads // self.num_kv_heads if self.num_kv_heads else 1

    def empty_out(self, query: Tensor) -> Tensor:
        """Uninitialised output [batch, num_heads, q_len, head_dim_v] in the query's dtype and, of the two usual
        layouts, its own.
        """
        if self.head_dim == self.head_dim_v and query.is_contiguous():
            return torch.empty_like(query)  # the usual case, and a short call's time
        batch, num_heads, q_len, _ = query.shape
        heads, length = query.stride(1), query.stride(2)
        if 0 < heads < length or (heads == length and num_heads == 1):
            return query.new_empty(batch, q_len, num_heads, self.head_dim_v).transpose(1, 2)
        return query.new_empty(batch, num_heads, q_len, self.head_dim_v)

    def empty_lse(self, query: Tensor) -> Tensor:
        """Uninitialised log-sum-exp [batch, num_heads, q_len]: float32, float64 for float64."""
        dtype = torch.float64 if self.dtype == torch.float64 else torch.float32
        return torch.empty(self.batch, self.num_heads, self.q_len, dtype=dtype, device=query.device)

    def block_list(self, block_m: int, block_n: int, *, mirror: bool = False) -> BlockList:
        """The mask's block list for tiles of block_m queries by block_n keys, on the query's device."""
        grid = Grid(self.q_len, self.kv_len, block_m, block_n, self.device)
        return block_list(self.mask, grid, mirror=mirror)

    @functools.cached_property
    def mask_program(self) -> MaskProgram:
        """The mask as the C++ backends read it (masks/program.py): made once, and read by the backward too."""
        return make_program(self.mask, self.q_len, self.kv_len)

    def visible_pairs(self) -> int:
        """(query, key) pairs that the mask shows, over batch and heads. Reads the mask's values: syncs a device."""
        return visible_pairs(self.mask, self.batch, self.num_heads, self.q_len, self.kv_len)

    def flops(self, mode: str = "fwd", *, useful: bool = False) -> int:
        """Floating-point operations of the matrix products: two forward, five backward (P, dP, dQ, dK, dV).

        `useful=False` counts all pairs, as torch's own FLOP counter does; True only those that the mask shows.
        """
        pairs = self.visible_pairs() if useful else self.batch * self.num_heads * self.q_len * self.kv_len
        forward = 2 * pairs * (self.head_dim + self.head_dim_v)
        backward = 2 * pairs * (3 * self.head_dim + 2 * self.head_dim_v)
        return _by_mode(mode, forward, backward)

    def bytes(self, mode: str = "fwd") -> int:
        """Bytes that must cross memory once: inputs and outputs of the pass, lse included; mask and bias not."""
        query = self.batch * self.num_heads * self.q_len
        keys = self.batch * self.num_kv_heads * self.kv_len
        both = query * (self.head_dim + self.head_dim_v) + keys * (self.head_dim + self.head_dim_v)
        item = self.dtype.itemsize
        # Backward reads query, key, value, out, d_out and lse; it writes dq, dk, dv.
        backward = item * (2 * both + query * self.head_dim_v) + 4 * query
        return _by_mode(mode, item * both + 4 * query, backward)


MOST_SEEN = 256
LONGEST_SEEN = 2**14  # queries: a spec may keep tables of that length
_SEEN: dict[tuple[object, ...], AttnSpec] = {}
"""The specs of plain calls by what decides them: checking a small problem takes longer than solving it."""

_PLAIN_REST = (None, None, 0.0, True)


def _plain_call(
    inputs: AttnInputs, mask: object, scale: object, softcap: object, rest: tuple[object, ...]
) -> tuple[object, ...] | None:
    """What decides the spec of a call without bias, sinks and dropout, hashable; None for any other and while tracing,
    where sizes may be symbols.
    """
    if torch.compiler.is_compiling() or rest != _PLAIN_REST:
        return None
    query, key, value, bias, sinks, seed = inputs
    if not (
        bias is None
        and sinks is None
        and seed is None
        and type(query) in _KNOWN
        and type(key) in _KNOWN
        and type(value) in _KNOWN
    ):
        return None
    if not (mask is None or type(mask) in _MASKS) or type(scale) not in _NUMBER or type(softcap) not in _NUMBER:
        return None
    if query.is_nested or key.is_nested or value.is_nested or query.shape[-2] > LONGEST_SEEN:
        return None
    return (
        query.shape, key.shape, value.shape, query.dtype, key.dtype, value.dtype,
        query.device, key.device, value.device, query.layout, key.layout, value.layout,
        _needs_grad(inputs), mask, scale, softcap,
    )  # fmt: skip


def _needs_grad(inputs: AttnInputs) -> bool:
    """Whether gradients are recorded. Asked where the call is made or traced: within an operator grad mode is off."""
    query, key, value, bias, sinks, _ = inputs
    wants = query.requires_grad or key.requires_grad or value.requires_grad
    wants = wants or (bias is not None and bias.requires_grad) or (sinks is not None and sinks.requires_grad)
    return wants and torch.is_grad_enabled()


_KNOWN = (Tensor, torch.nn.Parameter)
_NUMBER = (float, type(None))
_MASKS = frozenset(serialize.CLASSES.values())


def _by_mode(mode: str, forward: int, backward: int) -> int:
    if mode not in MODES:
        raise ValueError(f"mode: one of {MODES} is needed, got {mode!r}")
    return {"fwd": forward, "bwd": backward, "fwd+bwd": forward + backward}[mode]


def _check_tensors(inputs: AttnInputs) -> None:
    """Kinds, ranks, dtypes, devices."""
    query = inputs.query
    for name, tensor in zip(AttnInputs._fields, inputs, strict=True):
        if tensor is None and name in ("bias", "sinks", "dropout_seed"):
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: a tensor is needed, got {type(tensor).__name__}")
        if tensor.layout is not torch.strided or tensor.is_nested:
            raise ValueError(f"{name}: a dense tensor is needed, got {'nested' if tensor.is_nested else tensor.layout}")
        if tensor is not query and tensor.device != query.device:
            raise ValueError(
                f"{name}: all tensors must be on one device; query is on {query.device}, {name} on {tensor.device}"
            )
    for name, tensor in (("query", query), ("key", inputs.key), ("value", inputs.value)):
        if tensor.dim() != 4:
            raise ValueError(
                f"{name}: 4 dimensions [batch, heads, length, head_dim] are needed, got shape {list(tensor.shape)}; "
                "fastattn.scaled_dot_product_attention takes any rank"
            )
        if tensor.dtype != query.dtype:
            raise ValueError(
                f"{name}: query, key and value must share a dtype; query is {query.dtype}, {name} {tensor.dtype}"
            )
    if query.dtype not in DTYPES:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise ValueError(f"query: dtype must be one of {names}, got {query.dtype}")
    bias = inputs.bias
    if bias is not None and bias.dtype not in (torch.float32, query.dtype):
        hint = "; a bool mask goes into mask=" if bias.dtype == torch.bool else ""
        raise ValueError(f"bias: float32 or the query's dtype ({query.dtype}) is needed, got {bias.dtype}{hint}")
    if inputs.sinks is not None and not inputs.sinks.is_floating_point():
        raise ValueError(f"sinks: a floating-point tensor is needed, got {inputs.sinks.dtype}")


def _check_sizes(spec: AttnSpec, inputs: AttnInputs) -> None:
    query, key, value, bias, sinks, _ = inputs
    if spec.pages is not None:
        _check_pages(spec, key, value)
    elif not query.shape[0] == key.shape[0] == value.shape[0]:
        raise ValueError(
            "query, key, value: the batch sizes must be equal (expand with stride 0 to broadcast), "
            f"got {query.shape[0]}, {key.shape[0]}, {value.shape[0]}"
        )
    if key.shape[3] != spec.head_dim or spec.head_dim < 1 or spec.head_dim_v < 1:
        raise ValueError(
            "query, key, value: query and key need the same head_dim, and each head_dim must be at least 1, "
            f"got query {spec.head_dim}, key {key.shape[3]}, value {spec.head_dim_v}"
        )
    if key.shape[1] != value.shape[1]:
        raise ValueError(f"key, value: the numbers of heads must be equal, got {key.shape[1]} and {value.shape[1]}")
    if key.shape[2] != value.shape[2]:
        raise ValueError(f"key, value: the lengths must be equal, got key {key.shape[2]} and value {value.shape[2]}")
    if spec.num_heads and (not spec.num_kv_heads or spec.num_heads % spec.num_kv_heads):
        raise ValueError(
            "query, key: the number of query heads must be a multiple of the number of key heads, "
            f"got {spec.num_heads} and {spec.num_kv_heads}"
        )
    want = (spec.batch, spec.num_heads, spec.q_len, spec.kv_len)
    if bias is not None and (
        bias.dim() > 4 or any(have not in (1, size) for have, size in zip(bias.shape[::-1], want[::-1], strict=False))
    ):
        raise ValueError(
            f"bias: shape {list(bias.shape)} does not broadcast to [batch, num_heads, q_len, kv_len] = {list(want)}"
        )
    if sinks is not None and tuple(sinks.shape) != (spec.num_heads,):
        raise ValueError(f"sinks: one number per query head, [{spec.num_heads}], is needed, got {list(sinks.shape)}")
    for tensor in (spec.pages or spec.mask).tensors:
        if tensor.device != spec.device:
            raise ValueError(f"mask: its tensors must be on the query's device {spec.device}, got {tensor.device}")
    (spec.pages or spec.mask).check(*want)


def _check_pages(spec: AttnSpec, key: Tensor, value: Tensor) -> None:
    blocks, size = (key.shape[0], value.shape[0]), (key.shape[2], value.shape[2])
    if not blocks[0] == blocks[1] >= 1 or size != (spec.pages.block_size,) * 2:  # type: ignore[union-attr]
        raise ValueError(
            "key, value: pools [blocks, heads, block_size, head_dim] of the same blocks are needed, with block_size "
            f"{spec.pages.block_size}, got {list(key.shape)} and {list(value.shape)}"  # type: ignore[union-attr]
        )


def _check_numbers(spec: AttnSpec, inputs: AttnInputs) -> None:
    check_dropout(spec.dropout_p, inputs.dropout_seed)
    computed = torch.finfo(torch.float64 if spec.dtype == torch.float64 else torch.float32)  # what scores are kept in
    if spec.softcap is not None:
        check_number("softcap", spec.softcap, bools=False)
        if not computed.tiny <= spec.softcap <= computed.max:
            raise ValueError(
                f"softcap: a positive finite number or None is needed, {computed.tiny:.3g} to {computed.max:.3g}, "
                f"got {spec.softcap}"
            )
    check_number("scale", spec.scale, bools=False)
    if not -computed.max <= spec.scale <= computed.max:
        raise ValueError(f"scale: a finite number is needed, at most {computed.max:.3g} in size, got {spec.scale}")
    if not isinstance(spec.deterministic, bool):
        raise TypeError(f"deterministic: True or False is needed, got {spec.deterministic!r}")
    if not spec.deterministic and torch.are_deterministic_algorithms_enabled():
        raise ValueError(
            "deterministic=False: torch.use_deterministic_algorithms(True) is set, which an unordered backward would "
            "break; leave deterministic=True"
        )


def _check_hooks(score: object, normalizer: object) -> None:
    for name, given, default in (("score", score, DotProduct), ("normalizer", normalizer, Softmax)):
        if given is not None and type(given) is not default:
            raise ValueError(
                f"{name}: only {default.__name__}() (the default) is there yet, got {given!r}; "
                f"{name}= is reserved for the rest of the attention family"
            )
