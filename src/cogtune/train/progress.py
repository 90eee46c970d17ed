"""How far a run is: what the checkpoint keeps of it, and what the user sees of it."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch

from cogtune.data.sampler import Position
from cogtune.train.log import Metrics, duration, log, peak_memory_gib


@dataclass
class Progress:
    """Counters of a run; all of them are in the checkpoint, so that a continued run reports as if never stopped."""

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
    last_validation_loss: float | None = None
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
    def from_dict(values: dict[str, Any]) -> Progress:
        return Progress(**{field.name: values[field.name] for field in fields(Progress) if field.name in values})


class Reporter:
    """Writes a line of numbers every ``log.steps`` steps: averages over the window, so that noise shows less."""

    def __init__(self, metrics: Metrics, progress: Progress, total: int, every: int, device: torch.device) -> None:
        self._metrics, self._progress, self._total, self._every, self._device = metrics, progress, total, every, device
        self._start_step = progress.step
        self._start = self._window_start = time.perf_counter()
        self._window = (progress.samples, progress.tokens)
        self._away = 0.0  # seconds since the window began that were not training

    def away(self, seconds: float) -> None:
        """Validation and saving do not count into the speed."""
        self._away += seconds

    def step(self, lr: float, grad_norm: float, epoch: float) -> None:
        """Call once after every optimiser step."""
        progress = self._progress
        if progress.step % self._every and progress.step != self._total:
            return
        now = time.perf_counter()
        seconds = max(now - self._window_start - self._away, 1e-9)
        samples, tokens = progress.samples - self._window[0], progress.tokens - self._window[1]
        loss = progress.window_loss / max(progress.window_labels, 1)
        values = {
            "epoch": round(epoch, 4),
            "loss": loss,
            "lr": lr,
            "grad_norm": grad_norm,
            "labels": progress.window_labels,
            "samples_per_second": samples / seconds,
            "tokens_per_second": tokens / seconds,
            "memory_gib": peak_memory_gib(self._device),
        }
        self._metrics.write("train", progress.step, **values)
        done = progress.step - self._start_step
        left = (now - self._start) / done * (self._total - progress.step)
        log.info(
            f"step {progress.step}/{self._total}  epoch {epoch:.2f}  "
            f"loss {loss:.4f}  lr {lr:.2e}  grad {grad_norm:.3f}  "
            f"{samples / seconds:.2f} samples/s  {tokens / seconds:.0f} tokens/s  "
            f"{values['memory_gib']:.2f} GiB  ETA {duration(left)}"
        )
        progress.window_loss, progress.window_labels = 0.0, 0
        self._window, self._window_start, self._away = (progress.samples, progress.tokens), now, 0.0
