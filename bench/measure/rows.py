"""One row of the benchmark: a provider on a case in a mode; what came out, and how it reads."""

from __future__ import annotations

import dataclasses
import statistics
from dataclasses import dataclass, field
from typing import Any

from fastattn.bench.cases.operations import BenchCase
from fastattn.bench.measure.clock import quartiles
from fastattn.bench.measure.ratios import Interval, Samples

BACKEND_KEY = "room"
"""The backend's key in the JSON of `fastattn check`, `fastattn models` and `make gpu`: kept files have it."""


@dataclass
class Row:
    """Times in milliseconds a call, memory in bytes, floating-point operations by `AttnSpec`.

    `first_call_s`: seconds of the first call of this mode, with what it compiles or builds. `mask_s`: seconds that the
    mask took in this provider's form. `overhead_us`: microseconds of the host for a call that does next to nothing.
    `graph_ms`, `host_ms`: a tiny call on a GPU by two more clocks. `gpu_state`: clocks, power and temperature in its
    turns. `speedup_low`, `speedup_high`: the 95% interval of the speed-up. `sustained_...`: the same figures under
    lasting load, `sustained_calls` calls a sample; empty where that was not measured. `warnings`: what the provider
    warned of, each sentence once. `coarse`: another library's result beyond the
    tolerance, yet so near that it is timed.
    Exactly one of `reason` (why there is no time) and `samples_ms` is filled once the row has run.
    """

    case: BenchCase
    mode: str
    provider: str
    device: str
    label: str = ""
    reason: str | None = None
    crashed: bool = False
    correct: bool | None = None
    max_error: float | None = None
    error_share: float | None = None
    coarse: bool = False
    errors: list[dict[str, Any]] = field(default_factory=list)
    heads_checked: int | None = None
    compile_s: float | None = None
    first_call_s: float | None = None
    mask_s: float | None = None
    overhead_us: float | None = None
    samples_ms: list[float] = field(default_factory=list)
    calls_per_sample: int = 1
    samples_per_round: int = 1
    speedup: float | None = None
    speedup_low: float | None = None
    speedup_high: float | None = None
    useful_flops: int | None = None
    dense_flops: int | None = None
    least_bytes: int | None = None
    graph_ms: float | None = None
    host_ms: float | None = None
    gpu_state: dict[str, str] | None = None
    sustained_ms: list[float] = field(default_factory=list)
    sustained_calls: int | None = None
    sustained_speedup: float | None = None
    sustained_low: float | None = None
    sustained_high: float | None = None
    sustained_state: dict[str, str] | None = None
    warnings: list[str] = field(default_factory=list)
    peak_bytes: int | None = None
    memory_method: str | None = None
    estimated_bytes: int | None = None
    baseline: str | None = None

    @property
    def name(self) -> str:
        """What --only looks at."""
        return f"{self.case.name}/{self.mode}/{self.provider}"

    @property
    def who(self) -> str:
        """The provider, and for fastattn's free choice the backend that it took."""
        return f"{self.provider} ({self.label})" if self.label and self.provider == "fastattn" else self.provider

    @property
    def timed(self) -> bool:
        return bool(self.samples_ms)

    @property
    def done(self) -> bool:
        """Whether its turn has come: it was timed, or says why not."""
        return self.timed or self.reason is not None

    @property
    def ours(self) -> bool:
        """A row of fastattn's, by choice or by backend."""
        return self.provider.startswith("fastattn")

    @property
    def wrong(self) -> bool:
        """Not to be timed: a wrong result or a crash."""
        return self.crashed or (self.correct is False and not self.coarse)

    @property
    def failed(self) -> bool:
        """A wrong result or a crash of fastattn's own; what another library does wrong is a cell that says so."""
        return self.ours and self.wrong

    @property
    def median_ms(self) -> float:
        return statistics.median(self.samples_ms)

    @property
    def samples(self) -> Samples:
        return Samples(self.samples_ms, self.samples_per_round)

    @property
    def quartiles_ms(self) -> tuple[float, float]:
        return quartiles(self.samples_ms)

    @property
    def tie(self) -> bool:
        """Whether the interval of its speed-up spans 1: neither it nor the baseline is shown to be faster."""
        return self._ties(self.speedup_low, self.speedup_high)

    @property
    def sustained_tie(self) -> bool:
        """The same under sustained load."""
        return self._ties(self.sustained_low, self.sustained_high)

    def _ties(self, low: float | None, high: float | None) -> bool:
        return low is not None and high is not None and self.provider != self.baseline and Interval(low, high).tie

    @property
    def spread(self) -> float:
        """Interquartile range as a share of the median."""
        low, high = self.quartiles_ms
        return (high - low) / self.median_ms

    def tflops(self, milliseconds: float | None = None, *, dense: bool = False) -> float:
        """Useful TFLOP/s: operations on visible pairs alone; dense-equivalent ones count all pairs."""
        flops = self.dense_flops if dense else self.useful_flops
        return (flops or 0) / ((milliseconds or self.median_ms) * 1e9)

    @property
    def command(self) -> str:
        """A command that runs this row again, beside its baseline."""
        case = self.case
        window = f" -W {case.window}" if case.window is not None else ""
        values = f" --head-dim-v {case.head_dim_v}" if case.head_dim_v is not None else ""
        providers = ",".join(dict.fromkeys([self.provider, self.baseline or self.provider]))
        return (
            f"fastattn bench --op {case.op} --dtype {case.dtype} --mode {self.mode} -B {case.batch} "
            f"-H {case.num_heads} --kv-heads {case.num_kv_heads} "
            f"-N {case.q_len} -M {case.kv_len} -D {case.head_dim}{values}{window} "
            f"--providers {providers} --baseline {self.baseline or self.provider} --device {self.device}"
        )

    @classmethod
    def of(cls, record: dict[str, Any]) -> Row:
        """The row that `record` was made from, as far as it was kept."""
        parts = [{each.name for each in dataclasses.fields(kind)} for kind in (BenchCase, cls)]
        case, row = ({name: value for name, value in record.items() if name in part} for part in parts)
        return cls(BenchCase(**case), **row)

    def record(self) -> dict[str, Any]:
        """The row as plain JSON types, derived figures included."""
        record = {
            "name": self.name,
            **dataclasses.asdict(self.case),
            **dataclasses.asdict(self),
            "command": self.command,
        }
        del record["case"]
        timed = self.timed
        sustained = statistics.median(self.sustained_ms) if self.sustained_ms else None
        low, high = self.quartiles_ms if timed else (None, None)
        return record | {
            "median_ms": self.median_ms if timed else None,
            "q1_ms": low,
            "q3_ms": high,
            "tie": self.tie,
            "sustained_median_ms": sustained,
            "sustained_tie": self.sustained_tie,
            "sustained_tflops": None if sustained is None else self.tflops(sustained),
            "tflops": self.tflops() if timed else None,
            "dense_tflops": self.tflops(dense=True) if timed else None,
            "gb_per_s": (self.least_bytes or 0) / (self.median_ms * 1e6) if timed else None,
        }


def say_time(milliseconds: float) -> str:
    if milliseconds < 1:
        return f"{three(1e3 * milliseconds)} µs"
    if milliseconds < 1000:
        return f"{three(milliseconds)} ms"
    return f"{three(milliseconds / 1e3)} s"


def say_bytes(count: int | None) -> str:
    if count is None:
        return "-"
    units = ("KiB", "MiB", "GiB", "TiB")
    step = min(max(0, (count.bit_length() - 1) // 10 - 1), len(units) - 1)
    return f"{three(count / (1 << 10 * (step + 1)))} {units[step]}"


def three(number: float) -> str:
    """Three significant digits, never an exponent."""
    if number == 0:
        return "0"
    decimals = 0
    while number < 10 ** (2 - decimals) and decimals < 6:
        decimals += 1
    return f"{number:.{decimals}f}"


def rate_unit(device: str) -> tuple[str, float]:
    """The unit of rates on a device, and how many of it are a TFLOP/s."""
    return ("GFLOP/s", 1e3) if device == "cpu" else ("TFLOP/s", 1.0)


def say_rate(row: Row, *, dense: bool = False) -> str:
    """In its device's unit."""
    return three(rate_unit(row.device)[1] * row.tflops(dense=dense))


def say_speedup(ratio: float) -> str:
    return f"{three(ratio)}x" if ratio >= 10 else f"{ratio:.2f}x" if ratio >= 0.1 else f"{ratio:.3f}x"


def say_against(row: Row) -> str:
    """The speed-up; ties are marked. Nothing for the baseline itself."""
    if row.speedup is None or row.provider == row.baseline:
        return ""
    return say_speedup(row.speedup) + (", tie" if row.tie else "")


def say_sustained(row: Row) -> str:
    """The speed-up under sustained load, likewise; nothing where it was not measured."""
    if row.sustained_speedup is None or row.provider == row.baseline:
        return ""
    return say_speedup(row.sustained_speedup) + (", tie" if row.sustained_tie else "")


def say_warnings(rows: list[Row]) -> list[str]:
    """What providers warned of and ran nevertheless, a line each; who failed has it in the row's own cell."""
    found: dict[tuple[str, str], int] = {}
    for row in rows:
        for each in row.warnings if row.timed else ():
            found[row.provider, each] = found.get((row.provider, each), 0) + 1
    return [f"{who} warned in {count} row{'s' * (count > 1)}: {each}" for (who, each), count in found.items()]


def say_error(row: Row) -> str:
    if row.correct is None:
        return "unchecked" if row.timed else ""
    shown = "" if row.max_error is None or row.max_error != row.max_error else f" {row.max_error:.1e}"
    return ("✓" if row.correct else "~" if row.coarse else "✗") + shown
