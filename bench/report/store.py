"""Runs by name, and runs that go on: where files lie, and which rows an earlier file already has."""

from __future__ import annotations

import datetime
import re
from pathlib import Path
from typing import Any

from fastattn.bench.cases.operations import known
from fastattn.bench.measure import env
from fastattn.bench.measure.rows import Row
from fastattn.bench.options import Options
from fastattn.bench.report import writers

SAME = ("gpu", "cpu", "threads", "torch", "fastattn", "commit", "dirty")
"""Of the environment: what must not have changed where a run goes on."""


def root() -> Path:
    """bench/out/ in a checkout, fastattn-bench/ elsewhere."""
    return Path("bench/out") if Path("bench/options.py").is_file() else Path("fastattn-bench")


def json_path(options: Options, environment: dict[str, Any]) -> Path:
    """Where the run is written: by name, by path, or in a folder a run."""
    if options.save is not None:
        return saved(options.save)
    return options.json or out_folder(options, environment) / "bench.json"


def out_folder(options: Options, environment: dict[str, Any]) -> Path:
    if options.out is not None:
        return options.out
    if options.save is not None:
        return saved(options.save).parent / options.save
    # By the environment's own second, so that the JSON and the plots of a run lie together.
    stamp = datetime.datetime.fromisoformat(environment["date"]).astimezone().strftime("%Y-%m-%d-%H%M%S")
    return root() / f"{stamp}-{env.device_name(environment)}"


def saved(name: str) -> Path:
    """The file of a name. ValueError where it could not be part of a file's name."""
    if not re.fullmatch(r"[\w.+-]+", name):
        raise ValueError(f"save: a name of letters, digits and . _ + - is needed, got {name!r}")
    return root() / "saved" / f"{name}.json"


def find(word: str) -> Path:
    """A run by path or by the name it was saved under."""
    if Path(word).is_file():
        return Path(word)
    if word.endswith(".json") or "/" in word:
        raise ValueError(f"{word}: there is no such file")
    there = sorted(path.stem for path in (root() / "saved").glob("*.json"))
    if not there:
        raise ValueError(f"{word}: no run has been saved here; `fastattn bench --save {word}` saves one")
    known("saved run", [word], there)
    return saved(word)


def resume(path: Path, rows: list[Row], environment: dict[str, Any]) -> tuple[list[Row], dict[str, Any]]:
    """`rows` with what `path` already has in their place, and the environment to write.

    Raises ValueError where the file is of another schema, machine or version: its times would not be these.
    """
    if not path.is_file():
        return rows, environment
    earlier, before = writers.read_json(path)
    changed = [name for name in SAME if before.get(name) != environment[name]]
    if changed:
        what = ", ".join(f"{name} was {before.get(name)!r} and is {environment[name]!r}" for name in changed)
        raise ValueError(f"resume: {path} was measured elsewhere: {what}; write to another file, or measure all anew")
    known_rows = {(row.name, row.device, row.baseline): row for row in earlier if row.done}
    return [known_rows.get((row.name, row.device, row.baseline), row) for row in rows], before
