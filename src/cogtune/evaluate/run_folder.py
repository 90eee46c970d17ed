"""The output folder of a training, read for reports and comparisons: whatever of it is there."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from cogtune.errors import CogtuneError, DataError
from cogtune.language import tr

RUN_FILE = "run.json"
CONFIG_FILE = "config.yaml"
METRICS_FILE = "metrics.jsonl"
PLAN_FILE = "plan.json"
ANSWERS_FOLDER = "answers"
_STAMP = re.compile(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d),\d+ ([A-Z]+) (.*)")
_ERROR_LINES = 20


def read_metrics(output: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's metrics up to the first that is none, such as one cut short by a kill."""
    lines: list[dict[str, Any]] = []
    for line in (output / METRICS_FILE).read_bytes().splitlines():
        try:
            found = json.loads(line)
        except (ValueError, RecursionError):
            break
        if not isinstance(found, dict) or not isinstance(found.get("step"), int):
            break
        lines.append(found)
    return lines


def energy_of(metrics: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return what a run's lines say last of its energy, ``joules`` and ``joules_per_sample``; empty if nothing."""
    line: Mapping[str, Any] = next((line for line in reversed(metrics) if line.get("kind") == "energy"), {})
    return {name: float(line[name]) for name in ("joules", "joules_per_sample") if name in line}


@dataclass(frozen=True)
class RunFolder:
    """A training's files.

    Attributes:
        config: every key, section by section, as it was used; ``config_text`` is the file.
        result: how it ended (``step``, ``best_step``, ...); None if it did not.
        metrics: the lines of ``metrics.jsonl``.
        seconds: from the first line of its log to the last, pauses between starts included.
        error: the last error in its log, if no line of progress follows.
    """

    path: Path
    config: dict[str, Any] = field(default_factory=dict)
    config_text: str = ""
    run: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, Any] = field(default_factory=dict)
    plan: dict[str, Any] = field(default_factory=dict)
    metrics: list[dict[str, Any]] = field(default_factory=list)
    seconds: float | None = None
    started: str = ""
    error: str | None = None

    @property
    def result(self) -> dict[str, Any] | None:
        found = self.run.get("result")
        return found if isinstance(found, dict) else None

    @property
    def steps(self) -> int:
        """The last step that was logged."""
        return max((int(line["step"]) for line in self.metrics), default=0)

    @property
    def total_steps(self) -> int:
        return int(self.run.get("total_steps") or 0)

    def lines(self, kind: str) -> list[dict[str, Any]]:
        """The metrics of a kind: ``train``, ``validation``, ``answers`` or ``energy``."""
        return [line for line in self.metrics if line.get("kind") == kind]

    def answer_files(self) -> dict[int, Path]:
        """The answers to validation questions, by the step they were given at."""
        names = sorted((self.path / ANSWERS_FOLDER).glob("step-*.jsonl"))
        return {int(name.stem.removeprefix("step-")): name for name in names if name.stem[5:].isdigit()}

    @property
    def best(self) -> tuple[int | None, str, float | None]:
        """The best checkpoint's step, what chose it, and its value; as far as it came, of a run that did not finish."""
        result = self.result or {}
        metric = str(result.get("best_metric") or self.value("eval.metric") or "loss")
        if result:
            value = result.get("best_value", result.get("best_loss") if metric == "loss" else None)
            return result.get("best_step"), metric, value
        chosen = [line for line in self.lines("validation") if line.get("best")]
        if not chosen:
            return None, metric, None
        step = chosen[-1]["step"]
        return step, metric, self._value_at(step, metric)

    def _value_at(self, step: int, metric: str) -> float | None:
        name, _, plain = metric.rpartition("/")
        for line in self.metrics:
            if line["step"] == step and line.get("kind") == "answers" and plain != "loss":
                return (line.get("values") or {}).get(metric)
            if line["step"] == step and line.get("kind") == "validation" and plain == "loss":
                return ((line.get("sets") or {}).get(name) or {} if name else line).get("loss")
        return None

    def value(self, key: str) -> Any:
        """The value of a dotted key."""
        section, _, name = key.partition(".")
        return (self.config.get(section) or {}).get(name)


def shown_value(metric: str, value: float | None) -> str:
    """Return a value of ``eval.metric`` as text: a loss in nats, other metrics in points (hundredths)."""
    if value is None:
        return ""
    return f"{value:.4f}" if metric.rpartition("/")[2] == "loss" else f"{100 * value:.1f}"


def is_run(folder: Path) -> bool:
    """Whether a folder is the output of a training."""
    return (folder / RUN_FILE).is_file() and (folder / CONFIG_FILE).is_file()


def read_run(folder: Path) -> RunFolder:
    """Read a training's output folder; what a crash has left incomplete is taken as far as it goes.

    Raises:
        DataError: it is none.
    """
    if not (folder / RUN_FILE).is_file():
        raise DataError(
            tr("{path}: not the output folder of a training", path=folder),
            hint=tr("name the folder that was given as --output to `cogtune train`"),
            code="not-a-run",
        )
    text = _text(folder / CONFIG_FILE)
    started, seconds, error = _log(folder / "run.log")
    return RunFolder(
        path=folder,
        config=_mapping(_yaml(text)),
        config_text=text,
        run=_json(folder / RUN_FILE),
        data=_json(folder / "data.json"),
        versions=_json(folder / "versions.json"),
        plan=_json(folder / PLAN_FILE),
        metrics=read_metrics(folder) if (folder / METRICS_FILE).is_file() else [],
        seconds=seconds,
        started=started,
        error=error,
    )


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _yaml(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return None


def _json(path: Path) -> dict[str, Any]:
    try:
        return _mapping(json.loads(_text(path) or "{}"))
    except ValueError:
        return {}


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _log(path: Path) -> tuple[str, float | None, str | None]:
    """When a log begins, how many seconds it spans, and the error that ends it."""
    lines = _text(path).splitlines()
    stamped = [(number, match) for number, line in enumerate(lines) if (match := _STAMP.fullmatch(line))]
    if not stamped:
        return "", None, None
    times = [datetime.fromisoformat(match[1]) for _, match in (stamped[0], stamped[-1])]
    number, last = stamped[-1]
    error = None
    if last[2] in ("ERROR", "CRITICAL"):
        error = "\n".join([last[3], *lines[number + 1 : number + _ERROR_LINES]])
    return stamped[0][1][1], (times[1] - times[0]).total_seconds(), error


@contextmanager
def undamaged(folder: Path) -> Iterator[None]:
    """Turn what goes wrong inside the block, over values of a folder's files that no run writes, into a DataError."""
    try:
        yield
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, CogtuneError):
            raise
        raise DataError(
            tr(
                "{path}: one of its files has values that no run writes ({error})",
                path=folder,
                error=f"{type(error).__name__}: {error}",
            ),
            hint=tr("copy the folder again from where it was made, or leave it out"),
            code="not-a-run",
        ) from error
