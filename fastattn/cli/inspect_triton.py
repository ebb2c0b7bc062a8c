"""`fastattn inspect`: what the Triton kernels compile to, on GPUs that need not be here."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import argparse

    from rich.console import Console

    from fastattn.kernels.inspect.compile import Compiled, CompileJob, Loop

OK, FAILED, USAGE, STOPPED = 0, 1, 2, 130

NO_TRITON = (
    "fastattn inspect compiles with Triton, which is not installed; on Linux, pip install 'fastattn[triton]' brings it."
)
DEFAULTS = {"target": ["sm90"], "kernel": None, "head_dim": [64, 128], "dtype": ["bf16"], "form": ["bare", "causal"]}
"""What is compiled where nothing else is asked for: seconds. None is all there is."""
WIDE = 240  # columns, where no terminal says how many there are
BLOCK = re.compile(r"(?<=<!-- inspect -->\n).*?(?=<!-- /inspect -->)", re.DOTALL)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the sub-command."""
    parser.add_argument("--target", type=_words, metavar="LIST", help="sm80, sm90, sm100, gfx942; default sm90")
    parser.add_argument("--kernel", type=_words, metavar="LIST", help="fwd, dq, dkv, ...; default all")
    parser.add_argument("--head-dim", type=_numbers, metavar="LIST", help="default 64,128")
    parser.add_argument("--dtype", type=_words, metavar="LIST", help="bf16, fp16, fp32; default bf16")
    parser.add_argument("--form", type=_words, metavar="LIST", help="bare, causal, ...; default bare,causal")
    parser.add_argument("--cuda", action="store_true", help="the CUDA backend's kernels instead, out of its library")
    parser.add_argument("--all", action="store_true", help="all that is not chosen by name, instead of the defaults")
    parser.add_argument("--table", action="store_true", help="each row of the tile table for its own target instead")
    parser.add_argument("--json", metavar="FILE", help="every figure as one list; - is standard output")
    parser.add_argument("--md", metavar="FILE", help="the tables as Markdown into FILE, between its marks; - as above")
    parser.add_argument("--jobs", "-j", type=int, metavar="N", help="processes; default one a core")
    parser.add_argument("--verbose", "-v", action="store_true", help="every loop, and its budget unit by unit")


def _words(text: str) -> list[str]:
    return [word for word in text.split(",") if word]


def _numbers(text: str) -> list[int]:
    return [int(word) for word in _words(text)]


def run(namespace: argparse.Namespace, argv: list[str]) -> int:
    """Compile, show, judge. 0 all codegen checks hold, 1 one fails, 2 the command line was wrong, 130 stopped."""
    if importlib.util.find_spec("triton") is None:
        print(NO_TRITON, file=sys.stderr)
        return USAGE
    if namespace.cuda:
        from fastattn.cli import inspect_cuda

        return inspect_cuda.run(namespace)
    try:
        jobs = _jobs(namespace)
    except ValueError as refusal:
        print(f"fastattn inspect: {refusal}", file=sys.stderr)
        return USAGE
    rows, stopped = _compiled(jobs, namespace.jobs or os.cpu_count() or 1)
    if "-" not in (namespace.json, namespace.md):
        _show(rows, verbose=namespace.verbose)
    if namespace.json is not None:
        from fastattn.kernels.inspect.codegen_checks import failed_checks

        found = [{**asdict(row), "broken": failed_checks(row)} for row in rows]
        _write(namespace.json, json.dumps(found, indent=1) + "\n")
    if namespace.md is not None:
        _write_markdown(namespace.md, markdown(rows))
    if stopped:
        print(f"stopped after {len(rows)} of {len(jobs)}", file=sys.stderr)
        return STOPPED
    return FAILED if _failed(rows) else OK


def _jobs(namespace: argparse.Namespace) -> list[CompileJob]:
    """What to compile. ValueError for a name that is none."""
    from fastattn.kernels.inspect import compile as compiling

    known = {"target": compiling.GPUS, "dtype": compiling.DTYPES, "form": compiling.COMPILE_CASES}
    chosen = {name: getattr(namespace, name) for name in DEFAULTS}
    for name, there_are in known.items():
        for word in chosen[name] or []:
            if word not in there_are:
                raise ValueError(f"no {name} {word!r}; there are {', '.join(there_are)}")
    if namespace.table:
        jobs = [
            each
            for each in compiling.table_plan()
            if all(wanted is None or getattr(each, name) in wanted for name, wanted in chosen.items())
        ]
    else:
        for name, default in DEFAULTS.items():
            if chosen[name] is None:
                chosen[name] = list(known.get(name, ())) or None if namespace.all else default
        jobs = compiling.plan(*chosen.values())
    if not jobs:
        raise ValueError("no kernel is launched for what was chosen; --kernel takes fwd, dq, dkv and what --all shows")
    return jobs


def _compiled(jobs: list[CompileJob], processes: int) -> tuple[list[Compiled], bool]:
    """The rows in the order asked for, and whether somebody stopped it before all were there."""
    from rich.console import Console

    from fastattn.bench.measure.progress import progress_on
    from fastattn.kernels.inspect.compile_pool import compile_all

    rows: dict[CompileJob, Compiled] = {}
    stopped = False
    with progress_on(Console(stderr=True), len(jobs)) as progress:
        try:
            with closing(compile_all(jobs, min(processes, len(jobs)))) as coming:
                for row in coming:
                    progress.step(str(row.problem))
                    rows[row.problem] = row
        except KeyboardInterrupt:
            stopped = True
    return [rows[each] for each in jobs if each in rows], stopped


def _write(name: str, text: str) -> None:
    if name == "-":
        sys.stdout.write(text)
    else:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(text)


def _write_markdown(name: str, text: str) -> None:
    """Between the marks of a file that has them."""
    path = Path(name)
    if name != "-" and path.exists() and BLOCK.search(path.read_text()):
        text = BLOCK.sub(lambda _: text, path.read_text())
    _write(name, text)


# ---- what is shown


class Column(NamedTuple):
    """A title, and a row's cell."""

    title: str
    cell: Callable[[Compiled, Loop], str]


def _number_of(pattern: str) -> Callable[[Compiled, Loop], str]:
    names = re.compile(pattern)
    return lambda row, loop: str(sum(count for name, count in loop.counts.items() if names.fullmatch(name)))


def _clocks(unit: str) -> Callable[[Compiled, Loop], str]:
    return lambda row, loop: f"{loop.clocks[unit]:,.0f}" if loop.clocks else "?"


def _share(name: str) -> Callable[[Compiled, Loop], str]:
    return lambda row, loop: f"{loop.clocks[name]:.0%}" if loop.clocks else "?"


def _tile(row: Compiled) -> str:
    sizes = "x".join(str(row.tile[name]) for name in ("block_m", "block_n") if row.tile[name])
    return f"{sizes}, {row.warps} warps, {row.tile['num_stages']} stages"


def _products(row: Compiled, loop: Loop) -> str:
    from fastattn.kernels.inspect.budget import TENSOR

    counts: dict[str, int] = {}
    for unit in (*TENSOR, "unknown"):
        for name, (count, _) in loop.parts.get(unit, {}).items():
            counts[name.split(".")[0]] = counts.get(name.split(".")[0], 0) + count
    return " + ".join(f"{count} {name}" for name, count in counts.items())


def _shared_kib(row: Compiled, loop: Loop) -> str:
    from fastattn.kernels.inspect.budget import total

    return f"{total(loop.parts, 'shared') / 1024:.1f}"


BINARY = (
    Column("tile", lambda row, loop: _tile(row)),
    Column("registers", lambda row, loop: str(row.registers or "-")),
    Column("spilled", lambda row, loop: f"{row.spilled_bytes} B" if row.registers else "-"),
    Column("shared", lambda row, loop: f"{row.shared_bytes / 1024:.0f} of {row.shared_limit / 1024:.0f} KiB"),
)
IN_LOOP = (
    Column("products", _products),
    Column("TMA", _number_of("UTMALDG|UTMASTG|UTMAREDG")),
    Column("LDGSTS", _number_of("LDGSTS")),
    Column("EX2", _number_of(r"MUFU\.EX2")),
    Column("MUFU", _number_of("MUFU")),
    Column("FP32", _number_of("F(FMA|MUL|ADD)2?")),
    Column("barriers", _number_of("BAR|SYNCS|WARPSYNC")),
    Column("KiB", _shared_kib),
    Column("LDL, STL", _number_of("LDL|STL")),
    Column("tiles", lambda row, loop: "?" if loop.tiles is None else f"{loop.tiles:.2f}"),
    Column("issued", lambda row, loop: str(loop.issued)),
)
CLOCKS = (
    *(Column(unit, _clocks(unit)) for unit in ("tensor", "special", "fp32", "alu", "shared", "issue")),
    Column("bound", _share("bound")),
    Column("serial", _share("serial")),
)
TABLES = {
    "The binary, and one round of its main loop for one warp": (*BINARY, *IN_LOOP),
    "Clocks of one round for the program, and the share of the tensor cores' peak": CLOCKS,
}


def _remarks(row: Compiled) -> Iterator[str]:
    """Why a row has no figures, or what is to be said of them."""
    if row.error is not None:
        yield f"does not compile: {row.error}"
        return
    if not row.registers:
        yield "compiled, not disassembled: no registers, no instructions, no budget"
    elif row.main is None:
        yield "no loop with tensor instructions"
    elif row.main.clocks is None:
        yield f"no budget, as the size of a product is not in the listing ({', '.join(row.main.parts['unknown'])})"
    if row.shared_bytes > row.shared_limit:
        yield f"{row.shared_bytes - row.shared_limit} B more shared memory than the target has"


def _cells(row: Compiled, columns: tuple[Column, ...]) -> list[str]:
    """A cell a column: of the binary, where there is one; of the main loop, where there is one."""
    return [
        column.cell(row, row.main) if row.main or (row.error is None and column in BINARY) else "-"
        for column in columns
    ]


def _failed(rows: list[Compiled]) -> list[str]:
    from fastattn.kernels.inspect.codegen_checks import failed_checks

    return [f"{row.problem}: {words}" for row in rows for words in failed_checks(row)]


def _show(rows: list[Compiled], *, verbose: bool) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=WIDE)
    for title, columns in TABLES.items():
        table = Table(box=None, pad_edge=False, padding=(0, 1), header_style="dim", title=title, title_justify="left")
        table.add_column("")
        for column in columns:
            table.add_column(column.title, justify="right", overflow="fold")
        for row in rows:
            table.add_row(str(row.problem), *_cells(row, columns))
        console.print(table)
    for row in rows:
        if verbose and row.loops:
            _spell_out(console, row)
        for words in _remarks(row):
            console.print(f"{row.problem}: {words}", style="dim", markup=False, soft_wrap=True)
    wrong = _failed(rows)
    for words in wrong:
        console.print(f"✗ {words}", style="bold red", markup=False, soft_wrap=True)
    console.print(f"{len(rows)} rows, {f'codegen checks failed: {len(wrong)}' if wrong else 'all codegen checks hold'}")


def _spell_out(console: Console, row: Compiled) -> None:
    from fastattn.kernels.inspect.budget import RATES, spelled_out

    for n, loop in enumerate(row.loops):
        which = "main loop" if n == 0 else "another loop"
        console.print(f"{row.problem}, {which}: {loop.issued} instructions, {loop.warps} warps", style="bold cyan")
        for line in spelled_out(loop.parts, RATES[row.problem.target]):
            console.print(f"  {line}", markup=False, soft_wrap=True)


def markdown(rows: list[Compiled]) -> str:
    """The tables, and the budget of one row unit by unit: the forward at the largest head, or the first."""
    from fastattn.kernels.inspect.budget import RATES, spelled_out

    text = [f"Compiled with triton {rows[0].triton}.", ""] if rows else []
    for title, columns in TABLES.items():
        text += [f"{title}:", "", f"| | {' | '.join(column.title for column in columns)} |"]
        text += [f"|---|{'---:|' * len(columns)}"]
        text += [f"| {row.problem} | {' | '.join(_cells(row, columns))} |" for row in rows]
        text.append("")
    remarks = [f"- {row.problem}: {words}" for row in rows for words in _remarks(row)]
    text += [*remarks, ""] if remarks else []
    shown = [row for row in rows if row.main]
    if shown:
        row = max(shown, key=lambda row: (row.problem.kernel == "fwd", row.problem.head_dim))
        main: Any = row.main
        text += [f"{row.problem}, {main.issued} instructions by each of {main.warps} warps:", "", "```"]
        text += [*spelled_out(main.parts, RATES[row.problem.target]), "```", ""]
    return "\n".join(text)
