"""Progress of a run: a bar on a terminal, plain lines elsewhere."""

import io

import pytest

pytest.importorskip("rich", reason="the bar is rich's")

from rich.console import Console

from fastattn.bench.measure.progress import progress_on


def steps(file, total, **console):
    with progress_on(Console(file=file, width=100, **console), total) as progress:
        for each in range(total):
            progress.step(f"row {each + 1}")
        progress.say("at the end")


def test_elsewhere_each_step_is_a_plain_line_on_stderr(capsys):
    table = io.StringIO()
    steps(table, 3, force_terminal=False)
    assert capsys.readouterr().err == "[1/3] row 1\n[2/3] row 2\n[3/3] row 3\n" and table.getvalue() == ""


def test_of_many_steps_every_tenth_and_the_last_are_lines(capsys):
    steps(io.StringIO(), 105, force_terminal=False)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [f"[{each}/105] row {each}" for each in (*range(10, 101, 10), 105)]


def test_a_terminal_gets_a_bar_that_is_gone_at_the_end(capsys):
    screen = io.StringIO()
    steps(screen, 3, force_terminal=True)
    shown = screen.getvalue()
    assert "at the end" in shown and "2/3" in shown  # the third is at work
    assert shown.rindex("\x1b[2K") > shown.rindex("at the end")  # erased
    assert not any(capsys.readouterr())


@pytest.mark.parametrize("terminal", [False, True], ids=["lines", "bar"])
def test_what_fails_within_is_raised(terminal):
    with pytest.raises(KeyboardInterrupt), progress_on(Console(file=io.StringIO(), force_terminal=terminal), 3):
        raise KeyboardInterrupt
