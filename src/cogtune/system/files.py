"""Files that are whole or absent, and names that stay inside their folder.

What cogtune writes for others to read is built under a hidden name beside its place, and renamed when it is complete:

    .run.json.<host>.<process>.<nanoseconds>.partial    a file: every writer has a name of its own
    .checkpoint-5.partial                               a folder: one name, so whoever makes it holds the place's lock

So a reader, a kill or a full disk never leaves half a file under its name. ``durable`` also flushes to disk before the
rename, for what a power failure must not tear.
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
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from cogtune.errors import CogtuneError, DiskFullError, InputError, OutputFolderError, RunError

PARTIAL, REPLACED = ".partial", ".replaced"
LONGEST_NAME = 255
"""Bytes of one name; what Linux and macOS file systems take."""

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
_STALE_SECONDS = 3600.0
_GRACE_SECONDS = 60.0  # containers may share a host's name and not its processes
_WRITER = re.compile(r"\.(?P<process>\d+)\.\d+" + re.escape(PARTIAL))


def write_text(path: Path, text: str, *, durable: bool = False) -> None:
    """Write a text file, whole or not at all, and remove what killed writers of the same file left behind."""
    for leftover in path.parent.glob(f"{_escaped(hidden(path.name, room=80))}.*{PARTIAL}"):
        if is_abandoned(leftover):
            leftover.unlink(missing_ok=True)
    write_bytes(path, text.encode(), durable=durable)


def write_json(path: Path, value: Any, *, indent: int = 1, durable: bool = False) -> None:
    """`write_text` of ``value`` as readable JSON, in UTF-8."""
    write_text(path, json.dumps(value, indent=indent, ensure_ascii=False) + "\n", durable=durable)


def write_bytes(path: Path, content: bytes, *, durable: bool = False, mode: int | None = None) -> None:
    """Write a file, whole or not at all; ``mode``: permissions other than the umask's. OSError as the system raises it.

    A link at ``path`` is replaced and not followed. A device or a pipe is written into.
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
    """A hidden file's path to write to; it becomes ``path`` when the block ends well, and is removed when not."""
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
def growing_folder(path: Path, *, replace: bool = False, durable: bool = False) -> Iterator[Path]:
    """A hidden folder that becomes ``path`` in one rename when the block ends well, and vanishes when not.

    What an earlier one left behind is removed first. ``replace``: a folder that is there already gives way.
    """
    folder, old = partial_path(path), path.with_name(hidden(path.name) + REPLACED)
    try:
        for leftover in (folder, old) if replace else (folder,):
            shutil.rmtree(leftover, ignore_errors=True)
        folder.mkdir(parents=True)
        yield folder
        if durable:
            for file in sorted(folder.iterdir()):
                sync(file)
            sync(folder)
        if replace and path.exists():
            path.rename(old)
        folder.rename(path)
        if durable:
            sync(path.parent)
        if replace:
            shutil.rmtree(old, ignore_errors=True)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def write_file(path: Path, content: bytes) -> None:
    """Write a new file; all bytes that are not streamed go through here."""
    with path.open("xb") as file:
        file.write(content)


def remove_folder(folder: Path) -> None:
    """Delete a folder. Renamed first: a kill in the middle must not leave a half-empty one under its name."""
    doomed = folder.with_name(hidden(folder.name) + REPLACED)
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    shutil.rmtree(doomed)


def link(path: Path, target: str) -> None:
    """Point ``path`` at ``target`` (a name beside it) in one atomic step."""
    temporary = partial_path(path)
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target, target_is_directory=True)
    temporary.replace(path)


def sync(path: Path) -> None:
    """Flush a file or folder to disk, so that the rename that follows cannot overtake its content."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def partial_path(path: Path) -> Path:
    """The hidden name under which the folder ``path`` is built."""
    return path.with_name(hidden(path.name) + PARTIAL)


def is_disk_full(error: BaseException) -> bool:
    """No space or no quota left. safetensors reports the system's error only in its text, hence the second test."""
    if isinstance(error, OSError) and error.errno in _DISK_FULL:
        return True
    return isinstance(error, Exception) and any(f"(os error {code})" in str(error) for code in _DISK_FULL)


@contextmanager
def explained(path: Path, *, kept: str = "", hint: str = "", late: bool = False) -> Iterator[None]:
    """The system's errors about files inside the block, where ``path`` is written, as errors of the catalogue.

    Args:
        kept: what is safe, in words.
        hint: what to do next, where that is more than the system's reason says.
        late: the place could be written before.

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
        safe = f"; {kept}" if kept else ""
        if is_disk_full(error):
            again = hint or "free some space, or choose a place on another disk"
            raise DiskFullError(f"{path}: no space left{inner}{safe}", hint=again) from error
        message = f"{path}: cannot be written: {os.strerror(number).lower()}{inner}{safe}"
        hint = hint or _REMEDIES.get(number, "choose another place")
        if late:
            raise RunError(message, hint=hint, code="output-lost") from error
        raise OutputFolderError(message, hint=hint, code="output-unwritable") from error


def _system_error(error: Exception) -> int | None:
    """The system's number of an error about a file; None of any other error."""
    if isinstance(error, OSError):
        return None if isinstance(error, ConnectionError | TimeoutError) else error.errno
    if isinstance(error, CogtuneError):
        return None
    told = re.search(r"\(os error (\d+)\)", str(error))
    return int(told[1]) if told else None


def _is_other(named: str | bytes, path: Path) -> bool:
    """Whether the system's error names another file than ``path`` and what is being built for it."""
    other = Path(os.fsdecode(named))
    return other != path and not other.name.endswith((PARTIAL, ".lock"))


_REMEDIES = {
    errno.EACCES: "choose a place that you may write, or have its permissions changed",
    errno.EPERM: "choose a place that you may write, or have its permissions changed",
    errno.EROFS: "the disk may only be read: choose another place",
    errno.ENOENT: "a folder above it is gone: bring it back, or choose another place",
    errno.ENOTDIR: "a part of the path is a file: choose another place",
    errno.EISDIR: "there is a folder of that name: choose another",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.EFBIG: "files of that size are not allowed there: see `ulimit -f`, or choose another disk",
    errno.EIO: "the disk or the network it lies behind failed: see `dmesg`, or choose another disk",
    errno.ESTALE: "the network disk was lost: see that it is mounted, and run the same command again",
}


def is_abandoned(partial: Path) -> bool:
    """Whether no living writer can be behind a hidden file of `growing`: a write takes well under a second."""
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
    """Whether a process of this machine is still there."""
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def inside(
    folder: Path,
    name: str,
    *,
    named_by: object,
    nested: bool = False,
    error: Callable[..., CogtuneError] = InputError,
) -> Path:
    """The path of ``name`` in ``folder``, where ``name`` comes from a file of a stranger.

    ``named_by``: that file, for the message. ``nested``: names may lie in folders below, divided by ``/``.

    Raises:
        error: with the code ``unsafe-name``, for every other name (`name_problem`).
    """
    problem = name_problem(name, nested=nested)
    path = folder if problem else folder / name
    linked = next((parent for parent in path.parents if parent != folder and parent.is_symlink()), None)
    if linked is not None and linked.is_relative_to(folder):
        problem = f"goes through {linked}, a link"
    if problem is not None:
        raise error(
            f"{named_by}: names {_shown(name)}, which {problem}; a file in {folder} is expected",
            hint="do not use these files: they may have been made to reach others of yours",
            code="unsafe-name",
        )
    return path


def name_problem(name: object, *, nested: bool = False) -> str | None:
    """Why ``name`` is no plain name of a file, or None. ``nested``: it may have folders, divided by ``/``."""
    if not isinstance(name, str):
        return "is not a text"
    if name.startswith("/") or re.match(r"[A-Za-z]:", name):
        return "is an absolute path"
    parts = name.split("/")
    if len(parts) > 1 and not nested:
        return "has a folder in it"
    for part in parts:
        if part in ("", ".", ".."):
            return "leaves its folder" if part == ".." else "is empty" if not name else "has an empty part"
        if any(ord(letter) < 32 or ord(letter) == 127 for letter in part) or "\\" in part:
            return "has a character that no file name should have"
        if _RESERVED.fullmatch(part):
            return "is reserved by the system or by cogtune"
        try:
            if len(part.encode()) > LONGEST_NAME:
                return f"is longer than {LONGEST_NAME} bytes"
        except UnicodeEncodeError:
            return "is not valid Unicode"
    return None


_RESERVED = re.compile(rf"(con|prn|aux|nul|com\d|lpt\d)(\..*)?|\..*({re.escape(PARTIAL)}|\.lock)", re.IGNORECASE)


def _is_special(path: Path) -> bool:
    """A device or a pipe, such as /dev/stdout."""
    try:
        mode = path.stat().st_mode
    except OSError:
        return False
    return not stat.S_ISREG(mode) and not stat.S_ISDIR(mode)


def _shown(name: object) -> str:
    text = ascii(name) if isinstance(name, str) and not name.isprintable() else str(name)
    return text if len(text) <= 120 else f"{text[:120]}..."


def hidden(name: str, room: int = 10) -> str:
    """The beginning of a hidden name for ``name``, no longer than leaves ``room`` bytes behind it."""
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
