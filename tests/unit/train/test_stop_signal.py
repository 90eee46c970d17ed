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
