"""flock: the operating system's lock on an open file, which ends with the process that holds it."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

FLAGS = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW
"""How a lock's file is opened."""
_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)


def acquire(file: int) -> bool | None:
    """Lock an open file, unless another process has. Returns whether it did; None if the disk has no flock."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # the latter over a network, by what is written of it
        return False
    except OSError as error:
        if error.errno in _UNSUPPORTED:
            return None
        raise
    return True


def close(file: int) -> None:
    """Close a file and release its flock, which a forked child that has the file open would keep."""
    with suppress(OSError):
        fcntl.flock(file, fcntl.LOCK_UN)
    os.close(file)


@contextmanager
def turn(path: Path, mode: int = 0o666) -> Iterator[None]:
    """Inside the block, no other process is inside a block for the same ``path``; a second one waits.

    It holds among the processes of this machine, and of others if flock reaches them. Meant for short operations. There
    is no such guarantee on a disk without flock or in a place that cannot be written.
    """
    file = -1
    with suppress(OSError):
        while True:
            file = os.open(path, FLAGS | os.O_CREAT, mode)
            with suppress(PermissionError):  # owned by another user
                os.fchmod(file, mode)
            with suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_EX)
            if os.fstat(file).st_nlink:
                break
            close(file)  # removed by its last holder
            file = -1
    try:
        yield
    finally:
        if file >= 0:
            with suppress(OSError):
                path.unlink()
            close(file)
