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

from cogtune.features.store import is_running, make_folder, write_atomically

FOLDER = "leases"
_SUFFIX = ".lease"
_RENEW_SECONDS = 60.0
_VALID_SECONDS = 24 * 3600.0


class Lease:
    """This run's claim; ``path`` None where the cache cannot be written, and so nothing can be evicted by us."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._owner = os.getpid()
        self._renewed = time.monotonic()

    @classmethod
    def take(cls, root: Path, files: Iterable[str]) -> Lease:
        """Claim feature files, given as ``variant/digest``. OSError as the system raises it."""
        path = root / FOLDER / f"{socket.gethostname()}.{os.getpid()}.{time.time_ns()}{_SUFFIX}"
        make_folder(path.parent, root)
        write_atomically(path, "".join(f"{name}\n" for name in files).encode(), root)
        return cls(path)

    def renew(self) -> None:
        """Called at every read; touches the file once a minute."""
        now = time.monotonic()
        if self._path is not None and now - self._renewed > _RENEW_SECONDS:
            self._renewed = now
            with suppress(OSError):  # a cache that became read-only cannot be evicted from by us either
                os.utime(self._path)

    def remove(self) -> None:
        """At the end of the run, in the process that took it."""
        if self._path is not None and os.getpid() == self._owner:
            with suppress(OSError):
                self._path.unlink(missing_ok=True)


def leased(root: Path) -> set[str]:
    """``variant/digest`` of every file that a run needs now. Leases that ran out are removed."""
    names: set[str] = set()
    for path in (root / FOLDER).glob(f"*{_SUFFIX}"):
        with suppress(FileNotFoundError):
            if _is_valid(path):
                names.update(path.read_text(encoding="ascii").split())
            else:
                path.unlink(missing_ok=True)
    return names


def _is_valid(path: Path) -> bool:
    host, process = path.name.removesuffix(_SUFFIX).rsplit(".", 2)[:2]
    age = time.time() - path.stat().st_mtime
    if host == socket.gethostname() and not is_running(int(process)) and age > _RENEW_SECONDS:
        return False
    return age < _VALID_SECONDS
