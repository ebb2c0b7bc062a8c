"""Children that end well, badly, too late, or not at all."""

import sys
import time

import pytest

from fastattn.bench.child import Child


def python(code, seconds=20.0, silence=20.0, **variables):
    return Child([sys.executable, "-c", code], seconds, silence, variables)


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
    sign = tmp_path / "alive"
    inner = f"import time, pathlib; time.sleep(2); pathlib.Path({str(sign)!r}).touch()"
    code = f"import subprocess, sys; print(1, flush=True); subprocess.run([sys.executable, '-c', {inner!r}])"
    start = time.monotonic()
    child = python(code, **limits)
    assert list(child.lines()) == ["1"]
    assert child.ending.code is None and child.ending.words == words
    assert time.monotonic() - start < 2
    time.sleep(max(0.0, 2.5 - (time.monotonic() - start)))
    assert not sign.exists()


def test_words_keep_the_time_of_silence_away():
    child = python("import time\nfor n in range(6): print(n, flush=True); time.sleep(0.3)", silence=1.2)
    assert len(list(child.lines())) == 6 and child.ending.well


def test_leaving_early_stops_it():
    child = python("import time; print('on', flush=True); time.sleep(60)")
    lines = child.lines()
    assert next(lines) == "on"
    lines.close()
    assert child.ending.code is None and child.ending.words == "was left early"


def test_variables_reach_it():
    assert list(python("import os; print(os.environ['GIVEN'])", GIVEN="here").lines()) == ["here"]
