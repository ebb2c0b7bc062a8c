"""Runs of `make gpu` that go on: which file, and what of it still holds here."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastattn.bench.measure import env
from fastattn.bench.report.writers import GPU_SCHEMA

RESULTS = Path("bench/results")
"""Where results are committed: what is carried to a fresh machine lies there."""

KEPT = Path("build/gpu")
"""A copy of each file, in a folder that git ignores: it is still there where results are taken from their folder."""

PACKAGES = re.compile(r'[^\s"\\]*/(?:site|dist)-packages/')

TIMED = ("rows", "flex", "crashed", "left", "tune")
"""What holds for one kind of GPU alone: times; and the steps that take them."""
TIMING_STEPS = ("headline", "sweep", "flex", "tune")


def find(asked: str, out: Path, environment: dict[str, Any]) -> Path | None:
    """The file to go on from: the one that is named, or the last of this commit in `out`, RESULTS or KEPT, whatever
    its name; None where there is none.

    Raises:
        ValueError: the file that was named is not there, or of another schema or commit.
    """
    if asked != "1":
        record = _read(path := Path(asked))
        if record is None:
            raise ValueError(f"RESUME={asked} is no file of make gpu; RESUME=1 looks for the last run of this commit")
        if record.get("schema") != GPU_SCHEMA:
            raise ValueError(f"RESUME: {path} has schema {record.get('schema')!r}, this version writes {GPU_SCHEMA!r}")
        if _commit(record) != environment["commit"]:
            raise ValueError(
                f"RESUME: {path} is a run of commit {_commit(record)}, and this is {environment['commit']}; "
                f"{env.SAY_COMMIT}"
            )
        if record["environment"]["device"] != environment["device"]:
            raise ValueError(
                f"RESUME: {path} is a run on {(ran := record['environment']['device'])}, and DEVICE is "
                f"{environment['device']}; DEVICE={ran} goes on"
            )
        return path
    paths = [path for folder in (out, RESULTS, KEPT) for path in sorted(folder.glob("*.json"))]
    found = [(path, record) for path in paths if (record := _read(path)) and record.get("schema") == GPU_SCHEMA]
    same = [
        (path, record)
        for path, record in found
        if _commit(record) == environment["commit"] and record["environment"]["device"] == environment["device"]
    ]
    # Of equal files, copies of one another, the first folder's is taken.
    return max(same, key=lambda each: (_same_gpu(each[1], environment), _last(each[1])), default=(None, None))[0]


def carried(path: Path, environment: dict[str, Any], say: Callable[[str], None]) -> dict[str, Any]:
    """What that run has, as far as it holds here: times of another kind of GPU stay in their own file."""
    record = json.loads(path.read_text(encoding="utf-8"))
    say(f"goes on from {path}")
    if _same_gpu(record, environment):
        return record
    before = record["environment"]
    say(f"its times are of {before['gpu'] or before['cpu']}: they are taken anew")
    record["steps"] = {name: step for name, step in record["steps"].items() if name not in TIMING_STEPS}
    kept = {name: value for name, value in record.items() if name not in TIMED}
    return kept | {"environment": environment, "carried_from": before}


def without_places(text: str) -> str:
    """A file's text without where this checkout, Python's packages and the home folder lie: nobody's business."""
    root = Path(__file__).resolve().parents[2]
    for place, instead in ((root, ""), (Path.home(), "~/")):
        if len(place.parts) > 1:
            text = text.replace(f"{place}/", instead)
    return PACKAGES.sub("", text)


def _read(path: Path) -> dict[str, Any] | None:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) else None


def _commit(record: dict[str, Any]) -> str | None:
    return record.get("environment", {}).get("commit")


def _same_gpu(record: dict[str, Any], environment: dict[str, Any]) -> bool:
    return record["environment"].get("gpu") == environment["gpu"]


def _last(record: dict[str, Any]) -> tuple[str, int]:
    """When its last command began, and of copies that one command left at different times the fuller."""
    commands = record.get("commands") or [{}]
    return commands[-1].get("date", ""), len(json.dumps(record))
