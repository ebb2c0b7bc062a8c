"""A GPU's clocks, power and temperature while it is timed: nvidia-smi in a loop beside the benchmark, never between two
calls. Its lines carry its own time, so that each is matched to the provider whose turn it was.
"""

from __future__ import annotations

import atexit
import collections
import datetime
import functools
import re
import shutil
import statistics
import subprocess
import threading
from typing import NamedTuple

from fastattn.bench.measure.env import CLOCKS

INTERVAL_MS = 200
NEAR = 1.0
"""Seconds: a turn that no reading fell into takes the nearest one. nvidia-smi's power is a mean of about so long."""
MOST = 20_000
"""Readings that are kept: the last hour's."""
STAMP = "%Y/%m/%d %H:%M:%S.%f"
NUMBER = re.compile(r"(-?\d+(?:\.\d+)?)(.*)")

Span = tuple[float, float]
"""From when to when, seconds since the epoch."""


class Reading(NamedTuple):
    """`values`: by the names in `CLOCKS`, with their units."""

    at: float
    values: dict[str, str]


class Sampler:
    """One nvidia-smi in a loop, read by a thread until `close`. OSError where it cannot be started."""

    def __init__(self) -> None:
        self.readings: collections.deque[Reading] = collections.deque(maxlen=MOST)
        query = ["nvidia-smi", f"--query-gpu=timestamp,{CLOCKS}", "--format=csv,noheader", "-i", "0"]
        # Its pipe is its life line: when this process is killed, the next line that it writes ends it.
        self.process = subprocess.Popen(
            [*query, "-lms", str(INTERVAL_MS)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self.thread = threading.Thread(target=self._read, daemon=True)
        self.thread.start()

    def _read(self) -> None:
        for line in self.process.stdout or ():
            reading = parsed(line)
            if reading is not None:
                self.readings.append(reading)

    def during(self, spans: list[Span]) -> dict[str, str] | None:
        """The medians of what was read in these spans, and of how many "readings"; of 0 it is the nearest one. None
        where there is none near.
        """
        readings = list(self.readings)
        inside = [each for each in readings if any(start <= each.at <= end for start, end in spans)]
        used = inside
        if not inside and spans:
            near = min(readings, key=lambda each: _distance(each.at, spans), default=None)
            used = [near] if near is not None and _distance(near.at, spans) <= NEAR else []
        if not used:
            return None
        medians = {name: _median([each.values[name] for each in used]) for name in used[0].values}
        return medians | {"readings": str(len(inside))}

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.thread.join()
        if self.process.stdout is not None:
            self.process.stdout.close()


@functools.cache
def sampler() -> Sampler | None:
    """This process's own, from the first call to its end; None where there is no nvidia-smi."""
    if shutil.which("nvidia-smi") is None:
        return None
    try:
        found = Sampler()
    except OSError:
        return None
    atexit.register(found.close)
    return found


def parsed(line: str) -> Reading | None:
    """A line of nvidia-smi; None for what is none, such as a message that it has no device."""
    stamp, *values = (each.strip() for each in line.split(","))
    names = CLOCKS.split(",")
    if len(values) != len(names):
        return None
    try:
        at = datetime.datetime.strptime(stamp, STAMP).timestamp()
    except ValueError:
        return None
    return Reading(at, dict(zip(names, values, strict=True)))


def _distance(at: float, spans: list[Span]) -> float:
    return min(max(start - at, at - end, 0.0) for start, end in spans)


def _median(values: list[str]) -> str:
    """Of "1980 MHz" and the like; the last one where they are no numbers, as "[N/A]"."""
    found = [NUMBER.fullmatch(each) for each in values]
    numbers = [float(match[1]) for match in found if match is not None]
    if len(numbers) < len(values) or found[-1] is None:
        return values[-1]
    return f"{statistics.median(numbers):g}{found[-1][2]}"
