"""The record of a run: ``run.json``, which says what run an output folder holds. Every checkpoint contains it too."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cogtune.checkpoint.resume_state import STATE_FILE
from cogtune.configuration.field_types import fields_of
from cogtune.configuration.run_config import RunConfig
from cogtune.errors import CheckpointError
from cogtune.language import tr
from cogtune.system import files

RUN_FILE = "run.json"
_RESULT = {"step", "best_step"}


@dataclass(frozen=True)
class RunIdentity:
    """The values by which two starts are recognised as the same run."""

    keys: dict[str, Any]
    """Configuration values that must be equal."""
    fingerprints: dict[str, str]
    """Configuration key of a path -> fingerprint of its content."""

    def differences(self, stored: RunIdentity, free: frozenset[str] = frozenset()) -> list[str]:
        """Return one line for each key that differs, with its name and both values."""
        lines = []
        for key in sorted((self.keys.keys() | stored.keys.keys()) - free):
            if key not in stored.keys and _is_default(key, self.keys[key]):
                continue  # a key that came later: earlier runs had its default
            if self.keys.get(key) != stored.keys.get(key):
                lines.append(
                    tr(
                        "{key}: {key_2} there, {key_3} now",
                        key=key,
                        key_2=stored.keys.get(key),
                        key_3=self.keys.get(key),
                    )
                )
        for key in sorted(self.fingerprints.keys() | stored.fingerprints.keys()):
            if self.fingerprints.get(key) != stored.fingerprints.get(key):
                lines.append(tr("{key}: its content differs from what that run used", key=key))
        return lines


@dataclass(frozen=True)
class RunRecord:
    """The content of ``run.json``; with a checkpoint's copy of it, that checkpoint alone is enough to resume."""

    identity: RunIdentity
    batch_size: int
    accumulation: int
    ranks: int
    total_steps: int
    resumed_from: str | None = None
    finished: bool = False
    result: dict[str, Any] = field(default_factory=dict)

    @property
    def global_batch(self) -> int:
        return self.batch_size * self.accumulation * self.ranks

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "global_batch": self.global_batch}

    @staticmethod
    def from_dict(values: Any) -> RunRecord:
        """Raises TypeError or KeyError if these are not the values of a run."""
        if not isinstance(values, dict) or not isinstance(values["identity"], dict):
            raise TypeError("no run's record")
        for name in ("batch_size", "accumulation", "ranks", "total_steps"):
            if isinstance(values[name], bool) or not isinstance(values[name], int) or values[name] < 1:
                raise TypeError(f"{name} is {values[name]!a:.60}, a whole number above 0 was expected")
        for name, value in values["identity"].items():
            if not isinstance(value, dict):
                raise TypeError(f"identity.{name} is {value!a:.60}, an object was expected")
        result = values.get("result", {})
        if not isinstance(result, dict) or (values.get("finished") and not result.keys() >= _RESULT):
            raise TypeError(f"result is {result!a:.60}, an object with {', '.join(sorted(_RESULT))} was expected")
        known = {key: value for key, value in values.items() if key in RunRecord.__dataclass_fields__}
        return RunRecord(**{**known, "identity": RunIdentity(**values["identity"])})


def write_record(output: Path, record: RunRecord) -> None:
    files.write_json(output / RUN_FILE, record.to_dict(), durable=True)


def record_of(counters: Mapping[str, Any], checkpoint: Path) -> RunRecord:
    """Return the run of a checkpoint's counters.

    Raises:
        CheckpointError: they hold none.
    """
    try:
        return RunRecord.from_dict(counters.get("run"))
    except (KeyError, TypeError) as error:
        raise CheckpointError(
            tr("{path}: no record of a run in it ({error})", path=checkpoint / STATE_FILE, error=error),
            hint=tr("give another checkpoint of that run, or that run's output folder"),
        ) from error


def _is_default(key: str, value: Any) -> bool:
    found = fields_of(RunConfig).get(key)
    if found is None or found.is_required():
        return False
    default = found.get_default(call_default_factory=True)
    return bool(value == (list(default) if isinstance(default, tuple) else default))
