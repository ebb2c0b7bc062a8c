"""Peak memory of one call, beyond what was there before it.

On a GPU: the growth of torch.cuda.max_memory_allocated. On Linux: the growth of the process's resident set, read from
the kernel's own high-water mark (VmHWM, reset through /proc/self/clear_refs) after the allocator has given freed pages
back; a thread that polls the resident set stands in where the mark cannot be reset. Elsewhere: the growth of ru_maxrss,
which sees only what exceeds the process's past. A call is measured once, alone, not while it is timed.
"""

from __future__ import annotations

import ctypes
import gc
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch

POLL_SECONDS = 0.0005
STATUS, CLEAR_REFS, STATM = Path("/proc/self/status"), Path("/proc/self/clear_refs"), Path("/proc/self/statm")


def peak_bytes(call: Callable[[], object], device: torch.device) -> tuple[int | None, str]:
    """Bytes that `call` needed at its peak, and the name of the method; None where nothing can be measured."""
    gc.collect()
    if device.type == "cuda":
        return _cuda_peak(call, device), "torch.cuda.max_memory_allocated"
    if sys.platform.startswith("linux"):
        _trim()
        try:
            return _high_water(call), "VmHWM"
        except OSError:
            return _polled(call), "polled resident set"
    try:
        return _max_rss(call), "ru_maxrss"
    except ImportError:
        call()
        return None, "none"


def _cuda_peak(call: Callable[[], object], device: torch.device) -> int:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _high_water(call: Callable[[], object]) -> int:
    CLEAR_REFS.write_text("5")
    before = _status_bytes("VmRSS")
    call()
    return max(0, _status_bytes("VmHWM") - before)


def _status_bytes(field: str) -> int:
    for line in STATUS.read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def _polled(call: Callable[[], object]) -> int:
    before = peak = _resident()
    done = threading.Event()

    def poll() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, _resident())
            time.sleep(POLL_SECONDS)

    thread = threading.Thread(target=poll, daemon=True)
    thread.start()
    try:
        call()
    finally:
        done.set()
        thread.join()
    return max(0, max(peak, _resident()) - before)


def _resident() -> int:
    import resource

    return int(STATM.read_text().split()[1]) * resource.getpagesize()


def _max_rss(call: Callable[[], object]) -> int:
    import resource

    def most() -> int:
        most_rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most_rss if sys.platform == "darwin" else most_rss * 1024

    before = most()
    call()
    return most() - before


def _trim() -> None:
    """Give freed pages back to the system, so that re-used ones count as new (glibc only)."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError):
        return
