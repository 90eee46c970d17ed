"""Progress of a run: the counters in a checkpoint, and the log lines that the user sees."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from cogtune.data.sampler import Position
from cogtune.errors import CheckpointError
from cogtune.language import tr
from cogtune.system.durations import format_clock
from cogtune.train.engines.async_scalar import AsyncScalar
from cogtune.train.log import Metrics, log, peak_memory_gib


@dataclass
class Progress:
    """Counters of a run. All are in the checkpoint, so that a resumed run reports as if it had never stopped."""

    step: int = 0
    epoch: int = 0
    rows_taken: int = 0  # of that epoch, over all ranks
    samples: int = 0  # rows trained on
    tokens: int = 0
    labels: int = 0
    window_loss: float = 0.0  # summed over labels since the last line of the log
    window_labels: int = 0
    best_loss: float | None = None
    best_step: int | None = None
    validated_step: int | None = None
    validations_without_better: int = 0
    skipped_steps: int = 0  # float16: gradients overflowed
    stopped_early: bool = False

    @property
    def position(self) -> Position:
        return self.epoch, self.rows_taken

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def of(counters: Mapping[str, Any], checkpoint: Path) -> Progress:
        """Return the progress that a checkpoint's counters hold.

        Raises:
            CheckpointError: it is missing, or a counter has a value of another type or below 0.
        """
        values = counters.get("progress")
        if not isinstance(values, dict):
            raise damaged(checkpoint, "progress", values)
        known = {field.name: values[field.name] for field in fields(Progress) if field.name in values}
        for name, value in known.items():
            plain, optional = getattr(Progress, name), name in ("best_loss", "best_step", "validated_step")
            kinds = (bool,) if isinstance(plain, bool) else (int, float) if "loss" in name else (int,)
            fits = isinstance(value, kinds) and isinstance(value, bool) == (kinds == (bool,))
            if not (value is None if optional and not fits else fits and (value >= 0 or "loss" in name)):
                raise damaged(checkpoint, f"progress.{name}", value)
        return Progress(**known)


def damaged(checkpoint: Path, key: str, value: object) -> CheckpointError:
    """Return the error for a value of ``state.json`` that no run writes."""
    return CheckpointError(
        tr("{path}: {key} is {value!a:.60}, which no run writes", path=checkpoint / "state.json", key=key, value=value),
        hint=tr("give another checkpoint of that run, or that run's output folder"),
    )


@dataclass(frozen=True)
class _Line:
    """The values of a log line that are known when its step is launched; the gradient norm arrives later."""

    step: int
    epoch: float
    loss: float
    lr: float
    labels: int
    samples: int
    tokens: int
    memory_gib: float


class Reporter:
    """Writes a line of metrics every ``log.steps`` steps, averaged over that window to reduce noise.

    A window lasts from the arrival of one gradient norm to that of another, so its speed is correct whenever the host
    reads them.
    """

    def __init__(self, metrics: Metrics, progress: Progress, total: int, every: int, device: torch.device) -> None:
        self._metrics, self._progress, self._total, self._every, self._device = metrics, progress, total, every, device
        self._start_step = progress.step
        self._start = time.perf_counter()
        self._window_start = AsyncScalar(torch.zeros((), device=device))
        self._window = (progress.samples, progress.tokens)
        self._away = 0.0  # seconds of the window that were spent on validation and saving
        self._line: _Line | None = None

    def away(self, seconds: float) -> None:
        """Exclude time spent on validation and saving from the speed. Both begin after the device has finished the last
        step."""
        self._away += seconds

    def step(self, lr: float, epoch: float) -> None:
        """Call once after every optimiser step, and `arrived` before the next one's."""
        progress = self._progress
        if progress.step % self._every and progress.step != self._total:
            return
        loss = progress.window_loss / max(progress.window_labels, 1)
        samples, tokens = progress.samples - self._window[0], progress.tokens - self._window[1]
        memory = peak_memory_gib(self._device)
        self._line = _Line(progress.step, epoch, loss, lr, progress.window_labels, samples, tokens, memory)
        progress.window_loss, progress.window_labels = 0.0, 0
        self._window = (progress.samples, progress.tokens)

    def arrived(self, norm: AsyncScalar) -> None:
        """Write the line of the last step, if it has one; ``norm`` is its gradient norm."""
        line, self._line = self._line, None
        if line is None:
            return
        grad_norm = norm.value()
        seconds = max(norm.seconds_since(self._window_start) - self._away, 1e-9)
        values = {
            "epoch": round(line.epoch, 4),
            "loss": line.loss,
            "lr": line.lr,
            "grad_norm": grad_norm,
            "labels": line.labels,
            "samples_per_second": line.samples / seconds,
            "tokens_per_second": line.tokens / seconds,
            "memory_gib": line.memory_gib,
        }
        self._metrics.write("train", line.step, **values)
        left = (time.perf_counter() - self._start) / (line.step - self._start_step) * (self._total - line.step)
        log.info(
            tr(
                "step {step}/{total}  epoch {epoch:.2f}  loss {loss:.4f}  lr {lr:.2e}  grad"
                " {grad_norm:.3f}  {samples:.2f} samples/s  {tokens:.0f} tokens/s  {memory_gib:.2f} GiB "
                " ETA {left}",
                step=line.step,
                total=self._total,
                epoch=line.epoch,
                loss=line.loss,
                lr=line.lr,
                grad_norm=grad_norm,
                samples=line.samples / seconds,
                tokens=line.tokens / seconds,
                memory_gib=line.memory_gib,
                left=format_clock(left),
            )
        )
        self._window_start, self._away = norm, 0.0
