"""Another process that holds a lock, and can be killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def holder(
    place: Path, kind: str = "folder", *, forks: bool = False, flock: bool = True
) -> Iterator[subprocess.Popen[str]]:
    """A process with the lock on ``place`` (``kind``: folder or beside).

    ``forks``: with a child that outlives it. ``flock``: False for a disk that has none.
    """
    code = f"""
import fcntl, os, sys, time
from pathlib import Path
from cogtune.system import locks
if not {flock}:
    def none(*a): raise OSError(37, "No locks available")
    fcntl.flock = none
lock = locks.lock_{kind}(Path({str(place)!r}), "wait")
if {forks} and os.fork() == 0:
    time.sleep(60)
    os._exit(0)
print("held", flush=True)
sys.stdin.read()
"""
    with subprocess.Popen(
        [sys.executable, "-c", code, "train", "run.yaml"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        try:
            yield process
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def kill(process: subprocess.Popen[str]) -> None:
    """SIGKILL, and wait until it is gone."""
    process.kill()
    process.wait()
