"""Reads whole small files that others wrote: regular files only, so that no pipe, device or socket is waited for."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO

from cogtune.language import phrase, tr

_KINDS = {
    stat.S_IFIFO: phrase("a pipe, not a file"),
    stat.S_IFCHR: phrase("a device, not a file"),
    stat.S_IFBLK: phrase("a device, not a file"),
    stat.S_IFSOCK: phrase("a socket, not a file"),
}


class SpecialFileError(OSError):
    """A pipe, device or socket where a file was expected. Its text is the reason alone; callers name the path."""

    def __str__(self) -> str:
        return str(self.strerror)


def open_file(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a regular file, or a link to one, to read its bytes.

    A pipe without a writer and a device are refused at once instead of being read for ever.

    Raises:
        OSError: as `open` raises it; SpecialFileError for anything but a regular file.
    """
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))
    try:
        kind = stat.S_IFMT(os.fstat(descriptor).st_mode)
        if kind == stat.S_IFDIR:
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
        if kind != stat.S_IFREG:
            reason = tr(_KINDS.get(kind, phrase("not a regular file")))
            raise SpecialFileError(errno.EINVAL, reason, os.fspath(path))
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_bytes(path: Path) -> bytes:
    """Return the content of a regular file; see `open_file`."""
    with open_file(path) as file:
        return file.read()


def read_text(path: Path, encoding: str = "utf-8") -> str:
    """Return the text of a regular file, with every line end as ``\\n``; see `open_file`.

    Raises:
        UnicodeDecodeError: not in this encoding.
    """
    return read_bytes(path).decode(encoding).replace("\r\n", "\n")
