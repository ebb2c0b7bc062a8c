"""Masks of torch's own taken as masks of this library: a bool tensor, CausalBias, FlexAttention's BlockMask.

They are known by name: torch.nn.attention.bias and torch.nn.attention.flex_attention import torch._dynamo, which nobody
who has none of their objects should pay for.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, MutableMapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from fastattn import tracing
from fastattn.masks.blocks import Grid, classify
from fastattn.masks.kinds import Causal, Dense, Full, Mask

MOST_TRIED = 2**24
"""Pairs of queries and keys, up to which a rule that was read is held against the function that it was read from."""


class _Reading(NamedTuple):
    """What a BlockMask said, and what that was read from: its function, and the state of each tensor that it read."""

    mask: Mask
    mask_mod: Any
    tensors: list[Tensor]
    states: list[int | Tensor]

    def holds(self, mask: Any) -> bool:
        """Whether reading it again would give the same."""
        return mask.mask_mod is self.mask_mod and all(map(_unchanged, self.tensors, self.states))


_READ: weakref.WeakKeyDictionary[Any, _Reading] = weakref.WeakKeyDictionary()
"""Of each BlockMask, so that layers which share one read it once."""


def as_mask(mask: object, query: Tensor, key: Tensor) -> Mask:
    """What a call's `mask` says.

    Args:
        mask: None, a Mask, a bool tensor, a CausalBias or a BlockMask.
        query: [batch, num_heads, q_len, head_dim].
        key: [batch, num_kv_heads, kv_len, head_dim].

    Raises:
        TypeError: something else.
        ValueError: a mask of torch's that was made for other lengths.
    """
    if mask is None:
        return Full()
    if isinstance(mask, Mask):
        return mask
    if is_causal_bias(mask):
        return of_causal_bias(mask, query.shape[2], key.shape[2])
    if isinstance(mask, Tensor):
        return Dense(mask)
    if is_block_mask(mask):
        return of_block_mask(mask, query.shape[2], key.shape[2])
    if isinstance(mask, type) and issubclass(mask, Mask):
        raise TypeError(f"mask: the class {mask.__name__} itself is none; {mask.__name__}(...) makes one")
    raise TypeError(
        "mask: a fastattn.masks.Mask, a bool tensor (True = attend), or torch's CausalBias or BlockMask is needed, got "
        f"{type(mask).__name__}"
    )


def is_causal_bias(mask: object) -> bool:
    """Whether it is a torch.nn.attention.bias.CausalBias."""
    return type(mask).__name__ == "CausalBias" and isinstance(mask, Tensor)


def of_causal_bias(bias: Any, q_len: int, kv_len: int) -> Mask:
    """The causal mask that a CausalBias stands for."""
    if bias.variant.name == "UPPER_LEFT" or bias.seq_len_q == bias.seq_len_kv:
        return Causal(align="top-left")
    if (bias.seq_len_q, bias.seq_len_kv) != (q_len, kv_len):
        raise ValueError(
            f"attn_mask: the causal bias was made for {bias.seq_len_q} queries and {bias.seq_len_kv} keys, "
            f"got {q_len} and {kv_len}"
        )
    return Causal(align="bottom-right")


def is_block_mask(mask: object) -> bool:
    """Whether it is a torch.nn.attention.flex_attention.BlockMask itself."""
    kind = type(mask)
    return kind.__name__ == "BlockMask" and kind.__module__ == "torch.nn.attention.flex_attention"


def of_block_mask(mask: Any, q_len: int, kv_len: int) -> Mask:
    """The mask that a BlockMask stands for: its mask_mod, in the blocks that it lists.

    A mask_mod that compares positions, or numbers looked up by them, is read as a rule (a window, chunks, equal ids) if
    the blocks agree with it. Any other is a Python function of indices that no kernel here can call: it becomes a bool
    table [batch or 1, num_heads or 1, q_len, kv_len]. Either is found once for each BlockMask, with one look at the
    device, and again when mask_mod was exchanged or a tensor that it read written to (a number or a name that it refers
    to is taken for what it was); while a compiler traces, it is the table.

    Raises:
        ValueError: it was made for other lengths.
    """
    if tuple(mask.seq_lengths) != (q_len, kv_len):
        raise ValueError(
            f"mask: the BlockMask was made for {mask.seq_lengths[0]} queries and {mask.seq_lengths[1]} keys, got "
            f"{q_len} and {kv_len}; make one for these lengths"
        )
    if tracing.being_transformed():
        return _table(mask, mask.mask_mod, q_len, kv_len)
    known = _READ.get(mask)
    if known is None or not known.holds(mask):
        noting = _Noting()
        mask_mod = noting.over(mask.mask_mod)
        said = _said(mask, mask_mod, q_len, kv_len)
        states = [_state(each) for each in noting.tensors]
        known = _READ[mask] = _Reading(said, mask.mask_mod, noting.tensors, states)
    return known.mask


class _Noting(TorchFunctionMode):
    """Notes the tensors that a function reads and has not made itself."""

    def __init__(self) -> None:
        super().__init__()
        self.tensors: list[Tensor] = []
        self.known: MutableMapping[Tensor, None] = WeakIdKeyDictionary()  # noted, or made by the function

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        for each in _tensors((args, kwargs)):
            if each not in self.known:
                self.known[each] = None
                self.tensors.append(each)
        result = func(*args, **(kwargs or {}))
        for each in _tensors(result):
            self.known[each] = None
        return result

    def over(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A mask_mod, watched."""

        def watched(batch: Any, head: Any, q_idx: Any, kv_idx: Any) -> Any:  # torch counts the arguments
            with self:
                return function(batch, head, q_idx, kv_idx)

        return watched


def _tensors(tree: Any) -> list[Tensor]:
    """Those in nested containers whose memory is their own: none that a transform has wrapped."""
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor
    return [each for each in tree_leaves(tree) if isinstance(each, Tensor) and not wrapped(each)]


def _state(tensor: Tensor) -> int | Tensor:
    """What tells whether a tensor was written to: its version, or its numbers where torch counts none."""
    return tensor.clone() if tensor.is_inference() else tensor._version


def _unchanged(tensor: Tensor, state: int | Tensor) -> bool:
    return tensor._version == state if isinstance(state, int) else torch.equal(tensor, state)


def _said(mask: Any, mask_mod: Callable[..., Any], q_len: int, kv_len: int) -> Mask:
    """The rule, where there is one that says what mask_mod itself does; that is tried where it takes little."""
    rule = _rule(mask, mask_mod, q_len, kv_len)
    if rule is not None and mask.kv_num_blocks.numel() // mask.kv_num_blocks.shape[-1] * q_len * kv_len > MOST_TRIED:
        return rule
    table = _table(mask, mask_mod, q_len, kv_len)
    same = rule is not None and bool((rule.dense(q_len, kv_len, device=table.device) == table.table).all())
    return rule if rule is not None and same else table


def _rule(mask: Any, mask_mod: Callable[..., Any], q_len: int, kv_len: int) -> Mask | None:
    """mask_mod as a rule, if it can be read as one that hides what is in no block and shows what is in a full one."""
    from fastattn.masks.mask_mod import Call, Unreadable, read

    device = mask.kv_indices.device
    try:
        rule = read(mask_mod, Call(q_len, kv_len, 0, 0, device))
        block_m, block_n = mask.BLOCK_SIZE
        found = classify(rule, Grid(q_len, kv_len, block_m, block_n, device))
    except (Unreadable, NotImplementedError):
        return None
    some, full = _tiles(mask)
    wrong = (found.visit & ~(some | full)) | (full & ~found.full)
    return None if bool(wrong.any()) else rule


def _tiles(mask: Any) -> tuple[Tensor, Tensor]:
    """Which tiles are listed as partly, and which as wholly visible: bool [batch, num_heads, q tiles, kv tiles]."""
    found: list[Tensor] = []
    for counts, tiles in (
        (mask.kv_num_blocks, mask.kv_indices),
        (mask.full_kv_num_blocks, mask.full_kv_indices),
    ):
        if counts is None:
            found.append(torch.zeros_like(found[0]))
            continue
        listed = torch.arange(tiles.shape[-1], device=tiles.device) < counts[..., None]
        seen = torch.zeros(tiles.shape, dtype=torch.int32, device=tiles.device)
        found.append(seen.scatter_add(-1, tiles.long(), listed.int()) > 0)
    return found[0], found[1]


def _table(mask: Any, mask_mod: Callable[..., Any], q_len: int, kv_len: int) -> Dense:
    from torch.nn.attention.flex_attention import create_mask

    batch, num_heads = mask.kv_num_blocks.shape[:2]
    seen = create_mask(mask_mod, batch, num_heads, q_len, kv_len, device=mask.kv_indices.device)
    rows, columns = (
        torch.arange(length, device=seen.device) // size
        for length, size in zip((q_len, kv_len), mask.BLOCK_SIZE, strict=True)
    )
    some, full = (tiles[..., rows, :][..., columns] for tiles in _tiles(mask))
    return Dense(full | (some & seen))
