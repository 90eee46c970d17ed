"""Turns the system's errors about files into cogtune's errors: which file, why, what is safe, what to do."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cogtune.errors import CogtuneError, DiskFullError, OutputFolderError, RunError
from cogtune.language import phrase, tr
from cogtune.system.files import is_hidden

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


def is_disk_full(error: BaseException) -> bool:
    """Return whether there is no space or quota left. safetensors gives the system's error only in its text."""
    if isinstance(error, OSError) and error.errno in _DISK_FULL:
        return True
    return isinstance(error, Exception) and any(f"(os error {code})" in str(error) for code in _DISK_FULL)


@contextmanager
def explained(path: Path, *, kept: str = "", then: str = "", late: bool = False) -> Iterator[None]:
    """Turn the system's errors about files, raised while ``path`` is written, into cogtune's errors.

    Args:
        kept: what is safe, in words.
        then: what to do once the reason is gone; it follows the remedy in the hint.
        late: the place could be written earlier.

    Raises:
        DiskFullError: no space or no quota is left.
        OutputFolderError: ``output-unwritable``: any other reason. RunError: ``output-lost``: the same, ``late``.
    """
    try:
        yield
    except Exception as error:
        number = _system_error(error)
        if number is None:
            raise
        named = getattr(error, "filename", None)
        inner = f" ({os.fsdecode(named)})" if isinstance(named, str | bytes) and _is_other(named, path) else ""
        safe, again = f"; {kept}" if kept else "", f"; {then}" if then else ""
        if is_disk_full(error):
            hint = tr("free some space, or choose a place on another disk{again}", again=again)
            raise DiskFullError(
                tr("{path}: no space left{inner}{safe}", path=path, inner=inner, safe=safe), hint=hint
            ) from error
        message = tr(
            "{path}: cannot be written: {reason}{inner}{safe}",
            path=path,
            reason=_reason(error, number),
            inner=inner,
            safe=safe,
        )
        hint = tr(_REMEDIES.get(number, phrase("choose another place"))) + again
        if late:
            raise RunError(message, hint=hint, code="output-lost") from error
        raise OutputFolderError(message, hint=hint, code="output-unwritable") from error


def system_reason(error: Exception) -> tuple[str, str] | None:
    """Describe a system error that no other code has explained (no permission, a full or failing disk, too many open
    files): the problem with its file, and what to do. Returns None for any other error.
    """
    number = _system_error(error)
    if number is None or number not in _MACHINE:
        return None
    named = getattr(error, "filename", None)
    what = f"{os.fsdecode(named)}: " if isinstance(named, str | bytes) else ""
    return f"{what}{_reason(error, number)}", tr(_REMEDIES.get(number, phrase("see the reason above")))


_MACHINE = {
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE, errno.EMFILE,
    errno.ENFILE, errno.ENAMETOOLONG, errno.ELOOP, errno.EFBIG,
}  # fmt: skip


def _reason(error: Exception, number: int) -> str:
    reason = getattr(error, "strerror", None) or os.strerror(number)
    return reason[:1].lower() + reason[1:]


def _system_error(error: Exception) -> int | None:
    """Return the errno of an error about a file, or None for any other error."""
    if isinstance(error, OSError):
        return None if isinstance(error, ConnectionError | TimeoutError) else error.errno
    if isinstance(error, CogtuneError):
        return None
    told = re.search(r"\(os error (\d+)\)", str(error))
    return int(told[1]) if told else None


def _is_other(named: str | bytes, path: Path) -> bool:
    """Return whether the error names a file other than ``path`` and its hidden copy."""
    other = Path(os.fsdecode(named))
    return other != path and not is_hidden(other.name)


_REMEDIES = {
    errno.EACCES: phrase("choose a place that you may use, or have its permissions changed"),
    errno.EPERM: phrase("choose a place that you may use, or have its permissions changed"),
    errno.ENOSPC: phrase("free some space, or choose a place on another disk"),
    errno.EDQUOT: phrase("free some space, or choose a place on another disk"),
    errno.EMFILE: phrase("too many files are open at once: raise `ulimit -n`, or lower data.workers"),
    errno.ENFILE: phrase("the machine has too many files open: end other programs"),
    errno.ELOOP: phrase("a link there leads back to itself: remove it, or choose another place"),
    errno.EROFS: phrase("the disk may only be read: choose another place"),
    errno.ENOENT: phrase("a folder above it is gone: bring it back, or choose another place"),
    errno.EEXIST: phrase("move that away, or choose another place"),
    errno.ENOTEMPTY: phrase("move that away, or choose another place"),
    errno.ENOTDIR: phrase("a part of the path is a file: choose another place"),
    errno.EISDIR: phrase("there is a folder of that name: choose another"),
    errno.ENAMETOOLONG: phrase("choose a shorter name"),
    errno.EFBIG: phrase("files of that size are not allowed there: see `ulimit -f`, or choose another disk"),
    errno.EIO: phrase("the disk or the network it lies behind failed: see `dmesg`, or choose another disk"),
    errno.ESTALE: phrase("the network disk was lost: see that it is mounted, and run the same command again"),
}
