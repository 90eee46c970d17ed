"""Threads that compute answers end before the interpreter does.

A daemon thread runs on while the interpreter exits, and is ended inside PyTorch, which aborts the process: "terminate
called without an active exception", exit status 134.
"""

from __future__ import annotations

import atexit
import weakref
from typing import Protocol


class Worker(Protocol):
    """Owns a thread that computes answers."""

    def abandon(self) -> None:
        """End its answers after the token being computed, and wait for that."""


_workers: weakref.WeakSet[Worker] = weakref.WeakSet()


def end_at_exit(worker: Worker) -> None:
    """Call ``worker.abandon()`` when the interpreter exits, unless nothing refers to the worker any more by then."""
    _workers.add(worker)


@atexit.register
def _abandon_all() -> None:
    for worker in list(_workers):
        worker.abandon()
