"""What nvidia-smi says beside the benchmark, played by a script: whose turn a line belongs to, and where it is not."""

import datetime
import os
import stat
import sys
import time
from types import SimpleNamespace

import pytest

from fastattn.bench.measure import env, nvidia_smi
from fastattn.bench.measure.clock import CudaClock

NOON = datetime.datetime(2030, 1, 1, 12).timestamp()
PATIENCE = 60.0
NAMES = ["fastattn", "sdpa", "sdpa-cudnn"]

SCRIPT = """#!{python}
import datetime, sys, time
TIMES, VALUES, DEAF = {times!r}, {values!r}, {deaf!r}
def stamp(at):
    return datetime.datetime.fromtimestamp(at).strftime("%Y/%m/%d %H:%M:%S.%f")[:-3]
[query] = [word for word in sys.argv if word.startswith("--query-gpu=")]
wide = "timestamp," in query
if "-lms" not in sys.argv:
    print(", ".join([*["now"] * wide, VALUES[-1]]))
elif DEAF:
    print("Failed to initialize NVML: Driver/library version mismatch")
else:
    assert wide and query.split("=")[1].count(",") == VALUES[0].count(",") + 1
    for at, value in zip(TIMES, VALUES):
        print(f"{{stamp(at)}}, {{value}}", flush=True)
    while not TIMES:
        print(f"{{stamp(time.time())}}, {{VALUES[0]}}", flush=True)
        time.sleep(0.01)
    time.sleep(600)
"""


def line(clock, power, temperature):
    return f"{clock} MHz, 1980 MHz, 3201 MHz, {power:.2f} W, 700.00 W, {temperature}"


@pytest.fixture
def stub(tmp_path, monkeypatch):
    """Puts a script before all else on PATH; with `times` None there is none, and no real one is found."""

    def install(times, values=None, deaf=False):
        values = values or [line(1980, 512.3, 54)]
        if times is None:
            monkeypatch.setattr(nvidia_smi, "shutil", SimpleNamespace(which=lambda name: None))
        else:
            path = tmp_path / "nvidia-smi"
            path.write_text(SCRIPT.format(python=sys.executable, times=times, values=values, deaf=deaf))
            path.chmod(path.stat().st_mode | stat.S_IXUSR)
            monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")

    nvidia_smi.sampler.cache_clear()
    yield install
    started = nvidia_smi.sampler.cache_info().currsize and nvidia_smi.sampler()
    if started:
        started.close()
    nvidia_smi.sampler.cache_clear()


def heard(count):
    """The sampler once it has read so many lines."""
    found, until = nvidia_smi.sampler(), time.monotonic() + PATIENCE
    while len(found.readings) < count and time.monotonic() < until:
        time.sleep(0.01)
    assert len(found.readings) == count
    return found


VALUES = [line(1980, 300, 50), line(1700, 690, 60), line(1900, 400, 52), line(1710, 694, 62), line(1690, 698, 64)]


def test_each_provider_gets_what_was_read_in_its_own_turns(stub):
    stub([NOON + 0.2 * step for step in range(5)], VALUES)
    found = heard(5)
    mine = found.during([(NOON + 0.1, NOON + 0.3), (NOON + 0.5, NOON + 0.9)])
    assert mine == {
        "clocks.sm": "1700 MHz", "clocks.max.sm": "1980 MHz", "clocks.mem": "3201 MHz", "power.draw": "694 W",
        "power.limit": "700 W", "temperature.gpu": "62", "readings": "3",
    }  # fmt: skip
    others = found.during([(NOON - 0.1, NOON + 0.1), (NOON + 0.3, NOON + 0.5)])
    assert others["clocks.sm"] == "1940 MHz" and others["power.draw"] == "350 W" and others["readings"] == "2"


def test_a_turn_between_two_readings_takes_the_nearest_and_says_so(stub):
    stub([NOON, NOON + 0.2], VALUES[:2])
    found = heard(2)
    near = found.during([(NOON + 0.13, NOON + 0.15)])
    assert near["clocks.sm"] == "1700 MHz" and near["readings"] == "0"
    assert found.during([(NOON + 50, NOON + 51)]) is None and found.during([]) is None


def test_what_is_no_number_stays_as_it_is(stub):
    stub([NOON, NOON + 0.2], ["[N/A], 1980 MHz, 3201 MHz, [N/A], 700.00 W, 50"] * 2)
    state = heard(2).during([(NOON, NOON + 1)])
    assert state["clocks.sm"] == "[N/A]" and state["power.limit"] == "700 W"


@pytest.mark.parametrize("words", ["", "Failed to initialize NVML", "1, 2", "soon, 1, 2, 3, 4, 5, 6"])
def test_a_line_that_is_no_reading_is_left_out(words):
    assert nvidia_smi.parsed(words) is None


@pytest.mark.parametrize("said", [None, "Failed to initialize NVML", "1, 2"])
def test_a_silent_nvidia_smi_is_no_state(monkeypatch, said):
    monkeypatch.setattr(env, "_output", lambda command: said)
    assert env.gpu_state() is None


def test_it_ends_with_the_benchmark(stub):
    stub([NOON])
    found = heard(1)
    assert found.process.poll() is None and nvidia_smi.sampler() is found
    found.close()
    assert found.process.poll() is not None and not found.thread.is_alive()


@pytest.mark.parametrize("deaf", [False, True], ids=["in a loop", "single answers alone"])
def test_every_timed_row_has_clocks_power_and_temperature_of_both_clocks(stub, deaf, timed, gpu_clock):
    stub([], deaf=deaf)
    *both, absent = timed("self", "fwd", NAMES, gpu_clock)
    for row in both:
        for state in (row.gpu_state, row.sustained_state):
            assert (state["clocks.sm"], state["temperature.gpu"]) == ("1980 MHz", "54")
            assert state["power.draw"].startswith("512.3") and state["power.draw"].endswith(" W")
    assert absent.reason == "needs CUDA" and absent.gpu_state is None


def test_without_nvidia_smi_there_is_none_and_the_rest_is_timed(stub, timed, gpu_clock):
    stub(None)
    for row in timed("self", "fwd", NAMES, gpu_clock)[:2]:
        assert row.timed and row.sustained_ms and row.gpu_state is None and row.sustained_state is None


def test_no_reading_is_waited_for_between_rounds(stub, monkeypatch, timed, gpu_clock):
    """nvidia-smi is asked by its own process: while calls are timed this one starts none."""
    stub([NOON])
    heard(1)
    during = []
    honest = CudaClock.queue

    def queue(self, call, timing):
        with monkeypatch.context() as patched:
            patched.setattr(env.subprocess, "run", lambda *words, **more: during.append(words))
            return honest(self, call, timing)

    monkeypatch.setattr(CudaClock, "queue", queue)
    assert timed("self", "fwd", NAMES, gpu_clock)[0].timed and not during
