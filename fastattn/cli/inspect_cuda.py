"""`fastattn inspect --cuda`: what nvcc has made of the CUDA backend's kernels, read out of its library, without a GPU.

For each kernel its registers and spills, the instructions that must be there, and the cycle budget of one tile of keys
on the way around the main loop that most tiles take: unmasked, and without a risen maximum.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastattn.building import nvcc

if TYPE_CHECKING:
    import argparse

    from fastattn.kernels.inspect.listing import Instruction

OK, BROKEN, USAGE = 0, 1, 2
WIDE = 160  # columns, where no terminal says how many there are

KERNEL = re.compile(r"forward_kernel\w*?4arch\d(bf16|f16)ELi(\d+)ELi(\d+)ELNS0_\w+?E(\d)")
VARIANTS = ("plain", "masked", "everything")
BLOCK = re.compile(r"(?<=<!-- inspect cuda -->\n).*?(?=<!-- /inspect cuda -->)", re.DOTALL)
LEAST_UNDER_PRODUCTS = 0.9
REGISTER_CAPS = {2: 168, 3: 128}
"""A thread, by computing warpgroups: of the 65,536 of an SM, in eights, a block's share. setmaxnreg hands them on."""


@dataclass
class Row:
    """One kernel."""

    dtype: str
    width: int
    width_v: int
    kind: str  # its variant; called as --json calls it
    block_m: int
    block_n: int
    registers: int
    spilled_bytes: int
    counts: dict[str, int]  # of the whole kernel
    wide_stores: int = 0  # of 16 bytes a lane, which write the output
    loop: dict[str, int] = field(default_factory=dict)  # on the way around the main loop, for one warp
    clocks: dict[str, float] = field(default_factory=dict)
    spelled_out: list[str] = field(default_factory=list)
    under_products: float = 1.0  # share of a round's exponentials that stand before the wait for the values' product

    @property
    def name(self) -> str:
        wide = str(self.width) if self.width == self.width_v else f"{self.width}x{self.width_v}"
        return f"{self.dtype} {wide} {self.kind}"

    @property
    def broken(self) -> list[str]:
        """The promises that it breaks, in words."""
        found = []
        if self.spilled_bytes:
            found.append(f"{self.spilled_bytes} bytes of stack")
        cap = REGISTER_CAPS[self.block_m // 64]
        if self.registers != cap:  # fewer would leave the pool too small for the warpgroups that ask for more
            found.append(f"{self.registers} registers, where setmaxnreg counts on {cap}")
        if self.under_products < LEAST_UNDER_PRODUCTS:
            found.append(f"{self.under_products:.0%} of the softmax under the product")
        whole = self.width_v // 32 * 2  # of each 32 columns, of a thread's two rows
        if self.wide_stores != whole:
            found.append(f"{self.wide_stores} stores of 16 bytes, where the output has {whole}")
        found += [f"no {name}" for name in ("HGMMA", "UTMALDG", "USETMAXREG") if not self.counts.get(name)]
        return found


def rows(library: Any) -> list[Row]:
    """Every forward kernel of a loaded library."""
    from fastattn.kernels.inspect import budget, listing, sass

    found = []
    for name, binary in sass.read_all(Path(library.path)).items():
        match = KERNEL.search(name)
        if match is None:
            continue
        dtype, width, width_v, variant = match[1], int(match[2]), int(match[3]), int(match[4])
        tiles = library.tiles((1, 1, 1, 1, 1, width, width_v), variant, False, 0)
        row = Row(dtype, width, width_v, VARIANTS[variant], tiles.block_m, tiles.block_n, binary.registers,
                  binary.spilled_bytes, _counted(binary.code),
                  sum(each.opcode == "STG.E.128" for each in binary.code))  # fmt: skip
        for way in listing.leanest(binary.code, sass.is_tensor):
            parts = budget.gather(asked for each in way for asked in sass.asks(each, tiles.block_m // 16))
            clocks = budget.budget(parts, budget.RATES["sm90"])
            if clocks is not None and budget.flop(parts) >= 2 * tiles.block_m * tiles.block_n * (width + width_v):
                row.loop, row.clocks = _counted(way), clocks._asdict()
                row.spelled_out = budget.spelled_out(parts, budget.RATES["sm90"])
                row.under_products = under_products(way)
        found.append(row)
    return sorted(found, key=lambda row: (row.dtype, row.width, row.width_v, VARIANTS.index(row.kind)))


def under_products(way: Sequence[Instruction]) -> float:
    """Of the exponentials on a way around the loop, the share between the wait for the scores, which leaves one product
    in flight, and the wait for that one. The compiler may move either.
    """
    waits = [n for n, each in enumerate(way) if each.opcode.startswith("WARPGROUP.DEPBAR")]
    first = next((n for n in waits if way[n].operands.endswith("0x1")), None)
    if first is None or len(waits) < 2:
        return 0.0
    last = waits[(waits.index(first) + 1) % len(waits)]
    between = way[first:last] if first < last else [*way[first:], *way[:last]]
    return _counted(between).get("MUFU", 0) / max(_counted(way).get("MUFU", 0), 1)


def _counted(code: Any) -> dict[str, int]:
    counts: dict[str, int] = {}
    for each in code:
        counts[each.name] = counts.get(each.name, 0) + 1
    return counts


def run(namespace: argparse.Namespace) -> int:
    """Read, show, judge. 0 all promises hold, 1 one is broken, 2 there is nothing to read."""
    from fastattn.building.compiler import BuildError
    from fastattn.building.cuda_library import LIBRARY

    try:
        library = LIBRARY.get()
    except BuildError as refusal:
        print(f"fastattn inspect: {refusal}", file=sys.stderr)
        return USAGE
    found = rows(library)
    if namespace.json is not None:
        text = json.dumps([{**asdict(row), "broken": row.broken} for row in found], indent=1) + "\n"
        if namespace.json == "-":
            print(text, end="")
        else:
            Path(namespace.json).write_text(text)
    if namespace.md is not None:
        page = Path(namespace.md)
        text = page.read_text(encoding="utf-8")
        if not BLOCK.search(text):
            print(
                f"fastattn inspect: {page} has no lines <!-- inspect cuda --> and <!-- /inspect cuda -->",
                file=sys.stderr,
            )
            return USAGE
        page.write_text(BLOCK.sub(lambda _: markdown(found), text), encoding="utf-8")
    if namespace.json != "-":
        _show(found, verbose=namespace.verbose)
    return BROKEN if any(row.broken for row in found) else OK


def table(found: list[Row]) -> tuple[list[str], list[list[str]]]:
    """Headings and cells: clocks of each unit for one tile of keys, the share of the peak that the busiest allows."""
    units = ("tensor", "special", "fp32", "alu", "shared", "issue")
    cells = []
    for row in found:
        clocks = [f"{row.clocks[unit]:,.0f}" for unit in units] if row.clocks else ["?"] * len(units)
        share = f"{row.clocks['bound']:.0%}" if row.clocks else "?"
        words = ", ".join(row.broken) or "holds"
        cells.append([row.name, f"{row.block_m}x{row.block_n}", str(row.registers), *clocks, share, words])
    return ["kernel", "tile", "registers", *units, "of peak", "codegen checks"], cells


def markdown(found: list[Row]) -> str:
    """The table of the bfloat16 kernels (float16's are the same but for the type of the product), and two budgets."""
    found = [row for row in found if row.dtype == "bf16"]
    headings, cells = table(found)
    lines = [f"Compiled with {nvcc.find_nvcc().version}.", ""]
    lines += ["| " + " | ".join(headings[:-1]) + " |", "|---|" + "---:|" * (len(headings) - 2)]
    lines += ["| " + " | ".join(cell[:-1]) + " |" for cell in cells]
    for row in found:
        if row.name in ("bf16 64 plain", "bf16 128 plain"):
            count = sum(row.loop.values())
            lines += ["", f"{row.name}, {count} instructions by each of {row.block_m // 16} warps:", "", "```"]
            lines += [*row.spelled_out, "```"]
    return "\n".join(lines) + "\n"


def _show(found: list[Row], *, verbose: bool) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, width=None if sys.stdout.isatty() else WIDE)
    headings, cells = table(found)
    shown = Table(box=None, pad_edge=False)
    for n, heading in enumerate(headings):
        shown.add_column(heading, justify="left" if n in (0, len(headings) - 1) else "right", no_wrap=True)
    for cell in cells:
        shown.add_row(*cell)
    console.print(shown)
    if verbose:
        for row in found:
            console.print(row.name, style="bold")
            for line in row.spelled_out:
                console.print(f"  {line}")
