"""Atomic file and folder writes.

A file or folder that others read is written under a hidden name in the same folder and renamed when it is complete:

    .run.json.<host>.<process>.<nanoseconds>.partial    a file: every writer has a name of its own
    .checkpoint-5.partial                               a folder: one name, so its writer must hold the folder's lock;
                                                        a marker file in it shows that cogtune made it

So a reader never sees half a file, even after a kill or with a full disk. ``durable`` also flushes to disk before the
rename, to survive a power failure.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import socket
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from cogtune.language import tr
from cogtune.system.names import LONGEST_NAME

PARTIAL, REPLACED = ".partial", ".replaced"
MARK = ".cogtune-unfinished"

_STALE_SECONDS = 3600.0
_GRACE_SECONDS = 60.0  # containers can share a host name and still have separate process numbers
_WRITER = re.compile(r"\.(?P<process>\d+)\.\d+" + re.escape(PARTIAL))


def write_text(path: Path, text: str, *, durable: bool = False) -> None:
    """Write a text file atomically, and remove what killed writers of the same file left."""
    clear_leftovers(path)
    write_bytes(path, text.encode(), durable=durable)


def clear_leftovers(path: Path, *, locked: bool = False) -> None:
    """Remove what killed writers of the file ``path`` left; ``locked``: the caller's lock excludes other writers."""
    for leftover in path.parent.glob(f"{_escaped(hidden(path.name, room=80))}.*{PARTIAL}"):
        if is_abandoned(leftover) or (locked and _WRITER.search(leftover.name)):
            leftover.unlink(missing_ok=True)


def write_json(path: Path, value: Any, *, indent: int = 1, durable: bool = False) -> None:
    """Write ``value`` as readable JSON in UTF-8; see `write_text`."""
    write_text(path, json.dumps(value, indent=indent, ensure_ascii=False) + "\n", durable=durable)


def write_bytes(path: Path, content: bytes, *, durable: bool = False, mode: int | None = None) -> None:
    """Write a file atomically. ``mode``: permissions, if not the umask's.

    A symbolic link at ``path`` is replaced, not followed. A device or a pipe is written into.

    Raises:
        OSError: as the system raises it.
    """
    if _is_special(path):
        path.write_bytes(content)
        return
    with growing(path, durable=durable) as temporary:
        write_file(temporary, content)
        if mode is not None:
            with suppress(PermissionError):  # file systems without permissions
                temporary.chmod(mode)


@contextmanager
def growing(path: Path, *, durable: bool = False) -> Iterator[Path]:
    """Yield a hidden path to write to. It becomes ``path`` if the block succeeds, and is removed if it fails."""
    if _is_special(path):
        yield path
        return
    temporary = path.with_name(f"{hidden(path.name, room=80)}.{_writer()}{PARTIAL}")
    try:
        yield temporary
        if durable:
            sync(temporary)
        temporary.replace(path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


@contextmanager
def growing_folder(path: Path, *, replace: bool = False, durable: bool = False, marked: bool = False) -> Iterator[Path]:
    """Yield a hidden folder that becomes ``path`` in one rename if the block succeeds, and is removed if it fails.

    Leftovers of an earlier attempt are removed first. ``replace``: an existing folder is replaced.
    """
    folder, old = partial_path(path), path.with_name(hidden(path.name) + REPLACED)
    remove_unfinished(folder)
    try:
        if replace:
            shutil.rmtree(old, ignore_errors=True)
        folder.mkdir(parents=True)
        (folder / MARK).touch()
        yield folder
        if durable:
            for file in sorted(folder.iterdir()):
                sync(file)
            sync(folder)
        if replace and path.exists():
            path.rename(old)
        folder.rename(path)
        if not marked:
            unmark(path)  # afterwards, so whatever a kill leaves under the hidden name has the marker
        if durable:
            sync(path.parent)
        if replace:
            shutil.rmtree(old, ignore_errors=True)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def is_unfinished(folder: Path) -> bool:
    """Return whether ``folder`` is an unfinished one of `growing_folder`: it has the marker, or is empty."""
    if folder.is_symlink() or not folder.is_dir():
        return False
    return (folder / MARK).is_file() or not any(folder.iterdir())


def remove_unfinished(folder: Path) -> bool:
    """Remove what a killed `growing_folder` left, and return whether there was anything.

    Raises:
        FileExistsError: the folder is not one of `growing_folder`.
    """
    if not os.path.lexists(folder):
        return False
    if not is_unfinished(folder):
        raise FileExistsError(errno.EEXIST, tr("in the way, and not made by cogtune"), str(folder))
    shutil.rmtree(folder)
    return True


def unmark(folder: Path) -> None:
    """Remove the marker: the folder is complete."""
    (folder / MARK).unlink(missing_ok=True)


def write_file(path: Path, content: bytes) -> None:
    """Write a new file; everything that is not streamed is written here."""
    with path.open("xb") as file:
        file.write(content)


def remove_folder(folder: Path) -> None:
    """Delete a folder. It is renamed first, so that a kill leaves no half-deleted folder under its name."""
    doomed = folder.with_name(hidden(folder.name) + REPLACED)
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    shutil.rmtree(doomed)


def link(path: Path, target: str) -> None:
    """Point the link ``path`` at ``target`` (a name in the same folder) in one atomic step.

    Raises:
        FileExistsError: ``path`` is something other than a link.
    """
    if path.exists() and not path.is_symlink():
        raise FileExistsError(errno.EEXIST, tr("something other than a link is there"), str(path))
    temporary = partial_path(path)
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target, target_is_directory=True)
    temporary.replace(path)


def sync(path: Path) -> None:
    """Flush a file or folder to disk, so that a later rename cannot overtake its content."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def partial_path(path: Path) -> Path:
    """Return the hidden name under which the folder ``path`` is built."""
    return path.with_name(hidden(path.name) + PARTIAL)


def is_hidden(name: str) -> bool:
    """Return whether a name is internal: files are written or locked under it."""
    return name.startswith(".") and (_WRITER.search(name) is not None or name.endswith(".lock"))


def is_abandoned(partial: Path) -> bool:
    """Return whether the writer of a hidden file of `growing` is surely gone. A write takes well under a second."""
    writer = _WRITER.search(partial.name)
    if writer is None or writer.end() != len(partial.name):
        return False
    try:
        age = time.time() - partial.lstat().st_mtime
    except OSError:
        return False
    here = partial.name[: writer.start()].endswith(f".{_host()}")
    ended = here and not is_running(int(writer["process"]))
    return age > (_GRACE_SECONDS if ended else _STALE_SECONDS)


def is_running(process: int) -> bool:
    """Return whether a process of this machine is running."""
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def hidden(name: str, room: int = 10) -> str:
    """Return the start of a hidden name for ``name``, cut so that ``room`` bytes are left for the rest."""
    hidden = f".{name}"
    if len(os.fsencode(hidden)) + room <= LONGEST_NAME:
        return hidden
    return f".{hashlib.sha256(os.fsencode(name)).hexdigest()[:32]}"


def _writer() -> str:
    return f"{_host()}.{os.getpid()}.{time.monotonic_ns()}"


def _host() -> str:
    return socket.gethostname()[:32]


def _escaped(text: str) -> str:
    return re.sub(r"([*?[])", r"[\1]", text)


def _is_special(path: Path) -> bool:
    """Return whether the path is a device or a pipe, such as /dev/stdout."""
    try:
        mode = path.stat().st_mode
    except OSError:
        return False
    return not stat.S_ISREG(mode) and not stat.S_ISDIR(mode)
