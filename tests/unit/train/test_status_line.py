"""The line at the bottom of a terminal."""

from __future__ import annotations

import io
import re
import sys
import time

import pytest

from cogtune.system.terminal import protected
from cogtune.train.log import console, log
from cogtune.train.status_line import StatusLine, status


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def terminal_of(monkeypatch: pytest.MonkeyPatch) -> _Terminal:
    """Make standard output a terminal. Called in a test: pytest sets its own between fixtures and the test."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "60")
    out = _Terminal()
    monkeypatch.setattr(sys, "stdout", out)
    return out


def test_the_line_stands_below_what_is_printed_and_goes_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = terminal_of(monkeypatch)
    line = StatusLine()
    with line.on_terminal():
        assert line.active
        line.show("step 3 \x1b[31m" + "x" * 100)
        print("a line of the log")
        time.sleep(0.6)
    shown = terminal.getvalue()
    assert "a line of the log\n" in shown
    assert "step 3 " in shown
    assert "\x1b[31m" not in shown, "what data says is not obeyed"
    assert "x" * 60 not in shown, "one line"
    assert not line.active
    assert shown.endswith("\x1b[2K"), "erased"


def test_below_the_command_line_too_its_escapes_are_obeyed_and_those_of_data_are_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    r"""Every training on a terminal was full of `\u001b[2K`: what protects the streams took rich's for data's."""
    terminal = terminal_of(monkeypatch)
    with protected(), console(0):
        status.show("step 3 \x1b[31m")
        log.info("a name \x1b]0;title\x07 \x9b31m and " + "a long path/" * 9)
        time.sleep(0.6)
    shown = terminal.getvalue()
    assert "\\u001b[2K" not in shown
    assert shown.endswith("\x1b[2K"), "erased"
    assert "a name \\u001b]0;title\\u0007 \\u009b31m and " + "a long path/" * 9 in shown, "shown, and not broken"
    assert "step 3 \\u001b[31m" in shown


def test_a_stage_counts_its_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = terminal_of(monkeypatch)
    line = StatusLine()
    with line.on_terminal():
        line.stage("validating")
        time.sleep(1.3)
    assert "validating  0:00:01" in terminal.getvalue()


def test_a_stage_says_how_far_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal, kinds = terminal_of(monkeypatch), [1]
    line = StatusLine()
    with line.on_terminal():
        line.stage("compiling", lambda: f" (kind {kinds[0]})")
        time.sleep(0.4)
        kinds[0] = 2
        time.sleep(0.4)
        line.show("step 1")
        time.sleep(0.4)
    shown = terminal.getvalue()
    assert "compiling (kind 1)  0:00:00" in shown
    assert "compiling (kind 2)" in shown
    assert "step 1 (kind" not in shown


def test_elsewhere_nothing_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    with status.on_terminal():
        status.show("step 3")
        assert not status.active
    assert capsys.readouterr().out == ""


def test_a_terminal_keeps_few_lines_of_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = terminal_of(monkeypatch)
    with console(0):
        for number in range(5):
            log.info("step %d", number, extra={"step_line": True, "kept": number == 4})
        log.info("saved")
        log.warning("careful")
    lines = re.sub(r"\x1b\[[?\d;]*[A-Za-z]|\r", "", terminal.getvalue()).split("\n")
    assert [line for line in lines if line.startswith(("step", "saved", "warning"))] == [
        "step 0", "step 4", "saved", "warning: careful",
    ]  # fmt: skip
