"""Signals before and during a run."""

from __future__ import annotations

import os
import signal

import pytest

from cogtune.errors import Stopped
from cogtune.train.stop_signal import StopSignal


def test_a_signal_before_the_first_step_stops_at_once() -> None:
    with StopSignal(), pytest.raises(Stopped) as caught:
        os.kill(os.getpid(), signal.SIGTERM)
    assert caught.value.exit_code == 143


def test_a_signal_later_is_noted_and_a_second_ctrl_c_does_not_wait() -> None:
    before = signal.getsignal(signal.SIGINT)
    with StopSignal() as stop:
        stop.wait_for_step()
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.number == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.usefixtures("terminal")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_lost_terminal_stops_as_sigterm_does(number: int) -> None:
    with StopSignal(), pytest.raises(Stopped, match=signal.Signals(number).name) as caught:
        os.kill(os.getpid(), number)
    assert caught.value.exit_code == 128 + number
    with StopSignal() as stop:
        stop.wait_for_step()
        os.kill(os.getpid(), number)
        assert stop.number == number


def test_nohup_is_respected(monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignal() as stop:
            stop.wait_for_step()
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.number is None
    finally:
        signal.signal(signal.SIGHUP, before)
