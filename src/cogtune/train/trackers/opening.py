"""Open the trackers of ``log.trackers`` on rank 0, and close them when the run ends."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from cogtune.configuration.run_config import RunConfig
from cogtune.errors import SetupError, Stopped
from cogtune.language import phrase, tr
from cogtune.system import files
from cogtune.train.trackers.base import Outcome, Setting, TrackedRun, Tracker
from cogtune.train.trackers.delivery import Delivery, reason

TRACKERS_FILE = "trackers.json"
"""In a run's folder: by which key each package knows the run, so that it is continued there too."""


class _Package(NamedTuple):
    module: str
    tracker: str
    hint: str


_PACKAGES = {
    "wandb": _Package(
        "wandb_tracker",
        "WandbTracker",
        phrase("run `wandb login` once, or set WANDB_MODE=offline: `wandb sync` sends it later"),
    ),
    "mlflow": _Package(
        "mlflow_tracker",
        "MLflowTracker",
        phrase("set MLFLOW_TRACKING_URI to your server; to keep runs on this machine: pip install mlflow"),
    ),
    "swanlab": _Package(
        "swanlab_tracker",
        "SwanLabTracker",
        phrase("run `swanlab login` once, or set SWANLAB_MODE=offline: `swanlab sync` sends it later"),
    ),
    "trackio": _Package(
        "trackio_tracker",
        "TrackioTracker",
        phrase("TRACKIO_DIR names a folder that can be written, TRACKIO_SPACE_ID a Space"),
    ),
}


def check_packages(config: RunConfig) -> None:
    """Check that the packages of ``log.trackers`` are installed.

    Raises:
        SetupError: one is not.
    """
    missing = [name for name in config.log.trackers if find_spec(name) is None]
    if missing:
        raise SetupError(
            tr("log.trackers: {names} is not installed", names=", ".join(missing)),
            hint="pip install 'cogtune[track]'",
            code="no-tracker-packages",
        )


def tracked_run(config: RunConfig, output: Path, key: str | None = None) -> TrackedRun:
    """Return what trackers show of a run in ``output``."""
    name = config.log.run_name or output.absolute().name
    settings: dict[str, Setting] = {
        f"{section}.{key}": value if isinstance(value, bool | int | float | str) else json.dumps(value)
        for section, part in config.model_dump(mode="json").items()
        for key, value in part.items()
    }
    return TrackedRun(output.absolute(), config.log.project, name, settings, config.to_yaml(), key)


class Trackers:
    """The trackers of a run, a context manager that closes them with how the run ended. Rank 0 opens them.

    Attributes:
        opened: those that are open, none on other ranks.
    """

    def __init__(self, config: RunConfig, say: Callable[[str], None], warn: Callable[[str], None]) -> None:
        self._config, self._say, self._warn = config, say, warn
        self.opened: list[Tracker] = []

    def __enter__(self) -> Trackers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        outcome: Outcome = "finished" if error is None else "failed"
        if isinstance(error, Stopped | KeyboardInterrupt):
            outcome = "stopped"
        for tracker in reversed(self.opened):  # TensorBoard's last: its folder may be gone, which is an error
            tracker.close(outcome)

    def open(self, output: Path, *, continues: bool) -> None:
        """Open them, each in its run of an earlier start in this folder, if there was one.

        A run that continues goes on without a tracker that cannot be opened.

        Raises:
            SetupError: a tracker of a new run cannot be opened.
        """
        path = output / TRACKERS_FILE
        keys = _read_keys(path)
        for name in self._config.log.trackers:
            run, package = tracked_run(self._config, output, keys.get(name)), _PACKAGES[name]
            try:
                tracker = Delivery(name, partial(_open, package, run), self._warn)
            except Exception as error:
                text = tr("log.trackers: {name} cannot be opened: {error}", name=name, error=reason(error))
                if not continues:
                    raise SetupError(text, hint=tr(package.hint), code="tracker-not-opened") from error
                self._warn(text)
                continue
            self.opened.append(tracker)
            keys[name] = tracker.key
            files.write_json(path, keys)
            self._say(tr("{name}: this run is {key} ({place})", name=name, key=tracker.key, place=tracker.place))

    def show_in_folder(self, output: Path, step: int) -> None:
        """Write TensorBoard's events too, after those of the ``step`` that the run resumes from."""
        from cogtune.train.trackers.tensorboard import TensorBoardTracker

        self.opened.insert(0, TensorBoardTracker(tracked_run(self._config, output), step))


def _open(package: _Package, run: TrackedRun) -> Tracker:
    module = import_module(f"cogtune.train.trackers.{package.module}")
    tracker: Tracker = getattr(module, package.tracker)(run)
    return tracker


def _read_keys(path: Path) -> dict[str, str]:
    """Return each package's key of the run; empty if there is no such file, or one that nothing can be read from."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {name: key for name, key in found.items() if isinstance(key, str)} if isinstance(found, dict) else {}
