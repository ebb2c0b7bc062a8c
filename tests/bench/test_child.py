"""Children that end well, badly, too late, or not at all."""

import os
import select
import sys
import time

import pytest

from fastattn.bench.gpu.child import Child


def python(code, seconds=1e3, silence=1e3, now=time.monotonic, **variables):
    return Child([sys.executable, "-c", code], seconds, silence, variables, now)


class Clock:
    """Stands still until it is told, however slow the machine is."""

    at = 0.0

    def __call__(self):
        return self.at


def test_lines_come_as_they_are_said_and_both_streams_count():
    child = python("import sys; print('one'); print('two', file=sys.stderr); print()")
    assert list(child.lines()) == ["one", "two", ""]
    assert child.ending.well and child.ending.code == 0 and child.ending.words == ""


@pytest.mark.parametrize(
    ("code", "ending", "words"),
    [
        ("raise SystemExit(3)", 3, "ended with 3"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", -11, "was killed by SIGSEGV"),
    ],
    ids=["exit code", "signal"],
)
def test_a_bad_end_says_how(code, ending, words):
    child = python(f"print('last word'); import sys; sys.stdout.flush(); {code}")
    assert list(child.lines()) == ["last word"]
    assert (child.ending.code, child.ending.words, child.ending.tail) == (ending, words, ("last word",))


@pytest.mark.parametrize(
    ("limits", "words"),
    [({"seconds": 1.0}, "took longer than 1 s"), ({"silence": 1.0}, "said nothing for 1 s")],
    ids=["time", "silence"],
)
def test_what_does_not_end_is_stopped_with_all_that_it_started(limits, words, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    inner = f"import time; held = open({str(tmp_path / 'pipe')!r}, 'wb'); print(1, flush=True); time.sleep(1e4)"
    clock = Clock()
    child = python(f"import subprocess, sys; subprocess.run([sys.executable, '-c', {inner!r}])", now=clock, **limits)
    end = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    try:
        for line in child.lines():
            assert line == "1" and not select.select([end], [], [], 0)[0]
            clock.at = 1.0
        assert child.ending.code is None and child.ending.words == words
        assert select.select([end], [], [], 100)[0] and os.read(end, 1) == b""  # nobody holds it any more
    finally:
        os.close(end)


def test_words_keep_the_time_of_silence_away():
    clock, lines = Clock(), []
    for line in (child := python("for n in range(6): print(n)", silence=1.2, now=clock)).lines():
        lines.append(line)
        clock.at += 1.0
    assert len(lines) == 6 and child.ending.well


def test_leaving_early_stops_it():
    child = python("import time; print('on', flush=True); time.sleep(60)")
    lines = child.lines()
    assert next(lines) == "on"
    lines.close()
    assert child.ending.code is None and child.ending.words == "was left early"


def test_variables_reach_it():
    assert list(python("import os; print(os.environ['GIVEN'])", GIVEN="here").lines()) == ["here"]
