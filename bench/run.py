"""The benchmark itself: plan the rows, then for each case check, weigh and time every provider side by side."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from itertools import groupby

import torch

from fastattn.bench import env, estimate, tiny_calls
from fastattn.bench import options as flags
from fastattn.bench.clock import Budget, CpuClock, CudaClock, clock_for, measure
from fastattn.bench.memory import peak_bytes
from fastattn.bench.options import Options
from fastattn.bench.overhead import overhead_us
from fastattn.bench.presets import preset_cases
from fastattn.bench.problem import Made, Problem
from fastattn.bench.progress import Progress
from fastattn.bench.provider import Provider
from fastattn.bench.providers import provider
from fastattn.bench.ratios import paired
from fastattn.bench.rows import Row, say_bytes
from fastattn.bench_cases import DEFAULT_OPS, OPS, BenchCase, bench_cases

SIZE_OPTIONS = ("batch", "num_heads", "num_kv_heads", "q_len", "kv_len", "head_dim", "window")
BASELINE = "sdpa"
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
    default = flags.QUICK_PROVIDERS if options.quick else flags.PROVIDERS
    names = list(dict.fromkeys(options.providers or default))
    if options.baseline is not None and options.baseline not in names:
        names.append(options.baseline)
    baseline = options.baseline or (BASELINE if BASELINE in names else None)
    for name in names:
        provider(name)
    rows = [
        Row(case, mode, name, device.type, baseline=baseline)
        for case, modes in _cases(options, device)
        for mode in options.modes or modes
        for name in names
    ]
    return [row for row in rows if options.only is None or options.only.search(row.name)]


def _cases(options: Options, device: torch.device) -> list[tuple[BenchCase, tuple[str, ...]]]:
    """What to time, and in which modes unless they are named."""
    sizes = {name: getattr(options, name) for name in SIZE_OPTIONS}
    if options.presets:
        given = [name for name, values in {"ops": options.ops, **sizes}.items() if values is not None]
        if given:
            raise ValueError(
                f"presets: {', '.join(options.presets)} bring their own operation and sizes, and {', '.join(given)} "
                f"came too; give one or the other"
            )
        return preset_cases(options.presets, device.type, options.dtypes)
    cases = bench_cases(
        device.type,
        ops=list(OPS) if options.ops == ["all"] else options.ops or list(DEFAULT_OPS),
        dtypes=options.dtypes,
        **sizes,
        quick=options.quick,
    )
    return [(case, ("fwd", "bwd")) for case in cases]


def budget_for(options: Options, device: torch.device) -> Budget:
    given = {"rounds": options.rounds, "min_time": options.min_time, "max_time": options.max_time}
    default = BUDGETS[device.type, options.quick]
    return dataclasses.replace(default, **{name: value for name, value in given.items() if value is not None})


def run(rows: list[Row], options: Options, device: torch.device, progress: Progress) -> Iterator[list[Row]]:
    """Fill the rows, yielding them case by case."""
    clock, budget = clock_for(device), budget_for(options, device)
    for case, group in groupby(rows, key=lambda row: row.case):
        of_case = list(group)
        runner = CaseRunner(case, device, clock, budget, options.check, progress)
        for _, of_mode in groupby(of_case, key=lambda row: row.mode):
            together = list(of_mode)
            if not all(row.done for row in together):  # an earlier run may have timed them
                runner.run(together)
        yield of_case


class CaseRunner:
    """The rows of one case; the problem, its float64 truth and what providers prepared are shared by the modes."""

    def __init__(
        self,
        case: BenchCase,
        device: torch.device,
        clock: CpuClock | CudaClock,
        budget: Budget,
        check: bool,
        progress: Progress,
    ):
        self.case, self.device, self.clock, self.budget, self.check = case, device, clock, budget, check
        self.progress = progress
        self.problem: Problem | None = None
        self.made: dict[str, Made] = {}
        if device.type == "cuda":
            torch.cuda.empty_cache()  # what the last case left in pieces

    def run(self, rows: list[Row]) -> None:
        """All providers of one mode: each made, checked and weighed by itself, then all timed in turns."""
        calls: dict[str, Callable[[], object]] = {}
        for row in rows:
            self.progress.step(f"{row.case.op} {row.mode} · {row.provider}")
            call = self._ready(row)
            if call is not None:
                calls[row.provider] = call
        self.progress.say(f"{self.case.op} {rows[0].mode} · timing {', '.join(calls) or 'nobody'}")
        timings = measure(calls, self.clock, self.budget)
        for row in rows:
            if row.provider not in timings:
                continue
            timing = timings[row.provider]
            if timing.failure is not None:
                _refuse(row, timing.failure)
            else:
                row.samples_ms, row.calls_per_sample = timing.samples_ms, timing.inner
        if self.device.type == "cuda":
            self._look_closer(rows, calls)
        base = next((row for row in rows if row.provider == row.baseline and row.timed), None)
        for row in rows:
            if base is not None and row.timed:
                row.speedup = base.median_ms / row.median_ms
                row.speedup_low, row.speedup_high = paired(base.samples_ms, row.samples_ms) or (None, None)

    def _look_closer(self, rows: list[Row], calls: dict[str, Callable[[], object]]) -> None:
        """On a GPU: its clocks while it is still warm, and two more clocks for tiny calls."""
        state = env.gpu_state()
        for row in rows:
            if row.timed:
                row.gpu_state = state
                if row.median_ms < tiny_calls.TINY_MS:
                    row.host_ms = tiny_calls.host_ms(calls[row.provider])
                    row.graph_ms = tiny_calls.graph_ms(calls[row.provider])

    def _ready(self, row: Row) -> Callable[[], object] | None:
        """What to time for a row; None, with the reason in the row, where it cannot run or is wrong."""
        try:
            who = provider(row.provider)
            row.reason = too_large(row, self.device)
            if row.reason is not None:
                return None
            problem = self._problem()
            row.useful_flops = problem.spec.flops(row.mode, useful=True)
            row.dense_flops = problem.spec.flops(row.mode)
            row.least_bytes = problem.spec.bytes(row.mode)
            row.reason = who.why_not(problem, row.mode)
            if row.reason is not None:
                return None
            made = self._make(who, problem)
            row.label, row.compile_s, row.mask_s = made.label, made.compile_s, made.mask_s
            row.first_call_s = (made.compile_s or 0.0) + self._first_call(row.mode, made, problem)
            if self._checks and not self._right(row, problem, made):
                return None
            call = problem.call(row.mode, made)
            row.overhead_us = overhead_us(who, self.case, row.mode, self.device)
            peak, row.memory_method = peak_bytes(call, self.device)
            row.peak_bytes = None if peak is None else peak + made.prepared_bytes
            return call
        except Exception as failure:
            _refuse(row, failure)
            return None

    @property
    def _checks(self) -> bool:
        """Whether results are held against float64: where that was asked for, and its tables fit."""
        free = estimate.free_bytes(self.device)
        return self.check and (free is None or estimate.check_bytes(self.case, self.device) < free)

    def _first_call(self, mode: str, made: Made, problem: Problem) -> float:
        """Seconds; what it allocates for good is not in the peak of later ones."""
        start = time.perf_counter()
        problem.call(mode, made)()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter() - start

    def _right(self, row: Row, problem: Problem, made: Made) -> bool:
        results = problem.results(row.mode, made, poisoned=made.compile_s is None)
        try:
            verdict = problem.check(results)
        except Exception as failure:
            if not _out_of_memory(failure):
                raise
            # The float64 table does not fit; the kernel may.
            return True
        row.correct, row.heads_checked = verdict.ok, verdict.heads_checked
        row.max_error, row.error_share = verdict.worst.max_error, verdict.worst.share
        row.errors = [dataclasses.asdict(each) for each in verdict.agreements]
        if not verdict.ok:
            row.reason = f"wrong: {verdict.worst}"
        return verdict.ok

    def _problem(self) -> Problem:
        if self.problem is None:
            self.problem = Problem(self.case, self.device)
        return self.problem

    def _make(self, who: Provider, problem: Problem) -> Made:
        if who.name not in self.made:
            self.made[who.name] = who.make(problem)
        return self.made[who.name]


def too_large(row: Row, device: torch.device) -> str | None:
    """Writes down what a row will take; a sentence where that is more than there is."""
    extra = provider(row.provider).extra_bytes(row.case, row.mode, device)
    row.estimated_bytes = estimate.tensor_bytes(row.case, row.mode) + extra
    free = estimate.free_bytes(device)
    if free is None or row.estimated_bytes <= free:
        return None
    return f"does not fit: needs about {say_bytes(row.estimated_bytes)}, {say_bytes(free)} are free"


def _refuse(row: Row, failure: Exception) -> None:
    """Put an exception into a row's cell."""
    if _out_of_memory(failure):
        row.reason = "out of memory"
        return
    lines = str(failure).strip().splitlines()
    row.reason, row.crashed = f"{type(failure).__name__}: {lines[0] if lines else 'no message'}", True


def _out_of_memory(failure: Exception) -> bool:
    return isinstance(failure, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(failure)
