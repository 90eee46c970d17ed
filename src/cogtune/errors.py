"""The errors cogtune shows to a user.

Every error says what was found, what was expected and where (``message``), what to do next (``hint``), and carries a
stable ``code`` that scripts and search engines can match. The command line prints both lines and exits with
``exit_code``: 2 when the input is wrong, 1 when a run failed, 128 + signal when it was stopped.

What a code means and what to do about it stands once, in both languages, in ``errors.toml`` beside this file, for the
documentation. Messages and hints are written as `cogtune.language` says.
"""

from __future__ import annotations

import os
from functools import cache, partial
from importlib import resources
from typing import NamedTuple

from cogtune.language import LANGUAGES, VARIABLE, language, short_name, speaking, tr


class ErrorText(NamedTuple):
    """A code's section of the page, and its cause and remedy in both languages."""

    section: str
    cause: str
    fix: str
    cause_zh: str
    fix_zh: str


@cache
def catalogue() -> dict[str, ErrorText]:
    """Every error code in the order of the page, from ``errors.toml``."""
    import tomllib  # only the documentation needs it

    sections = tomllib.loads(resources.files("cogtune").joinpath("errors.toml").read_text(encoding="utf-8"))
    return {code: ErrorText(name, **texts) for name, entries in sections.items() for code, texts in entries.items()}


def check_language() -> None:
    """Check that there are messages in the language of ``COGTUNE_LANG``, if that is set.

    Raises:
        InputError: there are none.
    """
    asked = os.environ.get(VARIABLE)
    if asked and short_name(asked) not in LANGUAGES:
        raise InputError(
            tr("{variable} is {asked}; there is en and zh", variable=VARIABLE, asked=asked),
            hint=tr("unset {variable} to follow the locale (LANG), or set it to en or zh", variable=VARIABLE),
            code="language",
        )


def render(code: str, message: str, hint: str | None = None) -> str:
    """What the command line prints of an error: ``error[code]: message`` and, if there is one, ``hint: ...``."""
    said = tr("error[{code}]: {message}", code=code, message=message)
    return f"{said}\n{_hint(hint)}" if hint else said


def _hint(hint: str) -> str:
    return tr("hint: {hint}", hint=hint)


class CogtuneError(Exception):
    """Base of all errors with a message meant for the user."""

    exit_code = 1
    default_code = "failed"

    def __init__(self, message: str, *, hint: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.code = code or self.default_code
        self._language = language()  # what it was written in: `english` ends before it is shown

    def __str__(self) -> str:
        with speaking(self._language):
            return self.message if self.hint is None else f"{self.message}\n{_hint(self.hint)}"

    def render(self) -> str:
        """The text the command line prints; see `render`."""
        with speaking(self._language):
            return render(self.code, self.message, self.hint)


class InputError(CogtuneError, ValueError):
    """Something the user gave is wrong; nothing was changed."""

    exit_code = 2
    default_code = "input"


class ConfigError(InputError):
    """A configuration key or value, a flag, or a contradiction between them."""

    default_code = "config"


class DataError(InputError):
    """A data folder, a label file, a record or a picture."""

    default_code = "data"


class CheckpointError(InputError):
    """A model folder: a tensor missing, left over or of the wrong shape; a truncated shard; a folder without shards."""

    default_code = "checkpoint"


class AdapterError(InputError):
    """An adapter folder or adapter target that does not fit the model."""

    default_code = "adapter"


class OutputFolderError(InputError):
    """The output folder belongs to another run, or cannot be used."""

    default_code = "output"


class SetupError(InputError):
    """A library or device that the request needs is missing or too old."""

    default_code = "setup"


class RunError(CogtuneError):
    """A run failed although its input was right; the last good state is kept."""

    default_code = "run"


class DiskFullError(RunError):
    """No space left while saving; the previous checkpoint is untouched."""

    default_code = "disk-full"


class DownloadError(RunError):
    """A hub that does not answer, or a file that arrived wrong; what was fetched stays, and a rerun continues."""

    default_code = "download-network"


class NonFiniteError(RunError):
    """The loss or a gradient is not finite; weights were not touched."""

    default_code = "non-finite"


class OutOfMemoryError(RunError):
    """A device or the host ran out of memory."""

    default_code = "out-of-memory"


class Stopped(CogtuneError):
    """A signal asked the run to stop; its state was saved and rerunning the same command continues."""

    def __init__(self, signal_number: int, message: str, *, hint: str | None = None) -> None:
        super().__init__(message, hint=hint, code="stopped")
        self.exit_code = 128 + signal_number

    def __reduce__(self) -> tuple[object, ...]:
        return partial(Stopped, hint=self.hint), (self.exit_code - 128, self.message)
