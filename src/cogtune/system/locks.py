"""A lock on the place that a process writes to, so that no second process writes there.

A lock is a small hidden file with its holder's name, held under a lock of the operating system (flock), which is
released when the process ends in any way. A stale lock file is recognised by where its holder ran:

* On this machine: flock proves that the holder is gone, and the lock is taken over.
* On another machine that shares the disk: flock may not reach that far. A live holder renews the file every few
  seconds, so the file is watched for a minute and taken over if nobody renews it.
* On a disk without flock, the file itself is the lock: whoever creates it holds it, and the two rules above are applied
  with process numbers and by watching.

A process that lost its lock after all finds out in `Lock.require`, before it replaces anything.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from types import TracebackType

from cogtune.errors import OutputFolderError, RunError
from cogtune.language import tr
from cogtune.system import files, flock
from cogtune.system.file_errors import explained
from cogtune.system.processes import Process, machine_started

LOCK = ".lock"
FOLDER_LOCK = f".cogtune{LOCK}"
RENEW_SECONDS = 10.0
WATCH_SECONDS = 60.0
FORGOTTEN_SECONDS = 3600.0
"""Seconds without renewal after which another machine's lock is taken over without watching."""

_POLL_SECONDS = 1.0
_MOST = 1 << 14
_MOST_TRIES = 100

Say = Callable[[str], None]


def lock_folder(folder: Path, instead: str, say: Say | None = None) -> Lock:
    """Lock everything in ``folder``, which is created if necessary. Arguments and errors: `Lock`."""
    return Lock(folder, folder / FOLDER_LOCK, instead, say)


def lock_beside(place: Path, instead: str, say: Say | None = None) -> Lock:
    """Lock a file, or a folder that is created atomically. Arguments and errors: `Lock`."""
    return Lock(place, place.with_name(files.hidden(place.name) + LOCK), instead, say)


class Lock:
    """A lock on ``place`` until `release` or the end of the process; a context manager.

    Args:
        place: the folder or file that is written, for messages.
        path: the lock's file. Folders above it are made, and removed with the lock while they are empty.
        instead: what else a user may do, for the message: ``choose another --output``.
        say: is told when a lock is watched or taken over; by default on standard error.

    Raises:
        OutputFolderError: ``output-in-use``, another process holds it; ``output-unwritable``, the place cannot be
            written.
    """

    def __init__(self, place: Path, path: Path, instead: str, say: Say | None) -> None:
        self.place, self.path = place, path
        self._own, self._file, self._made = Process.here(), -1, list[Path]()
        try:
            with explained(place):
                self._made = [folder for folder in path.parents if not folder.exists()]
                self._file = _Taking(place, path, self._own, instead, say or _say).take()
        except BaseException:
            self._remove_folders()
            raise
        _held.add(self)
        _start_renewing()

    def __enter__(self) -> Lock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    @property
    def is_held(self) -> bool:
        """Whether the lock's file is still this process's."""
        return self._file >= 0 and _read(self.path) == self._own

    def require(self) -> None:
        """Check that the place still belongs to this process, before something is replaced.

        Raises:
            RunError: ``output-lost``: the place is gone, or another process has taken the lock over.
        """
        if self.is_held:
            return
        other = _read(self.path)
        if other is not None:
            raise RunError(
                tr(
                    "{place}: was taken over by {other}, which had seen no sign of this process for a while",
                    place=self.place,
                    other=other,
                ),
                hint=tr("let that one go on; this one has stopped, and has replaced nothing since"),
                code="output-lost",
            )
        if not self.path.parent.is_dir():
            raise RunError(
                tr(
                    "{place}: gone: it was removed, renamed or unmounted while this process wrote there",
                    place=self.place,
                ),
                hint=tr("bring it back and run the same command again"),
                code="output-lost",
            )
        raise RunError(
            tr("{path}: the lock was removed while this process wrote there", path=self.path),
            hint=tr("run the same command again, once, and do not remove the lock of a process that lives"),
            code="output-lost",
        )

    def renew(self) -> None:
        """Show other machines that the holder is alive."""
        with suppress(OSError):  # `require` reports a place that is gone
            os.utime(self._file)

    def release(self) -> None:
        """Give the lock back."""
        if self._file < 0:
            return
        _held.discard(self)
        with suppress(OSError):
            if self.is_held:
                self.path.unlink()
        flock.close(self._file)
        self._file = -1
        self._remove_folders()

    def forget(self) -> None:
        """Drop the lock in a forked child, which must not keep its parent's lock alive."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _remove_folders(self) -> None:
        with suppress(OSError):  # not empty: that is what they were made for
            for folder in self._made:
                folder.rmdir()


class _Taking:
    """One attempt to take a lock."""

    def __init__(self, place: Path, path: Path, own: Process, instead: str, say: Say) -> None:
        self._place, self._path, self._own, self._instead, self._say = place, path, own, instead, say

    def take(self) -> int:
        """Return the open file of a lock that now belongs to this process."""
        while True:
            file, is_new = self._open()
            keep = False
            try:
                locked = flock.acquire(file)
                if locked is False:
                    raise self._in_use(self._named(file))
                if is_new or (locked and os.fstat(file).st_nlink):  # else its holder has just removed it
                    self._require_free(os.pread(file, _MOST, 0), certain=True)
                    keep = self._write(file)
                    if keep:
                        return file
                if locked is None:
                    self._take_away()
            finally:
                if not keep:
                    os.close(file)

    def _open(self) -> tuple[int, bool]:
        """Return the lock's file, and whether this call created it."""
        for _ in range(_MOST_TRIES):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with suppress(FileExistsError, FileNotFoundError):  # the latter: the last holder has removed the folder
                return os.open(self._path, flock.FLAGS | os.O_CREAT | os.O_EXCL, 0o666), True
            with suppress(FileNotFoundError):
                return os.open(self._path, flock.FLAGS), False
        return os.open(self._path, flock.FLAGS | os.O_CREAT | os.O_EXCL, 0o666), True

    def _take_away(self) -> None:
        """Without flock: remove the lock file of a dead process. It is renamed first, which only one process can do."""
        try:
            content = self._path.read_bytes()
        except FileNotFoundError:
            return
        self._require_free(content, certain=False)
        taken = self._path.with_name(f"{self._path.name}.{os.getpid()}.{time.monotonic_ns()}")
        with suppress(FileNotFoundError):  # another process was faster; the next round shows who
            self._path.rename(taken)
            if taken.read_bytes() != content:  # and has it already
                taken.rename(self._path)
            else:
                taken.unlink()

    def _require_free(self, content: bytes, *, certain: bool) -> None:
        """Raise unless nobody holds a lock file with this content. ``certain``: this process has its flock."""
        other = _parse(content)
        if other is None and content.strip(b"\0"):
            raise OutputFolderError(
                tr("{path}: cogtune needs this name for its lock, and this file is not one", path=self._path),
                hint=tr("move it away, or {instead}", instead=self._instead),
                code="output-unwritable",
            )
        if not self._is_free(other, certain):
            raise self._in_use(other)

    def _write(self, file: int) -> bool:
        """Write this process's name into the file. Returns False if it is no longer the file at its path."""
        try:
            os.ftruncate(file, 0)
            os.pwrite(file, self._own.text().encode("utf-8", "replace"), 0)
        except OSError:  # a full disk
            with suppress(OSError):
                os.ftruncate(file, 0)
                self._path.unlink()
            raise
        return _read(self._path) == self._own

    def _is_free(self, other: Process | None, certain: bool) -> bool:
        if other is None:
            return certain or not self._is_renewed(tr("a process that is just starting"))
        if certain and other.is_of_this_machine:
            gone = True
        elif other.is_visible:
            gone = not other.is_running
        else:
            gone = self._has_rebooted(other) or not self._is_renewed(str(other))
        if gone and not (other.is_visible and other.is_running):
            self._say(
                tr(
                    "{place}: taking over from {other}, which ended without releasing its lock",
                    place=self._place,
                    other=other,
                )
            )
        return gone

    def _is_renewed(self, other: str) -> bool:
        """Watch a lock whose holder cannot be checked."""
        before = _renewed(self._path)
        if before is None or time.time() - before / 1e9 > FORGOTTEN_SECONDS:
            return False
        self._say(
            tr(
                "{place}: in use by {other}; waiting {watch_seconds:.0f} s to see whether it is still running",
                place=self._place,
                other=other,
                watch_seconds=WATCH_SECONDS,
            )
        )
        end = time.monotonic() + WATCH_SECONDS
        while time.monotonic() < end:
            time.sleep(_POLL_SECONDS)
            now = _renewed(self._path)
            if now != before:
                return now is not None
        return False

    def _has_rebooted(self, other: Process) -> bool:
        """Return whether this machine was restarted after ``other`` ran."""
        renewed, started = _renewed(self._path), machine_started()
        same = other.host == socket.gethostname() and not other.is_of_this_machine
        return same and renewed is not None and started is not None and renewed / 1e9 < started

    def _named(self, file: int) -> Process | None:
        """Return the holder; it writes its name as soon as it has the lock."""
        for _ in range(20):
            other = _parse(os.pread(file, _MOST, 0))
            if other is not None:
                return other
            time.sleep(0.05)
        return None

    def _in_use(self, other: Process | None) -> OutputFolderError:
        wait = tr("wait until it ends")
        if other is not None and other.is_visible:
            wait += tr(", stop it with `kill {number}`", number=other.number)
        elif other is not None:
            wait += tr(" (if {host} is gone for good, remove {path})", host=other.host, path=self._path)
        return OutputFolderError(
            tr(
                "{place}: in use by {other}",
                place=self._place,
                other=other or tr("another process that has not written its name yet"),
            ),
            hint=tr("{wait}, or {instead}", wait=wait, instead=self._instead),
            code="output-in-use",
        )


_held: set[Lock] = set()
"""The locks of this process, which a thread renews."""


def _renew() -> None:
    while True:
        time.sleep(RENEW_SECONDS)
        for lock in tuple(_held):
            lock.renew()


@cache
def _start_renewing() -> None:
    threading.Thread(target=_renew, name="cogtune-lock", daemon=True).start()


def _forget_all() -> None:
    for lock in _held:
        lock.forget()
    _held.clear()
    _start_renewing.cache_clear()


os.register_at_fork(after_in_child=_forget_all)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _parse(content: bytes) -> Process | None:
    return Process.parse(content.decode("utf-8", "replace"))


def _read(path: Path) -> Process | None:
    try:
        return _parse(path.read_bytes())
    except OSError:
        return None


def _renewed(path: Path) -> int | None:
    """Return when a lock was last renewed, in nanoseconds. Opening it forces a network disk to look."""
    try:
        with path.open("rb") as file:
            return os.fstat(file.fileno()).st_mtime_ns
    except OSError:
        return None
