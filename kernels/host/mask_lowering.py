"""The spec's mask as a kernel takes it: which rules, how they combine, what they read, and what is walked.

A mask is a tree of atoms under `&` and `|`. Its atoms become rules (masks.RULES), the tree a postfix program over
them. For the walk the tree is also written as an OR of ANDs: where that has at most two terms and every rule has spans,
kernels walk the terms' spans, in closed form; else block lists, made on the tensors' device, without a host sync.
"""

import threading
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastattn.kernels.opaque_int import opaque, opaque_strides
from fastattn.kernels.rules.masks import AND, OR, RULES, UNBOUNDED
from fastattn.spec import AttnSpec

MOST_TERMS = 2


class LoweredMask(NamedTuple):
    """A mask's part of a kernel's variant, and its arguments."""

    rules: tuple[str, ...]  # in masks.RULES
    program: tuple[int, ...]
    terms: tuple[tuple[int, ...], ...]  # none: block lists are walked
    hides: bool  # whether a query may see nothing, or a key be seen by nobody
    by_head: bool  # whether heads see different keys
    args: tuple


def lower(spec: AttnSpec) -> LoweredMask:
    """The rules, program, terms and arguments of the spec's mask."""
    names: list[str] = []
    args: list[tuple] = []
    program: list[int] = []

    def visit(mask: Any) -> list[tuple[int, ...]]:
        """The terms of a subtree; its program is appended."""
        name = type(mask).__name__
        if name in ("And", "Or"):
            left, right = visit(mask.left), visit(mask.right)
            program.append((AND if name == "And" else OR).value)
            terms = [a + b for a in left for b in right] if name == "And" else left + right
            return terms[: MOST_TERMS + 1]  # one too many already says: lists
        if name in ARGUMENTS and not (name == "Segments" and mask.sorted):
            args.append(ARGUMENTS[name](mask, spec))
        else:
            name = "Rows"
            args.append(_rows(mask, spec))
        names.append(name)
        program.append(len(names) - 1)
        return [(len(names) - 1,)]

    mask = _without_full(spec.mask)
    terms = [()] if _is_full(mask) else visit(mask)
    spans = len(terms) <= MOST_TERMS and all(RULES[name].kv_span is not None for name in names)
    return LoweredMask(
        tuple(names),
        tuple(program),
        tuple(terms) if spans else (),
        _hides(names, args, spec),
        _by_head(names, args),
        tuple(args),
    )


def _without_full(mask: Any) -> Any:
    """The same mask without Full below an And or an Or."""
    name = type(mask).__name__
    if name not in ("And", "Or"):
        return mask
    left, right = _without_full(mask.left), _without_full(mask.right)
    for one, other in ((left, right), (right, left)):
        if _is_full(one):
            return other if name == "And" else one
    return type(mask)(left, right)


def _is_full(mask: Any) -> bool:
    return type(mask).__name__ == "Full"


def _hides(names: list[str], args: list[tuple], spec: AttnSpec) -> bool:
    """False where all queries surely see something and all keys are seen: a band low <= key - query <= high of placed
    masks, all of them in one AND, that meets every row and column.
    """
    if not set(names) <= {"Causal", "Window"} or type(spec.mask).__name__ == "Or":
        return True
    if any(offsets is not None for _, _, offsets in args):
        return True
    # Opaque numbers keep their order.
    low = max((each for each, _, _ in args if each is not None), default=opaque(-UNBOUNDED.value))
    high = min((each for _, each, _ in args if each is not None), default=opaque(UNBOUNDED.value))
    corner = opaque(spec.kv_len - spec.q_len)
    return not (low <= min(opaque(0), corner) and high >= max(opaque(0), corner))


def _by_head(names: list[str], args: list[tuple]) -> bool:
    """The strides of heads are 0 where one table serves all."""
    strides = {"Rows": lambda of: of[3][1] != opaque(0), "Dense": lambda of: of[0].stride(1) != 0}
    return any(strides[name](each) for name, each in zip(names, args, strict=True) if name in strides)


class Lists(NamedTuple):
    """Block lists as a kernel walks them, int32: `counts` [2, batch, heads, tiles] checked and full tiles, `tiles`
    [batch, heads, tiles, others] those tiles, the checked ones first. Strides of batch and heads are 0 where one
    serves all.
    """

    counts: Tensor
    tiles: Tensor
    count_strides: tuple[int, int, int]  # of batch, heads, and from the checked to the full ones
    tile_strides: tuple[int, int]


def block_lists(spec: AttnSpec, block_m: int, block_n: int, *, mirror: bool) -> Lists:
    """For each tile of queries the tiles of keys to visit; with `mirror` for each tile of keys those of queries."""
    sizes = spec.q_len, spec.kv_len, block_m, block_n, mirror
    return _remembered(spec.mask, sizes, spec.device, lambda: _block_lists(spec, block_m, block_n, mirror))


def _block_lists(spec: AttnSpec, block_m: int, block_n: int, mirror: bool) -> Lists:
    lists = spec.block_list(block_m, block_n, mirror=mirror)
    counts = torch.stack([lists.checked, lists.full])
    batch, heads, rows, others = lists.tiles.shape
    steps = int(batch > 1), int(heads > 1)
    return Lists(
        counts,
        lists.tiles,
        tuple(map(opaque, (steps[0] * heads * rows, steps[1] * rows, batch * heads * rows))),
        tuple(map(opaque, (steps[0] * heads * rows * others, steps[1] * rows * others))),
    )


_MADE: weakref.WeakKeyDictionary[Any, dict[tuple, tuple[list[int], Any]]] = weakref.WeakKeyDictionary()
"""By mask, then by sizes and stream: what was made of its tensors, and their versions then."""


_LOCK = threading.Lock()
MOST_MADE = 8
"""Of one mask: a few layers' sizes. A mask that outlives many lengths must not keep a table for each."""


def _remembered(mask: Any, sizes: tuple, device: torch.device, make: Callable[[], Any]) -> Any:
    """What `make` makes of a mask's tensors, once for all layers and passes that share the mask, as long as nobody
    writes into them. A CUDA graph makes it anew at each replay.
    """
    tensors = mask.tensors
    if torch.compiler.is_compiling() or any(tensor.is_inference() for tensor in tensors):
        return make()
    stream = None
    if device.type == "cuda":
        if torch.cuda.is_current_stream_capturing():
            return make()
        stream = torch.cuda.current_stream(device).cuda_stream
    made, versions = _MADE.setdefault(mask, {}), [tensor._version for tensor in tensors]
    place = sizes, device, stream
    found = made.get(place)
    if found is None or found[0] != versions:
        found = versions, make()
        with _LOCK:  # masks that are equal by value share this, whoever's they are
            while len(made) >= MOST_MADE:
                del made[next(iter(made))]
            made[place] = found
    return found[1]


def _placed(mask: Any, spec: AttnSpec, left: int | None, right: int | None) -> tuple:
    """low, high, offsets [batch] or None. A fixed offset is in the bounds already."""
    at, offsets = _offset(mask, spec)
    low, high = None if left is None else near(at - left), None if right is None else near(at + right)
    return *(None if bound is None else opaque(bound) for bound in (low, high)), offsets


def _offset(mask: Any, spec: AttnSpec) -> tuple[int, Tensor | None]:
    """A placed mask's offset as a number (0 where it is a tensor) and as a tensor [batch]."""
    if isinstance(mask.offset, Tensor):
        return 0, _per_batch(mask.offset, spec)
    if mask.offset is None:
        return spec.kv_len - spec.q_len if mask.align == "bottom-right" else 0, None
    return mask.offset, None


def _chunked(mask: Any, spec: AttnSpec) -> tuple:
    """size, chunks back and ahead, offset, offsets. Whole chunks of a fixed offset move the chunks, not the queries:
    both may be far larger than a kernel's numbers.
    """
    at, offsets = _offset(mask, spec)
    whole, at = divmod(at, mask.size)
    size = min(mask.size, UNBOUNDED.value)
    if size < mask.size:  # no key is beyond its first chunk; what matters is where the queries leave theirs
        at = max(0, size - (mask.size - at))
    back = UNBOUNDED.value if mask.left_chunks is None else near(mask.left_chunks - whole)
    ahead = UNBOUNDED.value if mask.right_chunks is None else near(mask.right_chunks + whole)
    return *map(opaque, (size, back, ahead, at)), offsets


def _rows(mask: Any, spec: AttnSpec) -> tuple:
    """The table of a mask with an interval."""
    return _remembered(mask, (spec.q_len, spec.kv_len), spec.device, lambda: _row_table(mask, spec))


def _row_table(mask: Any, spec: AttnSpec) -> tuple:
    """starts and stops [batch, heads, q_len], bounds [batch, heads, 4, kv_len], their strides of batch and heads.

    The bounds mirror the table: for key j, the first query that may see it, the first from which on all see beyond it,
    the first that no longer starts at it or before, and the first from which on none does. In a table whose starts and
    stops never decrease they are exact; in any other one they show too much and call too little full.
    """
    [(start, stop)] = mask.intervals(spec.q_len, spec.kv_len, spec.device)
    start, stop = torch.broadcast_tensors(start, stop)
    start, stop = (each.clamp(0, spec.kv_len)[(None,) * (3 - each.dim())] for each in (start, stop))
    start, stop = (each.expand(-1, -1, spec.q_len) for each in (start, stop))
    nothing = start >= stop
    start, stop = start.masked_fill(nothing, spec.kv_len), stop.masked_fill(nothing, 0)
    batch, heads = start.shape[:2]
    keys = torch.arange(spec.kv_len, device=spec.device).expand(batch, heads, -1).contiguous()
    beyond = _least_after(stop.masked_fill(nothing, spec.kv_len))
    edges = (stop.cummax(-1)[0], beyond, start.cummax(-1)[0], _least_after(start)) if spec.q_len else (stop,) * 4
    bounds = torch.stack([torch.searchsorted(edge.contiguous(), keys, right=True) for edge in edges], 2)
    start, stop, bounds = (each.to(torch.int32).contiguous() for each in (start, stop, bounds))
    steps = (heads if batch > 1 else 0), (1 if heads > 1 else 0)
    rows, keys = (tuple(opaque(n * length) for n in steps) for length in (spec.q_len, 4 * spec.kv_len))
    return start, stop, bounds, rows, keys


def _least_after(rows: Tensor) -> Tensor:
    return rows.flip(-1).cummin(-1)[0].flip(-1) if rows.shape[-1] else rows


def _segments(mask: Any, spec: AttnSpec) -> tuple:
    """ids of queries and keys, their batch strides."""
    queries, keys = mask.q_ids.contiguous(), mask.key_ids.contiguous()
    return queries, keys, *(opaque(0 if each.shape[0] == 1 else each.shape[1]) for each in (queries, keys))


def _dense(mask: Any, spec: AttnSpec) -> tuple:
    """The table's bytes; its strides over [batch, num_heads, q_len, kv_len]."""
    table = mask.table.expand(spec.batch, spec.num_heads, spec.q_len, spec.kv_len).view(torch.uint8)
    return table, opaque_strides(table.stride())


ARGUMENTS = {
    "Causal": lambda mask, spec: _placed(mask, spec, None, 0),
    "Window": lambda mask, spec: _placed(mask, spec, mask.left, mask.right),
    "Chunked": _chunked,
    "Lengths": lambda mask, spec: tuple(
        _per_batch(each, spec) for each in (mask.kv_lengths, mask.q_lengths, mask.kv_starts)
    ),
    "Prefix": lambda mask, spec: (*_placed(mask, spec, None, 0), _per_batch(mask.lengths, spec)),
    "Segments": _segments,
    "Dense": _dense,
}
"""What each rule reads, by the mask's class name; other masks are read as row tables."""


def near(number: int) -> int:
    """A position or size no farther away than UNBOUNDED, which is beyond every length."""
    return max(-UNBOUNDED.value, min(UNBOUNDED.value, number))


def _per_batch(tensor: Tensor | None, spec: AttnSpec) -> Tensor | None:
    """[batch] with stride 1; a single entry serves all."""
    return None if tensor is None else tensor.expand(spec.batch).contiguous()
