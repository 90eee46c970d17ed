"""``cogtune predict --cards N``: one process per card, each with its share of the data."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from cogtune.errors import RunError, Stopped
from cogtune.generate.shares import answered
from cogtune.language import tr

_POLL_SECONDS = 1.0
_END_SECONDS = 30.0


def run_shares(
    words: Sequence[str], count: int, output: Path, total: int, progress: Callable[[int, int], None]
) -> None:
    """Run ``cogtune predict WORDS --share K/N`` for every K, each on a card of its own, and wait.

    If one fails or this process is stopped, all end; what they answered stays in their files.

    Raises:
        RunError: a process failed; its own error stands above.
    """
    own = _without(words, "--cards", "--captions")
    running: list[subprocess.Popen[bytes]] = []
    done = -1
    before = signal.signal(signal.SIGTERM, _stop)  # by itself it would leave the processes behind
    try:
        running += (_start(own, number, count) for number in range(count))
        while not _failed(running) and any(process.poll() is None for process in running):
            time.sleep(_POLL_SECONDS)
            if (now := answered(output, count)) != done:
                progress(done := now, total)
        failed = _failed(running)
    finally:
        _end(running)
        signal.signal(signal.SIGTERM, before)
    for number in failed[:1]:
        raise RunError(
            tr("process {number} of {count} ended with exit code {code}", number=number, count=count,
               code=running[number].returncode),
            hint=tr("its error is shown above; run the same command again, and it continues"),
        )  # fmt: skip


def _failed(running: Sequence[subprocess.Popen[bytes]]) -> list[int]:
    return [number for number, process in enumerate(running) if process.poll() not in (None, 0)]


def _stop(number: int, _frame: object) -> None:
    raise Stopped(
        number, tr("stopped; every answer so far is kept"), hint=tr("run the same command again: it continues")
    )


def _without(words: Sequence[str], *names: str) -> list[str]:
    """Return a command line without these flags and their values."""
    kept: list[str] = []
    skip = False
    for word in words:
        if not skip and not word.startswith(tuple(f"{name}=" for name in names)) and word not in names:
            kept.append(word)
        skip = word in names
    return kept


def _start(words: Sequence[str], number: int, count: int) -> subprocess.Popen[bytes]:
    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    cards = [str(card) for card in range(count)] if seen is None else seen.split(",")
    own = cards[number] if number < len(cards) else ""
    command = [sys.executable, "-m", "cogtune", "predict", *words, "--share", f"{number}/{count}"]
    return subprocess.Popen(command, env=os.environ | {"CUDA_VISIBLE_DEVICES": own}, stdout=subprocess.DEVNULL)


def _end(running: Sequence[subprocess.Popen[bytes]]) -> None:
    """Ask all processes to end, and wait for them; they keep what they answered."""
    for process in running:
        if process.poll() is None:
            process.terminate()  # not SIGINT, which processes started in the background ignore
    limit = time.monotonic() + _END_SECONDS
    for process in running:
        try:
            process.wait(max(0.0, limit - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
