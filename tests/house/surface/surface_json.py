"""The JSON that the project writes, as trees of keys: what reads it reads these. A list of tables is `name[].key`."""

import dataclasses
import importlib
import json
import re
import tempfile
from pathlib import Path
from unittest import mock

import torch
from surface_text import ROOT, quietly

BENCH = "--device cpu --op self -B 1 -H 1 -N 8,16 -D 8 --dtype fp32 --mode fwd --providers fastattn,sdpa --rounds 1"
BRIEF = "--min-time 0.001 --max-time 0.01 --model none"
RECORD = re.compile(r"\b(?:run|self)\.record(?:\.setdefault\(|\[)\"(\w+)\"")


def tree(value, path=""):
    """Sorted paths to everything that is no table of its own."""
    if isinstance(value, dict) and value:
        return sorted({line for key, each in value.items() for line in tree(each, f"{path}.{key}" if path else key)})
    if isinstance(value, list):
        return sorted({line for each in value for line in tree(each, f"{path}[]")}) or [f"{path}[]"]
    return [path]


def fields(cls, *more):
    return [each.name for each in dataclasses.fields(cls)] + list(more)


def written(*words):
    """What a command writes to --json, on the plain definition, as if there were no GPU. ImportError without rich."""
    importlib.import_module("rich")
    from fastattn.cli import main

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "written.json"
        more = ["--out", folder] if words[0] == "bench" else []
        with (
            mock.patch.object(torch.cuda, "is_available", lambda: False),
            mock.patch.dict("os.environ", {"FASTATTN_BACKEND": "reference"}),
        ):
            code = quietly(main, [*words, *more, "--json", str(path)])
        assert code == 0, f"fastattn {' '.join(words)} ended with {code}"
        return json.loads(path.read_text(encoding="utf-8"))


def bench():
    whole = written("bench", *BENCH.split(), *BRIEF.split())
    return [f"schema: {whole['schema']}", *tree(whole)]


def check():
    return tree(written("check", "--rooms", "reference", "--only", "^causal$"))


def gpu():
    """A run of `make gpu` before its first step, and what its steps add at the top."""
    from fastattn.bench.gpu.pipeline import Run, Settings
    from fastattn.bench.report.writers import READS

    with tempfile.TemporaryDirectory() as folder, mock.patch.object(torch.cuda, "is_available", lambda: False):
        record = Run(Settings("cpu", out=Path(folder)), lambda words: None).record
    code = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "bench").rglob("*.py"))
    return [
        f"schema: {record['schema']}", f"reads: {', '.join(READS)}", *tree(record),
        *(f"{name} ..." for name in sorted(set(RECORD.findall(code)))),
    ]  # fmt: skip


def models():
    from fastattn.bench.models import report
    from fastattn.bench.models.compare import Compared, Seen
    from fastattn.bench.models.overhead import Overhead

    row = Compared("a model", "eval", "float32", 0.0, 0.0, None, None, Seen())
    with mock.patch.dict("os.environ", {"FASTATTN_BACKEND": "reference"}):
        whole = report.record({}, [row], [Overhead("a way", "a function", [1.0] * 5, [0.5] * 5)])
    return tree(json.loads(json.dumps(whole)))


def inspect():
    """Without Triton or a compiled library: the fields of what is written."""
    from fastattn.cli.inspect_cuda import Row
    from fastattn.kernels.inspect.compile import Compiled, CompileJob, Loop

    return [
        *(f"[].{name}" for name in fields(Compiled, "broken")),
        *(f"[].problem.{name}" for name in fields(CompileJob)), *(f"[].loops[].{name}" for name in fields(Loop)),
        *(f"--cuda [].{name}" for name in fields(Row, "broken")),
    ]  # fmt: skip


def manifest():
    """What lies beside a library."""
    from fastattn.building.manifest import Manifest

    return fields(Manifest)


JSON = {
    "fastattn bench --json": bench,
    "fastattn check --json": check,
    "fastattn inspect --json": inspect,
    "fastattn models --json": models,
    "make gpu": gpu,
    "manifest of a library": manifest,
}
