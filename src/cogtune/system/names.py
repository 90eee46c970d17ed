"""Check file names that come from an untrusted file: a weight index, a manifest, a hub's file list.

Such a name is a plain name inside its own folder, or it is refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from cogtune.errors import CogtuneError, InputError
from cogtune.language import tr

LONGEST_NAME = 255
"""Most bytes of a file name on Linux and macOS file systems."""

# names that Windows reserves for devices, and cogtune's names for partial files and locks
_RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?|\..*\.(partial|replaced|lock)", re.IGNORECASE)


def inside(
    folder: Path,
    name: str,
    *,
    named_by: object,
    nested: bool = False,
    error: Callable[..., CogtuneError] = InputError,
) -> Path:
    """Return the path of ``name`` in ``folder``, where ``name`` comes from an untrusted file.

    ``named_by``: that file, for the message. ``nested``: ``name`` may contain folders, separated by ``/``.

    Raises:
        error: with the code ``unsafe-name``, for every other name (`name_problem`).
    """
    problem = name_problem(name, nested=nested)
    path = folder if problem else folder / name
    linked = next((parent for parent in path.parents if parent != folder and parent.is_symlink()), None)
    if linked is not None and linked.is_relative_to(folder):
        problem = tr("goes through {linked}, a link", linked=linked)
    if problem is not None:
        raise error(
            tr(
                "{named_by}: names {shown}, which {problem}; a file in {folder} is expected",
                named_by=named_by,
                shown=_shown(name),
                problem=problem,
                folder=folder,
            ),
            hint=tr("do not use these files: they may have been made to reach others of yours"),
            code="unsafe-name",
        )
    return path


def is_unicode(text: str) -> bool:
    """Return whether ``text`` can be encoded as UTF-8 (JSON escapes and file names can hold lone surrogates)."""
    if text.isascii():
        return True
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def name_problem(name: object, *, nested: bool = False) -> str | None:
    """Return why ``name`` is not a plain file name, or None. ``nested``: it may contain folders, separated by ``/``."""
    if not isinstance(name, str):
        return tr("is not a text")
    if name.startswith("/") or re.match(r"[A-Za-z]:", name):
        return tr("is an absolute path")
    parts = name.split("/")
    if len(parts) > 1 and not nested:
        return tr("has a folder in it")
    for part in parts:
        if part in ("", ".", ".."):
            return (
                tr("lies outside the folder")
                if part == ".."
                else tr("is empty")
                if not name
                else tr("has an empty part")
            )
        if any(ord(letter) < 32 or ord(letter) == 127 for letter in part) or "\\" in part:
            return tr("has a character that no file name should have")
        if _RESERVED.fullmatch(part):
            return tr("is reserved by the system or by cogtune")
        try:
            if len(part.encode()) > LONGEST_NAME:
                return tr("is longer than {longest_name} bytes", longest_name=LONGEST_NAME)
        except UnicodeEncodeError:
            return tr("is not valid Unicode")
    return None


def _shown(name: object) -> str:
    text = ascii(name) if isinstance(name, str) and not name.isprintable() else str(name)
    return text if len(text) <= 120 else f"{text[:120]}..."
