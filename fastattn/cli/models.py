"""fastattn models: compare real architectures with eager attention, and write docs/models.md."""

from __future__ import annotations

import argparse
import json
import re
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastattn.bench.models.compare import Compared

OK, WRONG, USAGE = 0, 1, 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of `fastattn models`."""
    parser.add_argument("--only", metavar="REGEX", default="", help="only the rows whose name it finds")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the page, such as docs/models.md")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure")


def run(options: argparse.Namespace, argv: list[str]) -> int:
    """Returns the exit code: 1 where a row is wrong."""
    import torch

    from fastattn.bench.measure.env import environment
    from fastattn.bench.models import overhead, report
    from fastattn.bench.models.compare import cases, compare
    from fastattn.bench.models.zoo import ZOO

    block = environment("cpu", argv)
    rows: list[Compared] = []
    chosen = {key: model for key, model in ZOO.items() if re.search(options.only, key)}
    if not chosen:
        print(f"no row that {options.only!r} finds; there are {', '.join(ZOO)}", file=sys.stderr)
        return USAGE
    for key, model in chosen.items():
        missing = report.available(model)
        if missing is not None:
            print(f"{key}: {missing}", file=sys.stderr)
            continue
        for case in cases(model):
            for dtype in (torch.float32, torch.bfloat16):
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # the libraries' own, about configurations this small
                    row = compare(model, case, dtype)
                rows.append(row)
                print(_line(key, row), flush=True)
    measured = report.record(block, rows, overhead.measured())
    for each in measured["overheads"]:
        print(f"{each['way']}: {each['more_us']:.1f} us more than {each['bare']}")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")
    if options.write:
        options.write.write_text(report.markdown(measured), encoding="utf-8")
    wrong = [row for row in rows if not row.ok]
    print(f"{len(rows) - len(wrong)} of {len(rows)} right")
    return WRONG if wrong else OK


def _line(key: str, row: Compared) -> str:
    gradient = "" if row.gradient is None else f"  gradient {row.gradient:.1e} / {row.gradient_eager:.1e}"
    mark = "" if row.ok else "  WRONG"
    return f"{key:28} {row.case:23} {row.dtype:9} output {row.forward:.1e} / {row.forward_eager:.1e}{gradient}{mark}"
