"""The energy that the cards of a run draw while it trains, validates and saves."""

from __future__ import annotations

from typing import Any

from cogtune.evaluate.run_folder import read_metrics
from cogtune.system.energy import Counter, read_counter
from cogtune.train.engines.base import Engine
from cogtune.train.log import Metrics
from cogtune.train.progress import Progress

KIND = "energy"
"""The kind of its lines in ``metrics.jsonl``: joules so far, and the samples they were drawn for."""


class EnergyMeter:
    """Adds up the counters of all cards from its making on, and what earlier starts in this folder drew.

    It writes nothing where a card has no counter.
    """

    def __init__(self, engine: Engine, metrics: Metrics, progress: Progress) -> None:
        self._engine, self._metrics, self._progress = engine, metrics, progress
        lines = [] if metrics.output is None else read_metrics(metrics.output)
        before: dict[str, Any] = next((line for line in reversed(lines) if line["kind"] == KIND), {})
        self._joules, self._samples = float(before.get("joules", 0.0)), int(before.get("samples", 0))
        self._read, self._counted = read_counter(engine.device), progress.samples

    def record(self) -> None:
        """Write what the run has drawn so far. Collective."""
        drawn = self._engine.group.gather_all(self._drawn())
        if None in drawn:
            return
        self._joules += sum({one.card: one.joules for one in drawn if one is not None}.values())
        self._samples += self._progress.samples - self._counted
        self._counted = self._progress.samples
        each = self._joules / max(self._samples, 1)
        self._metrics.write(
            KIND, self._progress.step, joules=self._joules, samples=self._samples, joules_per_sample=each
        )

    def _drawn(self) -> Counter | None:
        """Return what this process's card has drawn since the last call."""
        before, now = self._read, read_counter(self._engine.device)
        self._read = now
        return None if before is None or now is None else Counter(now.card, now.joules - before.joules)
