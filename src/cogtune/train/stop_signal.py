"""SIGTERM, SIGHUP and Ctrl-C end a run between two steps, after its state is saved."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from cogtune.errors import Stopped
from cogtune.language import phrase, tr

_CONTINUES = phrase("run the same command again: it continues from there")


def is_hang_up_heard() -> bool:
    """Return whether this process would get SIGHUP: the system has it, and nobody asked to ignore it."""
    return hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN


class StopSignal:
    """Handler of SIGTERM, Ctrl-C and SIGHUP, which a terminal sends when it is closed or its connection is lost.

    An ignored SIGHUP stays ignored: ``nohup`` asks for that.

    Before `wait_for_step` there is nothing to save, and a signal ends the run at once. After it, a signal is recorded,
    and the loop stops at the end of its step, after saving. A second Ctrl-C ends the run immediately.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self._waits = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():  # Python allows handlers nowhere else
            hang_up = [signal.SIGHUP] if is_hang_up_heard() else []
            for number in (signal.SIGTERM, signal.SIGINT, *hang_up):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def wait_for_step(self) -> None:
        self._waits = True

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self._waits:
            raise Stopped(
                number, tr("stopped by {name} before the first step; nothing to save", name=signal.Signals(number).name)
            )
        if number == signal.SIGINT and self.number == signal.SIGINT:
            raise KeyboardInterrupt
        self.number = number

    @staticmethod
    def stopped(number: int, where: str) -> Stopped:
        return Stopped(
            number, tr("stopped by {name}; {where}", name=signal.Signals(number).name, where=where), hint=tr(_CONTINUES)
        )
