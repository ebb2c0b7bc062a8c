"""What the benchmark times: one row an operation, sizes as lists.

Shapes and masks are here and nowhere in bench/; floating-point operations and bytes come from `AttnSpec`.
Sizes stand for real layers: the CPU's for one layer of a small encoder, the GPU's for one layer of a large decoder.
"""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from fastattn.masks import Mask
    from fastattn.testing import Case

DTYPES = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}


@dataclass(frozen=True)
class BenchCase:
    """One attention call to time: `op` names its mask, sizes are in tokens, heads and numbers a head."""

    op: str
    dtype: str
    batch: int
    num_heads: int
    num_kv_heads: int
    q_len: int
    kv_len: int
    head_dim: int
    window: int | None = None
    head_dim_v: int | None = None

    @property
    def value_dim(self) -> int:
        """Numbers a head of values and outputs; head_dim unless they differ."""
        return self.head_dim if self.head_dim_v is None else self.head_dim_v

    @property
    def sizes(self) -> str:
        """Sizes in one word, such as B1-H8/2-N1024-M4096-D64-V32-W256; /2, M, V where they differ from H, N, D."""
        heads = f"H{self.num_heads}" + (f"/{self.num_kv_heads}" if self.num_kv_heads != self.num_heads else "")
        keys = f"-M{self.kv_len}" if self.kv_len != self.q_len else ""
        window = f"-W{self.window}" if self.window is not None else ""
        values = f"-V{self.head_dim_v}" if self.value_dim != self.head_dim else ""
        return f"B{self.batch}-{heads}-N{self.q_len}{keys}-D{self.head_dim}{values}{window}"

    @property
    def name(self) -> str:
        return f"{self.op}/{self.dtype}/{self.sizes}"

    def row(self) -> Case:
        """The same call as a row of `fastattn.testing`, which makes its tensors and holds results to float64."""
        import torch

        from fastattn.testing import Case

        op, dtype = OPS[self.op], getattr(torch, DTYPES[self.dtype])
        return Case(
            self.name,
            self.q_len,
            self.kv_len,
            self.batch,
            self.num_heads,
            self.num_kv_heads,
            self.head_dim,
            self.head_dim_v,
            dtype=dtype,
            mask=lambda case, device: op.mask(self, device),
            bias=(1, self.num_heads, self.q_len, self.kv_len) if op.bias else None,
            bias_dtype=dtype,
            dropout_p=op.dropout_p,
        )


@dataclass(frozen=True)
class Op:
    """An operation: what it says to a reader, its mask, and how it bends the sizes that the caller has not named.

    `bias`: a learned table [1, num_heads, q_len, kv_len] in the inputs' dtype is added to the scores. `form`: how the
    call is written. "4-D" is `attention`'s own; "3-D" leaves the batch out, and "3-D mask" brings a bool table
    [num_heads, q_len, kv_len], both to `scaled_dot_product_attention`; "module" is `nn.MultiheadAttention` with its
    projections, asked for the weights. `tables`: for how many the mask as a bool table differs: none ("bare"), "one"
    for all, one for each item of the "batch" or each of the "heads".
    """

    says: str
    mask: Callable[[BenchCase, torch.device | str], Mask]
    bend: Callable[[BenchCase, frozenset[str]], BenchCase] = lambda case, named: case
    bias: bool = False
    dropout_p: float = 0.0
    form: str = "4-D"
    tables: str = "bare"
    modes: tuple[str, ...] = ("fwd", "bwd")


def _full(case: BenchCase, device: torch.device | str) -> Mask:
    from fastattn.masks import Full

    return Full()


def _causal(case: BenchCase, device: torch.device | str) -> Mask:
    from fastattn.masks import Causal

    return Causal()


def _padding(case: BenchCase, device: torch.device | str) -> Mask:
    """Key lengths spread evenly from half of kv_len up, a different one for each row of the batch."""
    import torch

    from fastattn.masks import Lengths

    lengths = [case.kv_len - case.kv_len * (row + 1) // (2 * case.batch) for row in range(case.batch)]
    return Lengths(torch.tensor(lengths, dtype=torch.int32, device=device))


def _window(case: BenchCase, device: torch.device | str) -> Mask:
    from fastattn.masks import Window

    return Window(left=(case.window or 1) - 1, right=0)


def _both_sides(case: BenchCase, device: torch.device | str) -> Mask:
    from fastattn.masks import Window

    return Window(left=case.window, right=case.window)


def _documents(case: BenchCase, device: torch.device | str) -> Mask:
    """Causal within documents that lie one behind the other, each half as long again as the one before."""
    import torch

    from fastattn.masks import Causal, Segments

    ids, end, share = torch.zeros(case.batch, case.kv_len, dtype=torch.int32), 0, case.kv_len / FIRST_DOCUMENT
    while end < case.kv_len:
        end, share = end + max(1, round(share)), 1.5 * share
        ids[:, end:] += 1
    queries = torch.arange(case.kv_len - case.q_len, case.kv_len).clamp(min=0)
    return Segments(ids[:, queries].to(device), ids.to(device), sorted=True) & Causal()


def _scattered(case: BenchCase, device: torch.device | str) -> Mask:
    """A bool table of every head's own in which six of ten pairs are visible, evenly drawn: no tile can be skipped."""
    import torch

    from fastattn.masks import Dense

    generator = torch.Generator().manual_seed(1)
    drawn = torch.rand(1, case.num_heads, case.q_len, case.kv_len, generator=generator)
    return Dense((drawn < 0.6).to(device))


def _one_item(case: BenchCase, named: frozenset[str]) -> BenchCase:
    return case if "batch" in named else replace(case, batch=1)


def _wide_values(case: BenchCase, named: frozenset[str]) -> BenchCase:
    return case if "head_dim_v" in named else replace(case, head_dim_v=2 * case.head_dim)


def _some_window(case: BenchCase, named: frozenset[str]) -> BenchCase:
    return replace(case, window=case.window or max(1, case.kv_len // 8))


def _twice_the_keys(case: BenchCase, named: frozenset[str]) -> BenchCase:
    return case if "kv_len" in named else replace(case, kv_len=2 * case.q_len)


def _four_to_one(case: BenchCase, named: frozenset[str]) -> BenchCase:
    return case if "num_kv_heads" in named else replace(case, num_kv_heads=max(1, case.num_heads // 4))


def _one_query(case: BenchCase, named: frozenset[str]) -> BenchCase:
    return case if {"q_len", "kv_len"} <= named else replace(case, q_len=1)


OPS = {
    "self": Op("every query sees every key", _full),
    "causal": Op("a query sees itself and what came before", _causal, tables="one"),
    "masked": Op(
        "padded batch: keys beyond each row's length are hidden",
        _padding,
        lambda case, named: case if "batch" in named else replace(case, batch=max(2, case.batch)),
        tables="batch",
    ),
    "truncated": Op(
        "sliding window: a query sees itself and the W - 1 keys before",
        _window,
        lambda case, named: replace(case, window=case.window or max(1, case.kv_len // 4)),
        tables="one",
    ),
    "cross": Op("queries of one sequence, keys of another", _full, _twice_the_keys),
    "gqa": Op("causal, query heads share key heads", _causal, _four_to_one, tables="one"),
    "decode": Op("one new query on a cache of keys", _full, _one_query),
    "local": Op(
        "window to both sides: a query sees itself and the W keys before and after",
        _both_sides,
        _some_window,
        tables="one",
    ),
    "documents": Op("packed batch: causal within documents one behind the other", _documents, tables="batch"),
    "dropout": Op("a tenth of the weights is dropped", _full, dropout_p=0.1),
    "biased": Op("a learned table is added to the scores; its gradient too", _full, bias=True),
    "wide-values": Op("values twice as wide as queries and keys", _full, _wide_values),
    "unbatched": Op("3-D tensors, without a batch", _full, _one_item, form="3-D"),
    "head-masks": Op("a 3-D bool mask, a table for each head", _scattered, form="3-D mask", tables="heads"),
    "module": Op(
        "nn.MultiheadAttention in evaluation: projections in and out, and the heads' mean weights",
        _full,
        form="module",
        modes=("fwd",),
    ),
}
WINDOWED = ("truncated", "local")
FIRST_DOCUMENT = 16
"""The first of packed documents is this part of the whole."""
DEFAULT_OPS = ("self", "causal", "masked", "truncated", "cross")


@dataclass(frozen=True)
class Sizes:
    """Default sizes of one kind of device."""

    dtype: str
    batch: int
    num_heads: int
    head_dim: int
    q_lens: tuple[int, ...]
    quick_q_lens: tuple[int, ...]


SIZES = {
    "cpu": Sizes("fp32", batch=1, num_heads=8, head_dim=64, q_lens=(512,), quick_q_lens=(256,)),
    "cuda": Sizes("bf16", batch=4, num_heads=16, head_dim=128, q_lens=(4096, 16384), quick_q_lens=(4096,)),
}


def bench_cases(
    device: str,
    *,
    ops: Sequence[str] = DEFAULT_OPS,
    dtypes: Sequence[str] | None = None,
    batch: Sequence[int] | None = None,
    num_heads: Sequence[int] | None = None,
    num_kv_heads: Sequence[int] | None = None,
    q_len: Sequence[int] | None = None,
    kv_len: Sequence[int] | None = None,
    head_dim: Sequence[int] | None = None,
    head_dim_v: Sequence[int] | None = None,
    window: Sequence[int] | None = None,
    quick: bool = False,
) -> list[BenchCase]:
    """Every combination of the lists; a list that is None takes the default of `device` ("cpu" or "cuda").

    Raises ValueError for an unknown op or dtype and for heads that do not divide.
    """
    sizes = SIZES[device]
    known("op", ops, OPS)
    known("dtype", dtypes or (), DTYPES)
    given = {
        "batch": batch,
        "num_heads": num_heads,
        "num_kv_heads": num_kv_heads,
        "q_len": q_len,
        "kv_len": kv_len,
        "head_dim": head_dim,
        "head_dim_v": head_dim_v,
        "window": window,
    }
    named = frozenset(name for name, values in given.items() if values)
    if window and not set(ops) & set(WINDOWED):
        raise ValueError(f"window: {', '.join(ops)} has none; {' and '.join(WINDOWED)} have")
    axes = itertools.product(
        ops,
        dtypes or (sizes.dtype,),
        batch or (sizes.batch,),
        num_heads or (sizes.num_heads,),
        num_kv_heads or (None,),
        q_len or (sizes.quick_q_lens if quick else sizes.q_lens),
        kv_len or (None,),
        head_dim or (sizes.head_dim,),
        head_dim_v or (None,),
        window or (None,),
    )
    return list(dict.fromkeys(_case(named, *row) for row in axes))


def _case(
    named: frozenset[str],
    op: str,
    dtype: str,
    batch: int,
    num_heads: int,
    num_kv_heads: int | None,
    q_len: int,
    kv_len: int | None,
    head_dim: int,
    head_dim_v: int | None,
    window: int | None,
) -> BenchCase:
    """One row; what the caller has not named follows from the op."""
    if num_kv_heads is not None and num_heads % num_kv_heads:
        raise ValueError(f"kv-heads: must divide the number of heads, got {num_kv_heads} for {num_heads} heads")
    case = BenchCase(op, dtype, batch, num_heads, num_kv_heads or num_heads, q_len, kv_len or q_len, head_dim)
    case = replace(case, head_dim_v=head_dim_v, window=window if op in WINDOWED else None)
    return OPS[op].bend(case, named)


def known(what: str, names: Iterable[str], table: Iterable[str]) -> None:
    """ValueError for a name that is not in `table`: it lists what there is, and the nearest."""
    there = list(table)
    for name in names:
        if name not in there:
            near = difflib.get_close_matches(name, there, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"{what}: {name!r} is not known; there are {', '.join(there)}{hint}")
