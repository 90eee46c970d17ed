"""Text that leaves for a terminal or a log: control and escape characters of data are shown, not obeyed.

A path, a label or a model's answer can hold sequences that rename the window, erase lines or reorder what is read.
Every command's standard streams go through `protected`, so no message has to think of it.
"""

from __future__ import annotations

import codecs
import errno
import io
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO, cast

# Controls except tab and line feed, line and paragraph separators, what reorders text, and halves of surrogate pairs
# (a file's name that is not UTF-8).
_ACTIVE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_ERRORS = "cogtune-escape"


def visible(text: str) -> str:
    r"""Return ``text`` with every active character as JSON writes it: ``\u001b``, which leaves JSON's meaning."""
    return _ACTIVE.sub(lambda found: _escaped(found.group()), text)


def typed(value: object) -> str:
    """Return a path or a word as it is typed in a shell, for a command that a message names."""
    return shlex.quote(str(value))


def _escaped(text: str) -> str:
    units = text.encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{units[at]:02x}{units[at + 1]:02x}" for at in range(0, len(units), 2))


def _escape_error(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return _escaped(error.object[error.start : error.end]), error.end


codecs.register_error(_ERRORS, _escape_error)


class _Visible:
    """A text stream in front of another that writes `visible` text; all else is the other's.

    A carriage return at the start of a write passes: so a progress line is written over. When the terminal has hung up,
    its lines go nowhere, and the run that was stopped by it can still save.
    """

    def __init__(self, raw: TextIO) -> None:
        self.raw = raw

    def write(self, text: str) -> int:
        start = "\r" if text.startswith("\r") else ""
        shown = start + visible(text.removeprefix(start))
        self._unless_hung_up(lambda: self.raw.write(shown))
        return len(text)

    def flush(self) -> None:
        self._unless_hung_up(self.raw.flush)

    def _unless_hung_up(self, work: Callable[[], object]) -> None:
        try:
            work()
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.raw.fileno())
            os.close(nowhere)

    def writelines(self, lines: list[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.raw, name)


def raw(stream: TextIO) -> TextIO:
    """Return the stream behind a protected one, for a library that writes its own colours and escapes its content."""
    return stream.raw if isinstance(stream, _Visible) else stream


@contextmanager
def protected() -> Iterator[None]:
    """Make standard output and error `visible` inside; a closed one leads to nowhere.

    A character that the stream's encoding lacks is escaped too, in place of an error.
    """
    open_standard_files()
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (_protected(stream, number) for number, stream in enumerate(before, start=1))
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


def open_standard_files() -> None:
    """Open what the caller closed of files 0 to 2, so that no file of ours gets its number and others' output."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)


def _protected(stream: TextIO | None, number: int) -> TextIO:
    if isinstance(stream, _Visible):
        return cast(TextIO, stream)
    if stream is None:
        stream = open(number, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    if isinstance(stream, io.TextIOWrapper):
        with suppress(ValueError, OSError):  # a closed or detached one
            stream.reconfigure(errors=_ERRORS)
    return cast(TextIO, _Visible(stream))
