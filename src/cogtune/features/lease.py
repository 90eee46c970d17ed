"""What runs that are going on need: no other run may evict those files.

A lease is a file with the digests a run needs. Reading features renews it, so it counts while it is younger than a day,
or on the machine that wrote it, while its process is there.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from cogtune.features.store import make_folder, write_atomically
from cogtune.system.files import is_running

FOLDER = "leases"
_SUFFIX = ".lease"
_RENEW_SECONDS = 60.0
_VALID_SECONDS = 24 * 3600.0


class Lease:
    """This process's claim. In a cache that it may only read there is none: then nobody of its kind can evict either,
    and those who may write see to their own.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._path = root / FOLDER / f"{socket.gethostname()}.{os.getpid()}.{time.time_ns()}{_SUFFIX}"
        self._owner = os.getpid()
        self._renewed = 0.0

    def claim(self, files: Iterable[str]) -> None:
        """Claim these feature files, given as ``variant/digest``, and no others."""
        self._renewed = time.monotonic()
        with suppress(OSError):
            make_folder(self._path.parent, self._root)
            write_atomically(self._path, "".join(f"{name}\n" for name in files).encode(), self._root)

    @property
    def is_due(self) -> bool:
        """Whether it was last claimed or renewed a while ago."""
        return time.monotonic() - self._renewed > _RENEW_SECONDS

    def renew(self) -> None:
        """Called at every read, by any process of the run; touches the file once a minute."""
        if self.is_due:
            self._renewed = time.monotonic()
            with suppress(OSError):
                os.utime(self._path)

    def remove(self) -> None:
        """At the end of the run; does something only in the process that claimed."""
        if os.getpid() == self._owner:
            with suppress(OSError):
                self._path.unlink(missing_ok=True)


def leased(root: Path) -> set[str]:
    """``variant/digest`` of every file that a run needs now. Leases that ran out are removed."""
    names: set[str] = set()
    for path in (root / FOLDER).glob(f"*{_SUFFIX}"):
        with suppress(FileNotFoundError):
            if _is_valid(path):
                # a name that is damaged claims nothing; the others in its file still do
                names.update(path.read_text(encoding="ascii", errors="replace").split())
            else:
                path.unlink(missing_ok=True)
    return names


def _is_valid(path: Path) -> bool:
    host, process = path.name.removesuffix(_SUFFIX).rsplit(".", 2)[:2]
    age = time.time() - path.stat().st_mtime
    if host == socket.gethostname() and not is_running(int(process)) and age > _RENEW_SECONDS:
        return False
    return age < _VALID_SECONDS
