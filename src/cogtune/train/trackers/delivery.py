"""A tracker behind a queue and a thread: neither a slow nor a failing one holds the run, and no failure is silent."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial

from cogtune.language import phrase, tr
from cogtune.train.trackers.base import Outcome, Sample, Tracker

_WAITING = 1000
"""Reports that may wait; later ones are lost."""
_FAILURES = 3
"""Failures in a row after which a tracker gets nothing more."""
_CLOSING = 120.0
"""Seconds that the end of a run waits for a tracker."""
_LONGEST = 300  # characters of a package's error


class Delivery:
    """Hands everything on to a tracker that lives in a thread of its own, from its opening to its close.

    There its package neither replaces this process's signal handlers (SwanLab would) nor holds a training step (MLflow
    waits for its server). What went wrong is told in the caller's thread, with the next report.

    Args:
        opening: opens the tracker; its error is raised here.
        warn: is told what was lost, and why.
    """

    def __init__(self, name: str, opening: Callable[[], Tracker], warn: Callable[[str], None]) -> None:
        self._name, self._warn = name, warn
        self._jobs: queue.Queue[Callable[[Tracker], None] | Outcome] = queue.Queue(_WAITING)
        self._problems: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._refused = self._failed = 0  # reports; the first is counted by the caller's thread, the second by ours
        opened: queue.SimpleQueue[Tracker | BaseException] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, args=(opening, opened), name=name, daemon=True)
        self._thread.start()
        found = opened.get()
        if isinstance(found, BaseException):
            raise found
        self.key, self.place = found.key, found.place

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._put(lambda tracker: tracker.scalars(step, values))

    def samples(self, step: int, samples: Sequence[Sample]) -> None:
        self._put(lambda tracker: tracker.samples(step, samples))

    def final(self, values: Mapping[str, float]) -> None:
        self._put(lambda tracker: tracker.final(values))

    def close(self, outcome: Outcome) -> None:
        """Deliver what waits and close the tracker; give up after two minutes."""
        with suppress(queue.Full):
            self._jobs.put(outcome, timeout=_CLOSING)
            self._thread.join(_CLOSING)
        self._tell()
        if self._thread.is_alive():
            text = tr(
                "{name}: not done after {seconds:.0f} s; the run ends without it", name=self._name, seconds=_CLOSING
            )
            self._warn(text)
        if lost := self._refused + self._failed:
            self._warn(
                tr("{name}: {lost} reports were lost; metrics.jsonl has all numbers", name=self._name, lost=lost)
            )

    def _put(self, job: Callable[[Tracker], None]) -> None:
        self._tell()
        try:
            self._jobs.put_nowait(job)
        except queue.Full:
            self._refused += 1
            if self._refused == 1:
                self._warn(tr("{name}: takes reports more slowly than they come; some are lost", name=self._name))

    def _tell(self) -> None:
        while not self._problems.empty():
            self._warn(self._problems.get())

    def _work(self, opening: Callable[[], Tracker], opened: queue.SimpleQueue[Tracker | BaseException]) -> None:
        try:
            tracker = opening()
        except BaseException as error:  # raised where it is waited for; a package may also call sys.exit
            opened.put(error)
            return
        opened.put(tracker)
        in_a_row = 0
        while not isinstance(job := self._jobs.get(), str):
            found = "" if in_a_row == _FAILURES else _problem(partial(job, tracker))
            if found is None:
                in_a_row = 0
                continue
            self._failed += 1
            if found:
                in_a_row += 1
                self._say(found, in_a_row)
        outcome: Outcome = job
        if found := _problem(lambda: tracker.close(outcome)):
            self._problems.put(tr("{name}: could not be closed: {error}", name=self._name, error=found))

    def _say(self, error: str, in_a_row: int) -> None:
        if in_a_row == _FAILURES:
            template = phrase("{name}: {count} reports in a row failed; it gets no more of this run: {error}")
        elif self._failed == 1:
            template = phrase("{name}: a report could not be delivered; training goes on: {error}")
        else:
            return
        self._problems.put(tr(template, name=self._name, count=in_a_row, error=error))


def _problem(work: Callable[[], None]) -> str | None:
    """Return what a package says went wrong; None if nothing did."""
    try:
        work()
    except BaseException as error:
        return reason(error)
    return None


def reason(error: BaseException) -> str:
    """Return a package's error as one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ..."
