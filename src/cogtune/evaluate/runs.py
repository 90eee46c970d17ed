"""Past runs of a folder, what differs between their settings, and how they ended."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cogtune.errors import DataError
from cogtune.evaluate.result import RESULT_FILE
from cogtune.evaluate.run_folder import RunFolder, is_run, read_run, shown_value, undamaged
from cogtune.evaluate.text import visible
from cogtune.language import aligned, language, phrase, tr
from cogtune.system.durations import format_duration

STATES = {"finished": phrase("finished"), "unfinished": phrase("unfinished"), "failed": phrase("failed")}
_DEEPEST = 3
_OWN = frozenset({"train.output", "train.resume", "train.restart"})
"""Keys that name places; every run has its own."""


@dataclass(frozen=True)
class RunSummary:
    """A run: where it is, its settings, and how far it came.

    Attributes:
        values: the metrics of its answers at the best (else the last) step, in 0 to 1; ``base``: before the first.
        verdict: of its evaluation in ``eval/``, in the user's language, else None.
        warnings: codes of what it warned of.
    """

    path: str
    state: str
    step: int
    total_steps: int
    started: str
    seconds: float | None
    loss: float | None
    best_step: int | None
    best_metric: str
    best_value: float | None
    values: dict[str, float]
    base: dict[str, float]
    verdict: list[str] | None
    warnings: list[str]
    keys: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return dict(vars(self))


def find_runs(folder: Path) -> list[RunSummary]:
    """Return the runs below a folder, at most three folders deep, oldest first.

    Raises:
        DataError: there is no such folder.
    """
    if not folder.is_dir():
        raise DataError(
            tr("{path}: there is no such folder", path=folder),
            hint=tr("name the folder that your output folders are in"),
            code="data-no-such-path",
        )
    places = [folder, *(path for depth in range(1, _DEEPEST + 1) for path in folder.glob("/".join("*" * depth)))]
    runs = [summary(read_run(path)) for path in sorted(places) if path.is_dir() and is_run(path)]
    return sorted(runs, key=lambda run: (run.started, run.path))


def summary(run: RunFolder) -> RunSummary:
    """Return what a list of runs shows of one.

    Raises:
        DataError: one of its files has values that no run writes.
    """
    with undamaged(run.path):
        return _summary(run)


def _summary(run: RunFolder) -> RunSummary:
    result = run.result
    losses = run.lines("train")
    best_step, best_metric, best_value = run.best
    answers = {
        line["step"]: {name: float(value) for name, value in line["values"].items()} for line in run.lines("answers")
    }
    last = answers.get(best_step) or (answers[max(answers)] if answers else {})
    return RunSummary(
        path=str(run.path),
        state="finished" if result is not None else "failed" if run.error else "unfinished",
        step=int((result or {}).get("step") or run.steps),
        total_steps=run.total_steps,
        started=run.started,
        seconds=run.seconds,
        loss=float(losses[-1]["loss"]) if losses else None,
        best_step=best_step,
        best_metric=best_metric,
        best_value=None if best_value is None else float(best_value),
        values=last,
        base=answers.get(0, {}),
        verdict=_verdict(run.path / "eval" / RESULT_FILE),
        warnings=[str(line.get("code")) for line in run.lines("warning")],
        keys=flat(run),
    )


def flat(run: RunFolder) -> dict[str, Any]:
    """Return every key of a run's configuration."""
    parts = ((name, part) for name, part in run.config.items() if isinstance(part, dict))
    return {f"{name}.{key}": value for name, part in parts for key, value in part.items()}


def differing(runs: Sequence[RunSummary]) -> dict[str, list[Any]]:
    """Return the keys that are not the same in all runs, with each run's value."""
    names = dict.fromkeys(name for run in runs for name in run.keys)
    found = {name: [run.keys.get(name) for run in runs] for name in names if name not in _OWN}
    return {name: values for name, values in found.items() if any(value != values[0] for value in values)}


def lines(runs: Sequence[RunSummary]) -> list[str]:
    """Return a table of runs, and below it the settings that differ."""
    if not runs:
        return [tr("no run found")]
    metrics = list(dict.fromkeys(name for run in runs for name in run.values))[:3]
    head = [tr("run"), tr("state"), tr("steps"), tr("time"), tr("loss"), tr("best validation"), *metrics]
    rows = [head] + [
        [
            visible(run.path),
            tr(STATES[run.state]),
            f"{run.step}/{run.total_steps}",
            "" if run.seconds is None else format_duration(run.seconds),
            _number(run.loss),
            _best(run),
            *(_change(run, name) for name in metrics),
        ]
        for run in runs
    ]
    text = aligned(rows)
    for run in runs:
        text += [
            tr("{run}: {sentence}", run=visible(run.path), sentence=visible(sentence)) for sentence in run.verdict or ()
        ]
    changed = differing(runs)
    if changed:
        text += ["", tr("settings that differ:")]
        text += aligned([[f"  {name}", *(_shown(value) for value in values)] for name, values in changed.items()])
    return text


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _best(run: RunSummary) -> str:
    """The value that chose the best checkpoint, with its metric's name unless that is the loss."""
    value = shown_value(run.best_metric, run.best_value)
    return value if run.best_metric == "loss" or not value else f"{run.best_metric} {value}"


def _change(run: RunSummary, name: str) -> str:
    """A metric in points, with the base's before it if there is one."""
    if name not in run.values:
        return ""
    before = f"{100 * run.base[name]:.1f} -> " if name in run.base else ""
    return f"{before}{100 * run.values[name]:.1f}"


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return visible(text if len(text) <= 40 else f"{text[:12]}...{text[-25:]}")  # a path's end tells more


def _verdict(path: Path) -> list[str] | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["verdict"][language()]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return [str(line) for line in found]
