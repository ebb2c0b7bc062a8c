"""Figures of a GPU run that a loop of its own measured in the benchmark's place: medians without their samples."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastattn.bench.cases.operations import BenchCase
from fastattn.bench.measure.rows import say_speedup, three
from fastattn.bench.report.terminal import say_case

HEAD = "| operation | case | mode | provider | TFLOP/s | against | its TFLOP/s | ratio |"
ALIGN = "|---|---|---|---|--:|---|--:|--:|"


@dataclass(frozen=True)
class Direct:
    """A provider beside another one in the same loop: useful TFLOP/s of the median times, and how many times faster."""

    case: BenchCase
    mode: str
    provider: str
    tflops: float
    baseline: str
    baseline_tflops: float
    speedup: float

    @property
    def name(self) -> str:
        """As a row's."""
        return f"{self.case.name}/{self.mode}/{self.provider}"

    @classmethod
    def of(cls, record: dict[str, Any]) -> Direct:
        parts = [{each.name for each in dataclasses.fields(kind)} for kind in (BenchCase, cls)]
        case, own = ({name: value for name, value in record.items() if name in part} for part in parts)
        return cls(BenchCase(**case), **own)


def read_direct(path: Path) -> list[Direct]:
    """Those of a run that `read_json` has read; most have none."""
    return [Direct.of(record) for record in json.loads(path.read_text(encoding="utf-8")).get("direct", ())]


def markdown(entries: list[Direct]) -> list[str]:
    """A line an entry."""
    lines = [HEAD, ALIGN]
    for each in entries:
        cells = [each.case.op, say_case(each.case), each.mode, each.provider, three(each.tflops)]
        cells += [each.baseline, three(each.baseline_tflops), say_speedup(each.speedup)]
        lines.append("| " + " | ".join(cells) + " |")
    return lines
