"""A GPU's clocks on a GPU that is played: who is called when, without a pause, and the ratio under sustained load."""

import itertools
import json
from dataclasses import dataclass, field

import pytest

from fastattn.bench.cases.operations import BenchCase
from fastattn.bench.measure import run
from fastattn.bench.measure.clock import LEAST_SAMPLES, SUSTAINED, Budget, CudaClock, SustainedClock, Timing, measure
from fastattn.bench.measure.rows import Row
from fastattn.bench.report.ratio_tables import markdown as ratios
from fastattn.bench.report.terminal import print_case, print_legend
from fastattn.bench.report.writers import markdown, write_json
from fastattn.bench.report.writers import read_json as read

LAUNCH_MS = 0.01
"""What a launch costs the host."""


@dataclass
class Gpu:
    """Works through its queue while the host goes on; times in milliseconds. `log`: what the host did, in order."""

    host: float = 0.0
    busy_until: float = 0.0
    idle: float = 0.0
    log: list[str] = field(default_factory=list)

    def launch(self, name, milliseconds):
        self.log.append(name)
        self.host += LAUNCH_MS
        self.idle += max(0.0, self.host - self.busy_until)
        self.busy_until = max(self.host, self.busy_until) + milliseconds

    def event(self):
        return Event(self)

    def synchronize(self):
        self.log.append("synchronize")
        self.host = max(self.host, self.busy_until)

    def now(self):
        return self.host / 1e3


class Event:
    def __init__(self, gpu):
        self.gpu, self.broken = gpu, False

    def record(self):
        self.at = self.gpu.busy_until

    def synchronize(self):
        self.gpu.log.append("wait")
        self.gpu.host = max(self.gpu.host, self.at)

    def elapsed_time(self, other):
        return other.at - self.at


def calls_of(gpu, **milliseconds):
    return {name: (lambda name=name, ms=ms: gpu.launch(name, ms)) for name, ms in milliseconds.items()}


def cold(gpu):
    return CudaClock(lambda: gpu.launch("flush", 0.05), gpu)


def test_a_call_has_cold_caches_and_its_samples_belong_together():
    gpu = Gpu()
    timings = measure(calls_of(gpu, a=1.0), cold(gpu), Budget(rounds=10, min_time=0.0, max_time=9))
    timing = timings["a"]
    assert timing.samples_ms == pytest.approx([1.0] * len(timing.samples_ms)) and timing.per_round > 1
    assert len(timing.samples_ms) % timing.per_round == 0 and len(timing.samples_ms) >= 10
    work = [each for each in gpu.log[gpu.log.index("synchronize") + 1 :] if each != "wait"]
    assert work == ["flush", "a"] * (len(work) // 2)


@pytest.mark.parametrize("kind", ["cold", "sustained"])
def test_between_rounds_and_providers_the_gpu_has_no_pause(kind):
    gpu = Gpu()
    clock = cold(gpu) if kind == "cold" else SustainedClock(gpu)
    marks = []

    def turn(name):
        marks.append((len(gpu.log), gpu.idle))

    names = {"a": 1.0, "b": 2.0, "c": 0.5}
    measure(calls_of(gpu, **names), clock, Budget(rounds=20, min_time=0.0, max_time=9), turn)
    begun, idle = marks[len(names)]  # behind the turns of the warm-up
    assert gpu.idle - idle <= 2 * LAUNCH_MS, "the GPU waited for the host"
    assert "synchronize" not in gpu.log[begun:]
    # Whoever is waited for, the next turn is already queued.
    first_wait = gpu.log.index("wait", begun)
    assert {"a", "b"} <= set(gpu.log[begun:first_wait])


def test_under_sustained_load_turns_follow_each_other_without_a_flush():
    gpu = Gpu()
    timings = measure(calls_of(gpu, a=2.0, b=4.0), SustainedClock(gpu), SUSTAINED)
    assert "flush" not in gpu.log
    assert (timings["a"].inner, timings["b"].inner) == (5, 2)
    assert timings["a"].samples_ms == pytest.approx([2.0] * len(timings["a"].samples_ms), rel=0.01)
    assert timings["b"].samples_ms == pytest.approx([4.0] * len(timings["b"].samples_ms), rel=0.01)
    work = "".join(each for each in gpu.log if each != "wait").removeprefix("aabb")  # two calls of each warm up
    assert work.startswith("aaaaa" + "bb" + "bb" + "aaaaa" + "aaaaa" + "bb"), "in turns, and the order turns"
    assert min(len(each.samples_ms) for each in timings.values()) >= SUSTAINED.rounds


@pytest.mark.parametrize("milliseconds, inner", [(0.001, 64), (0.5, 20), (3.0, 3), (80.0, 1)])
def test_a_sample_under_load_holds_as_many_calls_as_last_ten_milliseconds(milliseconds, inner):
    gpu, timing = Gpu(), Timing()
    SustainedClock(gpu).warm_up(calls_of(gpu, a=milliseconds)["a"], timing)
    assert timing.inner == pytest.approx(inner, abs=1)


def test_a_slow_provider_gets_its_three_samples_and_no_more():
    gpu = Gpu()
    timings = measure(calls_of(gpu, slow=900.0, quick=1.0), SustainedClock(gpu), SUSTAINED)
    assert LEAST_SAMPLES <= len(timings["slow"].samples_ms) <= LEAST_SAMPLES + 1
    assert len(timings["quick"].samples_ms) >= SUSTAINED.rounds


@pytest.mark.parametrize("kind", ["cold", "sustained"])
@pytest.mark.parametrize("at", [1, 3, 9])
def test_a_call_that_raises_keeps_its_failure_and_the_others_go_on(kind, at):
    gpu, count = Gpu(), 0
    clock = cold(gpu) if kind == "cold" else SustainedClock(gpu)

    def bad():
        nonlocal count
        count += 1
        if count >= at:
            raise RuntimeError("no")
        gpu.launch("bad", 1.0)

    calls = {"first": calls_of(gpu, first=1.0)["first"], "bad": bad, "last": calls_of(gpu, last=2.0)["last"]}
    timings = measure(calls, clock, Budget(rounds=10, min_time=0.0, max_time=9))
    assert str(timings["bad"].failure) == "no" and count == at, "and it is not called again"
    for name in ("first", "last"):
        assert timings[name].failure is None and len(timings[name].samples_ms) >= 10


def test_what_comes_to_light_while_waiting_is_the_failure_of_whose_turn_it_was():
    gpu = Gpu()
    clock = SustainedClock(gpu)
    honest = clock.queue

    class Broken(Event):
        def synchronize(self):
            raise RuntimeError("illegal instruction")

    def queue(call, timing):
        pairs = honest(call, timing)
        if timing is timings[1]:
            pairs[-1][1].__class__ = Broken
        return pairs

    clock.queue = queue
    timings = [Timing(), Timing(), Timing()]
    for timing in timings:
        clock.sample(lambda: gpu.launch("a", 1.0), timing)
    clock.finish()
    assert [str(timing.failure or "") for timing in timings] == ["", "illegal instruction", ""]
    assert [len(timing.samples_ms) for timing in timings] == [1, 0, 1]


def test_spans_say_when_whose_turn_was():
    gpu = Gpu()
    timings = measure(calls_of(gpu, a=10.0, b=10.0), SustainedClock(gpu), Budget(4, 0.0, 9))
    spans = sorted((start, end, name) for name, timing in timings.items() for start, end in timing.spans)
    assert all(after[0] == before[1] for before, after in itertools.pairwise(spans)), "one behind the other"
    assert "".join(name for *_, name in spans)[:6] == "abbaab"
    assert all(end - start == pytest.approx(0.01, abs=1e-3) for start, end, _ in spans)


@pytest.fixture
def no_smi(monkeypatch):
    monkeypatch.setattr(run.nvidia_smi, "sampler", lambda: None)


def test_a_row_of_a_gpu_has_both_ratios_and_a_cpus_one(no_smi, timed, gpu_clock):
    ours, other = timed("self", "fwd", ["fastattn", "sdpa"], gpu_clock)
    for row in (ours, other):
        assert len(row.sustained_ms) >= LEAST_SAMPLES and row.sustained_calls >= 1 and row.gpu_state is None
    assert other.sustained_speedup == 1.0 and 0 < ours.sustained_low <= ours.sustained_high
    record = ours.record()
    assert record["sustained_median_ms"] > 0 and record["sustained_tflops"] > 0
    assert Row.of(record) == ours
    for row in timed("self", "fwd", ["fastattn", "sdpa"]):
        assert row.speedup and row.sustained_ms == [] and row.sustained_speedup is None


def test_what_fails_under_load_alone_keeps_its_usual_time_and_says_so(no_smi, monkeypatch, timed, gpu_clock):
    honest = SustainedClock.queue

    def queue(self, call, timing):
        if timing.samples_ms:
            raise RuntimeError("too hot")
        return honest(self, call, timing)

    monkeypatch.setattr(SustainedClock, "queue", queue)
    for row in timed("self", "fwd", ["fastattn", "sdpa"], gpu_clock):
        assert row.timed and row.sustained_ms == [] and row.warnings == ["under sustained load: RuntimeError: too hot"]


def test_calls_that_are_too_long_are_not_repeated_under_load(no_smi, monkeypatch, timed, gpu_clock):
    monkeypatch.setattr(run, "LONGEST_SUSTAINED_MS", 0.0)
    for row in timed("self", "fwd", ["fastattn", "sdpa"], gpu_clock):
        assert row.timed and row.sustained_ms == []


CASE = BenchCase("self", "bf16", 1, 16, 16, 16384, 16384, 128)
MACHINE = {
    "gpu": "H200", "cpu": "", "threads": 1, "torch": "2", "python": "3", "fastattn": "0", "commit": None, "dirty": None,
    "date": "2030-01-01T00:00:00", "command": "x", "busy": False,
}  # fmt: skip


def rows(sustained=True):
    lasting = {
        "fastattn": ([3.4] * 12, 1.06, 1.05, 1.07),
        "sdpa-cudnn": ([3.6] * 12, 1.0, 1.0, 1.0),
    }
    names = ("sustained_ms", "sustained_speedup", "sustained_low", "sustained_high")
    return [
        Row(CASE, "fwd", name, "cuda", samples_ms=[ms] * 10, samples_per_round=5, baseline="sdpa-cudnn", correct=True,
            max_error=0.06, useful_flops=10**12, speedup=3.2 / ms, speedup_low=3.1 / ms, speedup_high=3.3 / ms,
            **(dict(zip(names, lasting[name], strict=True)) if sustained else {}))
        for name, ms in (("fastattn", 3.0), ("sdpa-cudnn", 3.2))
    ]  # fmt: skip


@pytest.mark.parametrize("width", [80, 120])
def test_the_table_has_a_column_for_it_where_there_are_figures(width, capsys):
    from rich.console import Console

    console = Console(width=width, highlight=False, markup=False)
    print_case(console, rows(), first_of_op=True)
    print_legend(console, rows())
    said = capsys.readouterr().out
    title, ours, _ = said.split("self")[1].splitlines()[1:4]
    assert "sustained" in title and ours.index("1.06x") + 5 == title.index("sustained") + 9
    assert "✓ 6.0e-02" in ours and max(map(len, said.splitlines())) <= width and "Sustained: the" in said
    print_case(console, rows(sustained=False), first_of_op=True)
    print_legend(console, rows(sustained=False))
    assert "ustained" not in capsys.readouterr().out


def test_markdown_has_it_too_where_there_are_figures():
    text = markdown(rows(), MACHINE)
    assert "3.00 ms (1.07x, sustained 1.06x)" in text and "| vs sdpa-cudnn | sustained |" in text
    assert "1.06x [1.05, 1.07]" in text
    [head, align, *lines] = text[text.index("| case | mode | provider") :].strip().splitlines()
    assert {line.count("|") for line in (head, align, *lines)} == {head.count("|")}
    assert "ustained" not in markdown(rows(sustained=False), MACHINE)
    both = ratios(rows())
    assert both[0].endswith("| 95% interval | under sustained load |") and both[2].endswith("| 1.06x (1.06 to 1.06) |")
    assert {line.count("|") for line in both} == {both[0].count("|")}
    assert "ustained" not in "".join(ratios(rows(sustained=False)))


def test_a_file_without_these_fields_is_read(tmp_path):
    path = tmp_path / "run.json"
    write_json(path, rows(), MACHINE, {}, None)
    whole = json.loads(path.read_text())
    assert read(path)[0] == rows()
    for record in whole["rows"]:
        for name in [name for name in record if name.startswith("sustained") or name == "warnings"]:
            del record[name]
    path.write_text(json.dumps(whole))
    assert read(path)[0] == rows(sustained=False)
