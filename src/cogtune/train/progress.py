"""Progress of a run: the counters in a checkpoint, and the log lines that the user sees."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from cogtune.data.sampler import Position
from cogtune.errors import CheckpointError
from cogtune.evaluate.run_folder import shown_value
from cogtune.language import tr
from cogtune.system.durations import format_clock
from cogtune.system.machine import resident_memory
from cogtune.train.engines.async_scalar import AsyncScalar
from cogtune.train.log import Metrics, log, peak_memory_gib
from cogtune.train.status_line import status

LINE_EVERY = 15
"""Seconds after which a step gets a line although its window of metrics goes on."""


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
    best_step: int | None = None
    best_metric: str | None = None  # what chose it: eval.metric
    best_value: float | None = None  # of that metric, then
    validated_step: int | None = None
    exchanged_step: int | None = None  # when rows were measured with other pictures
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
        if "best_loss" in values and known.get("best_value") is None:  # written before metrics could choose
            known |= {"best_metric": "loss", "best_value": values["best_loss"]}
        for name, value in known.items():
            plain = getattr(Progress, name)
            optional = name in ("best_step", "best_metric", "best_value", "validated_step", "exchanged_step")
            real = "loss" in name or "value" in name
            if name == "best_metric":
                if value is not None and not isinstance(value, str):
                    raise damaged(checkpoint, f"progress.{name}", value)
                continue
            kinds = (bool,) if isinstance(plain, bool) else (int, float) if real else (int,)
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


def best_so_far(progress: Progress) -> str:
    """Return which checkpoint is the best, and by which value."""
    value = shown_value(progress.best_metric or "loss", progress.best_value)
    if (progress.best_metric or "loss") == "loss":
        return tr("best validation loss {value} at step {best_step}", value=value, best_step=progress.best_step)
    return tr("best {metric} {value} at step {best_step}", metric=progress.best_metric, value=value,
              best_step=progress.best_step)  # fmt: skip


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
    loss_max: float


@dataclass(frozen=True)
class _Step:
    """A step whose gradient norm has not arrived, with the counters after it."""

    step: int
    epoch: float
    lr: float
    loss: float
    labels: int
    samples: int
    tokens: int


class Reporter:
    """Reports steps: metrics by number, lines by time, and every step in the status line.

    A line of metrics is averaged over ``log.steps`` steps to reduce noise. Lines of the log come with each of them, for
    the first step, and otherwise every 15 seconds. A window lasts from the arrival of one gradient norm to that of
    another, so its speed is correct whenever the host reads them.
    """

    def __init__(self, metrics: Metrics, progress: Progress, total: int, every: int, device: torch.device) -> None:
        self._metrics, self._progress, self._total, self._every, self._device = metrics, progress, total, every, device
        self._start = time.perf_counter()
        self._begin = AsyncScalar(torch.zeros((), device=device))
        self._window = _Window(self._begin, progress.samples, progress.tokens)
        self._said = _Window(self._begin, progress.samples, progress.tokens)
        self._line: _Line | None = None
        self._step: _Step | None = None
        self._first: tuple[int, float] | None = None  # the first step of this process, and when it was done
        self._highest_loss = self._highest_norm = -math.inf  # of the window's steps
        self._zero = torch.zeros((), device=device)
        self._norm: AsyncScalar | None = None  # of the last step, unless it is open
        self._batch: tuple[float, AsyncScalar, AsyncScalar | None] | None = None
        self._waited = 0.0  # seconds of the window in which the device had to wait for batches
        self._last_said = 0.0

    def away(self, seconds: float) -> None:
        """Exclude time spent on validation and saving from the speed. Both begin after the device has finished the last
        step."""
        self._window.away += seconds
        self._said.away += seconds

    def batch(self, seconds: float) -> None:
        """Call when the next step's batches are there, ``seconds`` after they were asked for.

        While the device still computes, the host's waiting costs nothing. So a mark is queued after the device's work:
        it tells later how long after the last gradient norm the device could go on.
        """
        self._batch = (seconds, AsyncScalar(self._zero), self._norm)

    def _count_waiting(self, norm: AsyncScalar) -> None:
        """Add what the device waited for the last batches; ``norm`` has arrived, and the mark with it."""
        if self._batch is not None:
            seconds, mark, before = self._batch
            self._waited += min(seconds, max(0.0, mark.seconds_since(before or norm)))
            self._batch = None

    def step(self, lr: float, epoch: float, loss: float, labels: int) -> None:
        """Call once after every optimiser step, and `arrived` before the next one's.

        Args:
            lr: the step's learning rate.
            epoch: epochs trained so far.
            loss: the step's mean loss over its ``labels``.
        """
        progress, self._norm = self._progress, None
        self._highest_loss = max(self._highest_loss, loss)
        self._step = _Step(progress.step, epoch, lr, loss, labels, progress.samples, progress.tokens)
        if progress.step % self._every and progress.step != self._total:
            return
        loss = progress.window_loss / max(progress.window_labels, 1)
        samples, tokens = progress.samples - self._window.samples, progress.tokens - self._window.tokens
        memory = peak_memory_gib(self._device)
        self._line = _Line(
            progress.step, epoch, loss, lr, progress.window_labels, samples, tokens, memory, self._highest_loss
        )
        self._highest_loss = -math.inf
        progress.window_loss, progress.window_labels = 0.0, 0
        self._window.samples, self._window.tokens = progress.samples, progress.tokens

    def arrived(self, norm: AsyncScalar) -> None:
        """Report the last step; ``norm`` is its gradient norm."""
        step, self._step = self._step, None
        line, self._line = self._line, None
        if step is None:
            return
        self._count_waiting(norm)
        self._norm = norm
        if math.isfinite(norm.value()):  # float16 skips steps whose gradients overflow
            self._highest_norm = max(self._highest_norm, norm.value())
        if line is not None:
            seconds, host = self._window.seconds(norm), resident_memory()
            values = {
                "epoch": round(line.epoch, 4),
                "loss": line.loss,
                "loss_max": line.loss_max,
                "lr": line.lr,
                "grad_norm": norm.value(),
                "grad_norm_max": max(self._highest_norm, norm.value()),
                "labels": line.labels,
                "samples_per_second": line.samples / seconds,
                "tokens_per_second": line.tokens / seconds,
                "memory_gib": line.memory_gib,
                "host_gib": None if host is None else host / 2**30,
                "loader_wait": min(1.0, self._waited / seconds),
            }
            self._highest_norm, self._waited = -math.inf, 0.0
            self._metrics.write("train", line.step, **values)
            self._window.begin(norm)
        self._say(step, norm, due=line is not None)

    def _say(self, step: _Step, norm: AsyncScalar, *, due: bool) -> None:
        """Show the step, and log a line if it is time for one."""
        now = time.perf_counter()
        first = self._first is None
        if self._first is None:
            self._first = (step.step, now)
        self._said.add(step.loss, step.labels)
        last = step.step == self._total
        line = due or first or last or now - self._last_said >= LINE_EVERY
        if not line and not status.active:
            return
        seconds, memory = self._said.seconds(norm), peak_memory_gib(self._device)
        shares = {
            "step": step.step,
            "total": self._total,
            "loss": self._said.loss / max(self._said.labels, 1),
            "samples": (step.samples - self._said.samples) / seconds,
            "memory_gib": memory,
        }
        end = self._ending(step, now)
        short = tr(
            "step {step}/{total}  loss {loss:.4f}  {samples:.2f} samples/s  {memory_gib:.2f} GiB  {end}",
            end=end,
            **shares,
        )
        status.show(short)
        if line:
            text = tr(
                "step {step}/{total}  epoch {epoch:.2f}  loss {loss:.4f}  lr {lr:.2e}  grad {grad_norm:.3f}"
                "  {samples:.2f} samples/s  {tokens:.0f} tokens/s  {memory_gib:.2f} GiB  {end}",
                epoch=step.epoch,
                lr=step.lr,
                grad_norm=norm.value(),
                tokens=(step.tokens - self._said.tokens) / seconds,
                end=end,
                **shares,
            )
            log.info(text, extra={"step_line": True, "kept": first or last})
            self._last_said = now
            self._said = _Window(norm, step.samples, step.tokens)

    def _ending(self, step: _Step, now: float) -> str:
        """Return the time that is left; for the first step, which may compile, the time that it took."""
        assert self._first is not None
        number, done = self._first
        if step.step == number:
            return tr("(the first step took {seconds:.1f} s)", seconds=now - self._start)
        left = (now - done) / (step.step - number) * (self._total - step.step)
        return tr("ETA {left}", left=format_clock(left))


class _Window:
    """Steps since an earlier gradient norm arrived.

    Attributes:
        samples, tokens: the run's counters at its beginning.
        away: seconds of it that were spent on validation and saving.
        loss: summed over ``labels``.
    """

    def __init__(self, start: AsyncScalar, samples: int, tokens: int) -> None:
        self.samples, self.tokens = samples, tokens
        self.loss, self.labels = 0.0, 0
        self.begin(start)

    def begin(self, start: AsyncScalar) -> None:
        """Let its time begin with ``start``."""
        self._start, self.away = start, 0.0

    def add(self, loss: float, labels: int) -> None:
        """Count a step with a mean ``loss`` over its ``labels``."""
        self.loss, self.labels = self.loss + loss * labels, self.labels + labels

    def seconds(self, norm: AsyncScalar) -> float:
        """Return its seconds of training until ``norm`` arrived."""
        return max(norm.seconds_since(self._start) - self.away, 1e-9)
