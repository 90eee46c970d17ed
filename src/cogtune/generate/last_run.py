"""Remembers the last training run, so that chat and predict can use its result by default.

A small JSON file in the user's state folder (``$XDG_STATE_HOME/cogtune``, by default ``~/.local/state/cogtune``).
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from cogtune.errors import InputError
from cogtune.language import tr
from cogtune.system import files


@dataclass(frozen=True)
class LastRun:
    """Base model (folder or hub id), adapter folder and output folder of a training; folders are absolute."""

    model: str
    adapter: str
    output: str
    template: str | None = None
    rope_precision: str = "checkpoint"


def state_file() -> Path:
    """Return the file's path."""
    root = os.environ.get("XDG_STATE_HOME")
    return (Path(root) if root else Path.home() / ".local" / "state") / "cogtune" / "last_run.json"


def write_last_run(
    model: str | Path,
    adapter: Path,
    output: Path,
    *,
    template: str | None = None,
    rope_precision: str = "checkpoint",
) -> bool:
    """Save a finished run. Returns whether that was possible (an unwritable home folder is not an error)."""
    base = str(Path(model).expanduser().resolve()) if Path(model).expanduser().is_dir() else str(model)
    run = LastRun(base, str(adapter.resolve()), str(output.resolve()), template, rope_precision)
    try:
        path = state_file()
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_json(path, asdict(run))
    except (OSError, RuntimeError):  # Path.home() raises RuntimeError without a home folder
        return False
    return True


def read_last_run() -> LastRun:
    """Return this user's last training run on this machine.

    Raises:
        InputError: there was none, or its adapter is gone.
    """
    hint = tr("train first, or give --adapter DIR (and --model BASE)")
    path = state_file()
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        run = LastRun(**{key: values[key] for key in LastRun.__dataclass_fields__ if key in values})
    except FileNotFoundError:
        raise InputError(tr("no finished training is remembered"), hint=hint, code="no-last-run") from None
    except (OSError, ValueError, TypeError) as error:
        raise InputError(
            tr("{path}: cannot be read: {error}", path=path, error=error), hint=hint, code="no-last-run"
        ) from error
    if not Path(run.adapter).is_dir():
        raise InputError(
            tr("{adapter}: the last training's adapter is not there any more", adapter=run.adapter),
            hint=hint,
            code="no-last-run",
        )
    return run
