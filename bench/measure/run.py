"""The benchmark itself: plan the rows, then for each case check, weigh and time every provider side by side."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby

import torch

from fastattn.bench import options as flags
from fastattn.bench.cases.module import workload_of
from fastattn.bench.cases.operations import DEFAULT_OPS, OPS, BenchCase, bench_cases, known
from fastattn.bench.cases.presets import PRESETS, preset_cases
from fastattn.bench.cases.suites import SUITES, Cell
from fastattn.bench.cases.workload import Made, NoBackward, Workload
from fastattn.bench.measure import env, estimate, nvidia_smi, tiny_calls
from fastattn.bench.measure.clock import SUSTAINED, Budget, Clock, Timing, clock_for, measure
from fastattn.bench.measure.memory import peak_bytes
from fastattn.bench.measure.overhead import overhead_us
from fastattn.bench.measure.progress import Progress
from fastattn.bench.measure.provider_warnings import Notices
from fastattn.bench.measure.providers.table import known_providers, provider
from fastattn.bench.measure.ratios import Samples, speedup
from fastattn.bench.measure.rows import Row, say_bytes
from fastattn.bench.options import Options

COARSE = 8.0
"""Times what the tolerance allows: another library's result within it is timed, and said to be coarse. PyTorch's
backward on a CPU is: it adds its gradients up in the inputs' dtype."""
LONGEST_SUSTAINED_MS = 100.0
"""Calls that take longer are left out of the measurement under sustained load: they would be most of it."""
NO_KERNEL = ("No available kernel", "No viable backend")
"""How PyTorch begins to say that a kernel asked for by name does not take a call; why not it says in warnings."""
BACKWARD_WORDS = ("backward", "bwd")
BASELINES = {"module": ("mha",)}
BASELINE = ("sdpa", "sdpa-cudnn")
"""PyTorch's own, by the form of a call: the first of these that is among the providers."""
BUDGETS = {
    ("cpu", False): Budget(rounds=7, min_time=0.3, max_time=2.0),
    ("cpu", True): Budget(rounds=3, min_time=0.05, max_time=0.5),
    ("cuda", False): Budget(rounds=30, min_time=0.2, max_time=3.0),
    ("cuda", True): Budget(rounds=10, min_time=0.05, max_time=1.0),
}


def pick_device(name: str) -> torch.device:
    """`auto` is a GPU where torch sees one. ValueError where cuda is asked for and there is none."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: cuda was asked for, but torch sees no GPU here; --device cpu or auto runs")
    return torch.device("cuda" if name == "cuda" or (name == "auto" and torch.cuda.is_available()) else "cpu")


def plan(options: Options, device: torch.device) -> list[Row]:
    """The rows that would run, in order. ValueError for a name that is not known."""
    every = known_providers()
    known("providers", options.providers or (), every)
    known("baseline", [options.baseline] if options.baseline else (), every)
    rows = []
    for cell in _cells(options, device):
        default = flags.QUICK_PROVIDERS if options.quick else flags.PROVIDERS
        if OPS[cell.case.op].form == "module":
            default = flags.MODULE_PROVIDERS
        names = list(dict.fromkeys(options.providers or cell.providers or default))
        if options.baseline is not None and options.baseline not in names:
            names.append(options.baseline)
        rows += cell_rows(cell, names, device, options.baseline)
    return [row for row in rows if options.only is None or options.only.search(row.name)]


def cell_rows(cell: Cell, names: Sequence[str], device: torch.device, baseline: str | None = None) -> list[Row]:
    """A row for each provider, against PyTorch's own unless `baseline` names another."""
    usual = BASELINES.get(OPS[cell.case.op].form, BASELINE)
    baseline = baseline or next((name for name in usual if name in names), None)
    return [Row(cell.case, cell.mode, name, device.type, baseline=baseline) for name in names]


def _cells(options: Options, device: torch.device) -> list[Cell]:
    """What to time, in order."""
    sizes = {name: getattr(options, name) for name in flags.SIZES}
    if options.presets:
        given = [name for name, values in {"ops": options.ops, **sizes}.items() if values is not None]
        if given:
            raise ValueError(
                f"presets: {', '.join(options.presets)} bring their own operation and sizes, and {', '.join(given)} "
                f"came too; give one or the other"
            )
        return [cell for name in options.presets for cell in _named_cells(name, options, device)]
    cases = bench_cases(
        device.type,
        ops=list(OPS) if options.ops == ["all"] else options.ops or list(DEFAULT_OPS),
        dtypes=options.dtypes,
        **sizes,
        quick=options.quick,
    )
    return [Cell(case, mode) for case in cases for mode in options.modes or OPS[case.op].modes]


def _named_cells(name: str, options: Options, device: torch.device) -> list[Cell]:
    """The cells of a preset, or of a suite as far as its dtypes and modes are asked for."""
    known("preset", [name], [*PRESETS, *SUITES])
    if name in PRESETS:
        cases = preset_cases([name], device.type, options.dtypes)
        return [Cell(case, mode) for case, modes in cases for mode in options.modes or modes]
    chosen = SUITES[name]
    if chosen.device != device.type:
        raise ValueError(
            f"preset: {name} is measured on {chosen.device}, got {device.type}; add --device {chosen.device}"
        )
    return [
        Cell(cell.case, cell.mode, cell.providers or chosen.providers)
        for cell in chosen.cells()
        if (options.dtypes is None or cell.case.dtype in options.dtypes)
        and (options.modes is None or cell.mode in options.modes)
    ]


def budget_for(options: Options, device: torch.device) -> Budget:
    given = {"rounds": options.rounds, "min_time": options.min_time, "max_time": options.max_time}
    default = BUDGETS[device.type, options.quick]
    return dataclasses.replace(default, **{name: value for name, value in given.items() if value is not None})


def run(rows: list[Row], options: Options, device: torch.device, progress: Progress) -> Iterator[list[Row]]:
    """Fill the rows, yielding them case by case; once the budget is spent, only those that were timed before."""
    clock, budget = clock_for(device), budget_for(options, device)
    until = None if options.budget is None else time.monotonic() + options.budget
    for case, group in groupby(rows, key=lambda row: row.case):
        of_case = list(group)
        if until is not None and time.monotonic() >= until and not all(row.done for row in of_case):
            continue
        runner = CaseRunner(case, device, clock, budget, options.check, progress)
        for _, of_mode in groupby(of_case, key=lambda row: row.mode):
            together = list(of_mode)
            if not all(row.done for row in together):  # an earlier run may have timed them
                runner.run(together)
        yield of_case


class CaseRunner:
    """The rows of one case; the workload and its float64 truth are shared by the modes."""

    def __init__(
        self,
        case: BenchCase,
        device: torch.device,
        clock: Clock,
        budget: Budget,
        check: bool,
        progress: Progress,
    ):
        self.case, self.device, self.clock, self.budget, self.check = case, device, clock, budget, check
        self.progress = progress
        self.workloads: dict[BenchCase, Workload] = {}
        if device.type == "cuda":
            nvidia_smi.sampler()  # its first line takes a while
            torch.cuda.empty_cache()  # what the last case left in pieces

    def run(self, rows: list[Row]) -> None:
        """All providers of one mode: each made, checked and weighed by itself, then all timed in turns."""
        calls: dict[str, Callable[[], object]] = {}
        notices = Notices({row.provider: row.warnings for row in rows})
        for row in rows:
            self.progress.step(f"{row.case.op} {row.mode} · {row.provider}")
            with notices.listening(row.provider):
                call = self._ready(row)
            if call is not None:
                calls[row.provider] = call
        self.progress.say(f"{self.case.op} {rows[0].mode} · timing {', '.join(calls) or 'nobody'}")
        with notices.listening():
            self._time(rows, calls, notices)
            self._sustain(rows, calls, notices)
            if self.device.type == "cuda":
                self._look_closer(rows, calls, notices)
        _compare(rows)

    def _time(self, rows: list[Row], calls: dict[str, Callable[[], object]], notices: Notices) -> None:
        timings = measure(calls, self.clock, self.budget, notices.turn)
        states = _gpu_states(timings)
        for row in rows:
            if row.provider not in timings:
                continue
            timing = timings[row.provider]
            if timing.failure is not None:
                _refuse(row, timing.failure)
            else:
                row.samples_ms, row.calls_per_sample = timing.samples_ms, timing.inner
                row.samples_per_round = timing.per_round
                row.gpu_state = states[row.provider]

    def _sustain(self, rows: list[Row], calls: dict[str, Callable[[], object]], notices: Notices) -> None:
        """A second measurement, all at the clocks that lasting load leaves them; a failure there is a warning."""
        clock = self.clock.sustained
        fit = [row for row in rows if row.timed and row.median_ms <= LONGEST_SUSTAINED_MS]
        if clock is None or not fit:
            return
        timings = measure({row.provider: calls[row.provider] for row in fit}, clock, SUSTAINED, notices.turn)
        states = _gpu_states(timings)
        for row in fit:
            timing = timings[row.provider]
            if timing.failure is not None:
                row.warnings.append(f"under sustained load: {_say(timing.failure)}")
            else:
                row.sustained_ms, row.sustained_calls = timing.samples_ms, timing.inner
                row.sustained_state = states[row.provider]

    def _look_closer(self, rows: list[Row], calls: dict[str, Callable[[], object]], notices: Notices) -> None:
        """On a GPU: two more clocks for tiny calls."""
        for row in rows:
            if row.timed and row.median_ms < tiny_calls.TINY_MS:
                notices.turn(row.provider)
                row.host_ms = tiny_calls.host_ms(calls[row.provider])
                row.graph_ms = tiny_calls.graph_ms(calls[row.provider])

    def _ready(self, row: Row) -> Callable[[], object] | None:
        """What to time for a row; None, with the reason in the row, where it cannot run or is wrong."""
        try:
            who = provider(row.provider)
            row.reason = too_large(row, self.device)
            if row.reason is not None:
                return None
            workload = self._workload()
            row.useful_flops = workload.flops(row.mode, useful=True)
            row.dense_flops = workload.flops(row.mode, useful=False)
            row.least_bytes = workload.bytes(row.mode)
            row.reason = who.why_not(workload, row.mode)
            if row.reason is not None:
                return None
            made = who.make(workload, row.mode)
            row.label, row.compile_s, row.mask_s = made.label, made.compile_s, made.mask_s
            row.first_call_s = (made.compile_s or 0.0) + self._first_call(row.mode, made, workload)
            if who.attends and self._checks(row.mode) and not self._right(row, workload, made):
                return None
            call = workload.call(row.mode, made)
            row.overhead_us = overhead_us(who, self.case, row.mode, self.device)
            peak, row.memory_method = peak_bytes(call, self.device)
            row.peak_bytes = None if peak is None else peak + made.prepared_bytes
            return call
        except Exception as failure:
            _refuse(row, failure)
            return None

    def _checks(self, mode: str) -> bool:
        """Whether results are held against float64: where that was asked for, and its tables fit."""
        free = estimate.free_bytes(self.device)
        return self.check and (free is None or estimate.check_bytes(self.case, mode, self.device) < free)

    def _first_call(self, mode: str, made: Made, workload: Workload) -> float:
        """Seconds; what it allocates for good is not in the peak of later ones."""
        start = time.perf_counter()
        workload.call(mode, made)()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter() - start

    def _right(self, row: Row, workload: Workload, made: Made) -> bool:
        if made.checked_as is not None:
            op, forward = made.checked_as
            workload = self._workload(op)
            made = dataclasses.replace(made, forward=forward)
        results = workload.results(row.mode, made, poisoned=made.compile_s is None)
        try:
            verdict = workload.check(results)
        except Exception as failure:
            if not _out_of_memory(failure):
                raise
            # The float64 table does not fit; the kernel may.
            return True
        row.correct, row.heads_checked = verdict.ok, verdict.heads_checked
        row.max_error, row.error_share = verdict.worst.max_error, verdict.worst.share
        row.errors = [dataclasses.asdict(each) for each in verdict.agreements]
        row.coarse = not row.ours and not verdict.ok and verdict.worst.share <= COARSE
        if verdict.ok or row.coarse:
            return True
        row.reason = f"wrong: {verdict.worst}"
        return False

    def _workload(self, op: str | None = None) -> Workload:
        """The case's workload, or the same tensors under another operation."""
        case = dataclasses.replace(self.case, op=op or self.case.op)
        if case not in self.workloads:
            self.workloads[case] = workload_of(case, self.device)
        return self.workloads[case]


def _compare(rows: list[Row]) -> None:
    """Speed-ups against the baseline, by the samples of both clocks."""
    base = next((row for row in rows if row.provider == row.baseline and row.timed), None)
    for row in rows:
        if base is not None and row.timed:
            row.speedup, row.speedup_low, row.speedup_high = speedup(base.samples, row.samples)
        if base is not None and base.sustained_ms and row.sustained_ms:
            both = Samples(base.sustained_ms), Samples(row.sustained_ms)
            row.sustained_speedup, row.sustained_low, row.sustained_high = speedup(*both)


def _gpu_states(timings: dict[str, Timing]) -> dict[str, dict[str, str] | None]:
    """Clocks, power and temperature in each provider's turns on a GPU; of now where nothing was read near them."""
    found: dict[str, dict[str, str] | None] = dict.fromkeys(timings)
    on_gpu = [name for name, timing in timings.items() if timing.spans]
    sampler = nvidia_smi.sampler() if on_gpu else None
    if sampler is None:
        return found
    found |= {name: sampler.during(timings[name].spans) for name in on_gpu}
    missing = [name for name in on_gpu if found[name] is None]
    return found | dict.fromkeys(missing, env.gpu_state() if missing else None)


def too_large(row: Row, device: torch.device) -> str | None:
    """Writes down what a row will take; a sentence where that is more than there is."""
    extra = provider(row.provider).extra_bytes(row.case, row.mode, device)
    row.estimated_bytes = estimate.tensor_bytes(row.case, row.mode) + extra
    free = estimate.free_bytes(device)
    if free is None or row.estimated_bytes <= free:
        return None
    return f"does not fit: about {say_bytes(row.estimated_bytes)}, free {say_bytes(free)}"


def _refuse(row: Row, failure: Exception) -> None:
    """Put an exception into a row's cell."""
    if _out_of_memory(failure):
        row.reason = "out of memory"
        return
    words = _say(failure)
    if not row.ours and str(failure).startswith(NO_KERNEL):
        row.reason = "no kernel" if row.warnings else words
    elif isinstance(failure, NoBackward) or (not row.ours and row.mode != "fwd" and _speaks_of_backward(failure)):
        row.reason = str(failure) if isinstance(failure, NoBackward) else f"no backward: {words}"
    else:
        row.reason, row.crashed = words, True
    if row.warnings:
        row.reason += f": {min(row.warnings, key=len)}"


def _say(failure: Exception) -> str:
    lines = str(failure).strip().splitlines()
    return f"{type(failure).__name__}: {lines[0] if lines else 'no message'}"


def _speaks_of_backward(failure: Exception) -> bool:
    """Whether another library says, in its own way, that it has none: built without it, or not written."""
    return isinstance(failure, NotImplementedError) or any(word in str(failure).lower() for word in BACKWARD_WORDS)


def _out_of_memory(failure: Exception) -> bool:
    return isinstance(failure, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(failure)
