"""A training command run and watched from outside: memory of cards and host, and when it did what.

Nothing inside the command knows of it, so the published command line is measured as every other.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

GIB = 2**30
_EVERY = 0.25  # seconds between two looks at the memory
_STOPPING = 20.0  # seconds for a launcher to end its ranks


@dataclass
class Watched:
    """``code`` None: it was ended because its time was over. ``card_mib``: the driver's peak of each card in use."""

    code: int | None
    output: str
    began: float
    seconds: float
    card_mib: list[int] = field(default_factory=list)
    host_anonymous_gib: float = 0.0
    host_largest_gib: float = 0.0


def run(words: Sequence[str], cwd: Path, environment: Mapping[str, str], seconds: float, log: Path) -> Watched:
    """Run ``words`` to its end or for ``seconds``; whatever it started is gone afterwards."""
    began, clock = time.time(), time.monotonic()
    with log.open("w") as stream:
        process = subprocess.Popen(
            words, cwd=cwd, env={**os.environ, **environment}, stdout=stream, stderr=subprocess.STDOUT
        )
        memory, over = _Memory(process.pid), threading.Event()
        watcher = threading.Thread(target=memory.watch, args=(over,), daemon=True)
        watcher.start()
        try:
            code: int | None = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _end(process)
            over.set()
            watcher.join()
    return Watched(
        code, log.read_text(errors="replace"), began, time.monotonic() - clock, list(memory.cards.values()),
        memory.anonymous / GIB, memory.largest / GIB,
    )  # fmt: skip


def _end(process: subprocess.Popen[bytes]) -> None:
    started = _descendants(process.pid)
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=_STOPPING)
        process.kill()
        process.wait()
    for pid in started:  # ranks have sessions of their own
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


class _Memory:
    """Peaks, looked at again and again. Of a card: everything the driver has given out on it, in MiB, as the published
    table counts. Of the host: anonymous memory of all processes together (files that are mapped are the page cache's,
    and what forked workers share is counted once), and the largest process with the files it maps."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self.cards: dict[int, int] = {}
        self.anonymous = self.largest = 0

    def watch(self, over: threading.Event) -> None:
        while not over.wait(_EVERY):
            for card, used in enumerate(_cards()):
                self.cards[card] = max(used, self.cards.get(card, 0))
            found = [_status(pid) for pid in _descendants(self._pid)]
            self.anonymous = max(self.anonymous, sum(status.get("Pss_Anon", 0) for status in found))
            self.largest = max([self.largest, *(status.get("VmHWM", 0) for status in found)])


def _cards() -> list[int]:
    words = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    try:
        return [int(line) for line in subprocess.check_output(words, text=True, timeout=10).split()]
    except (OSError, ValueError, subprocess.SubprocessError):
        return []


def _descendants(pid: int) -> list[int]:
    """``pid`` and everything below it."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError, IndexError):
            parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(path.name))
    found = [pid]
    for known in found:
        found += children.get(known, [])
    return found


def _status(pid: int) -> dict[str, int]:
    """Bytes by name. ``Pss_Anon``: a page that n processes share is 1/n of a page in each."""
    found = {}
    for file in ("status", "smaps_rollup"):
        with suppress(OSError):
            for line in Path(f"/proc/{pid}/{file}").read_text().splitlines():
                name, _, value = line.partition(":")
                if name in ("VmHWM", "Pss_Anon"):
                    found[name] = 1024 * int(value.split()[0])
    return found


_LINE = re.compile(r"^(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}) \w+ (.*)$")
_STEP = re.compile(r"^step (\d+)/(\d+) ")


def moments(log: Path, began: float, *, warm: int = 0) -> dict[str, Any]:
    """From a run's ``run.log``: seconds from the command to the loop, to its first line of numbers, of a step behind
    the ``warm`` first ones (the mean), and of the save behind its last step."""
    lines = [match.groups() for match in map(_LINE.match, log.read_text(encoding="utf-8").splitlines()) if match]
    times = [datetime.strptime(when, "%Y-%m-%d %H:%M:%S,%f").timestamp() for when, _ in lines]
    steps = [index for index, (_, text) in enumerate(lines) if _STEP.match(text)]
    saved = [index for index, (_, text) in enumerate(lines) if text.startswith("saved ")]
    if not steps or steps[0] == 0:
        return {}
    found = {"start_s": round(times[steps[0] - 1] - began, 2), "first_line_s": round(times[steps[0]] - began, 2)}
    at = {int(match[1]): times[index] for index in steps if (match := _STEP.match(lines[index][1]))}
    first, last = min((step for step in at if step >= warm), default=0), max(at)
    if last > first:
        found["step_s"] = round((at[last] - at[first]) / (last - first), 4)
    if saved and saved[-1] > steps[-1]:
        found["save_s"] = round(times[saved[-1]] - times[steps[-1]], 3)
    return found
