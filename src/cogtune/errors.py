"""The errors cogtune shows to a user.

Every error says what was found, what was expected and where (``message``), what to do next (``hint``), and carries a
stable ``code`` that scripts and search engines can match. The command line prints both lines and exits with
``exit_code``: 2 when the input is wrong, 1 when a run failed, 128 + signal when it was stopped.
"""

from __future__ import annotations


class CogtuneError(Exception):
    """Base of all errors with a message meant for the user."""

    exit_code = 1
    default_code = "failed"

    def __init__(self, message: str, *, hint: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.code = code or self.default_code

    def __str__(self) -> str:
        return self.message if self.hint is None else f"{self.message}\nhint: {self.hint}"

    def render(self) -> str:
        """The text the command line prints: one ``error[code]:`` line and, if there is one, a ``hint:`` line."""
        text = f"error[{self.code}]: {self.message}"
        return text if self.hint is None else f"{text}\nhint: {self.hint}"


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
