"""Identify a process uniquely, even if machines or containers share a disk and process numbers are reused."""

from __future__ import annotations

import getpass
import json
import os
import shlex
import socket
import sys
import time
from dataclasses import asdict, dataclass
from datetime import datetime
from functools import cache
from pathlib import Path

from cogtune.language import tr
from cogtune.system import files

_LONGEST_COMMAND = 200


@dataclass(frozen=True)
class Process:
    """A process as it identifies itself.

    ``boot`` and ``processes`` distinguish machines and containers with one host name; ``started`` distinguishes
    processes with one number.
    """

    number: int
    started: str
    host: str
    boot: str
    processes: str
    user: str
    command: str
    since: str

    @staticmethod
    def here() -> Process:
        """This process."""
        number = os.getpid()
        program = Path(sys.argv[0]).name
        words = ["cogtune" if program == "__main__.py" else program, *sys.argv[1:]]
        command = shlex.join(words)[:_LONGEST_COMMAND]
        since = datetime.now().astimezone().isoformat(" ")
        return Process(number, _started(number), socket.gethostname(), _boot(), _processes(), _user(), command, since)

    @staticmethod
    def parse(text: str) -> Process | None:
        """Parse the process that wrote ``text``; None if no process did."""
        try:
            values = json.loads(text)
            return Process(int(values.pop("number")), **{name: str(value) for name, value in values.items()})
        except (ValueError, TypeError, KeyError, AttributeError):
            return None

    def text(self) -> str:
        return json.dumps(asdict(self), ensure_ascii=False) + "\n"

    @property
    def is_of_this_machine(self) -> bool:
        if self.boot and _boot():
            return self.boot == _boot()
        return self.host == socket.gethostname()

    @property
    def is_running(self) -> bool:
        """Whether the process is running. Only meaningful if it is visible."""
        return files.is_running(self.number) and self.started == _started(self.number)

    @property
    def is_visible(self) -> bool:
        """Whether its process number means something here. That of another container does not."""
        return self.is_of_this_machine and self.processes == _processes()

    def __str__(self) -> str:
        place = "" if self.is_visible else f" on {self.host}"
        return tr(
            "process {number}{place} of {user}, since {since}: `{printable}`",
            number=self.number,
            place=place,
            user=self.user,
            since=self.since[:19],
            printable=_printable(self.command),
        )


def machine_started() -> float | None:
    """Return when this machine was started, in seconds since 1970; None if unknown."""
    try:
        return time.time() - float(Path("/proc/uptime").read_text(encoding="ascii").split()[0])
    except (OSError, ValueError):
        return None


def _printable(text: str) -> str:
    return text if text.isprintable() else ascii(text)[1:-1]


def _started(process: int) -> str:
    """Return when a process of this machine started, in clock ticks; "" if unknown."""
    try:
        told = Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace")
        return told.rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


@cache
def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""


def _processes() -> str:
    """Return the id of the process-number namespace (container)."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a number that nobody has
        return str(os.getuid())
