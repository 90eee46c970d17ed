"""Log messages and metrics of a run.

Messages go through the logger ``cogtune`` to the console (rank 0) and to ``run.log`` (``run.rank1.log`` ... on other
ranks). Metrics go to ``metrics.jsonl``, one JSON object per line, the single source for reports and trackers.
"""

from __future__ import annotations

import json
import logging
import math
import resource
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch

from cogtune.configuration.run_config import RunConfig
from cogtune.errors import CogtuneError, RunError
from cogtune.evaluate import warning_texts
from cogtune.evaluate.run_folder import METRICS_FILE, read_metrics
from cogtune.evaluate.watch import Watch
from cogtune.language import tr
from cogtune.system import files
from cogtune.system.file_errors import explained
from cogtune.system.machine import free_memory, resident_memory
from cogtune.system.terminal import visible
from cogtune.train.status_line import status
from cogtune.train.trackers.base import Sample, Tracker

_KEPT_EVERY = 60
"""Seconds between steps' lines that stay on a terminal, where the status line shows the others."""
log = logging.getLogger("cogtune")

_TAGS = {
    "train": {
        "loss": "train/loss",
        "lr": "train/lr",
        "grad_norm": "train/grad_norm",
        "samples_per_second": "speed/samples_per_second",
        "tokens_per_second": "speed/tokens_per_second",
        "memory_gib": "memory/peak_gib",
        "host_gib": "memory/host_gib",
        "loader_wait": "speed/loader_wait",
    },
    "validation": {"loss": "validation/loss", "perplexity": "validation/perplexity"},
    "energy": {"joules": "energy/joules", "joules_per_sample": "energy/joules_per_sample"},
}


class _Console(logging.Handler):
    """Plain lines on standard output, readable through a pipe; warnings and errors have their level in front."""

    def __init__(self) -> None:
        super().__init__()
        self._last_step = -math.inf

    def emit(self, record: logging.LogRecord) -> None:
        if status.active and getattr(record, "step_line", False):  # the status line shows every step
            now = time.monotonic()
            if now - self._last_step < _KEPT_EVERY and not getattr(record, "kept", False):
                return
            self._last_step = now
        text = record.getMessage()
        if record.levelno >= logging.WARNING:
            text = (
                tr("error: {text}", text=text) if record.levelno >= logging.ERROR else tr("warning: {text}", text=text)
            )
        print(text, file=sys.stdout, flush=True)


@contextmanager
def console(rank: int, level: str = "info") -> Iterator[None]:
    """Show messages of at least ``level`` (info, warning, error) on the console, on rank 0 only.

    On a terminal the status line stands below them, unless the level leaves out what it shows.
    """
    handler: logging.Handler = _Console() if rank == 0 else logging.NullHandler()
    handler.setLevel(level.upper())
    shown = status.on_terminal() if rank == 0 and level == "info" else nullcontext()
    with _attached(handler), shown:
        yield


class _LogFile(logging.FileHandler):
    """A log file whose write errors end the run, like any other lost output; logging itself would print a traceback."""

    def format(self, record: logging.LogRecord) -> str:
        return visible(super().format(record))

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        with explained(Path(self.baseFilename), late=True):
            raise  # what `emit` has just caught


@contextmanager
def log_file(output: Path, rank: int) -> Iterator[None]:
    """Append messages with timestamps to this rank's file."""
    path = output / ("run.log" if rank == 0 else f"run.rank{rank}.log")
    with explained(path, late=True):
        handler = _LogFile(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    with _attached(handler):
        try:
            yield
        except BaseException as error:  # the console gets it from the command line; the file would not
            text = error.render() if isinstance(error, CogtuneError) else f"{type(error).__name__}: {error}"
            with suppress(RunError):  # the place is full or gone: what ends the run says that, or something worse
                handler.handle(log.makeRecord(log.name, logging.ERROR, __file__, 0, text, (), None))
            raise


@contextmanager
def _attached(handler: logging.Handler) -> Iterator[None]:
    level, propagate = log.level, log.propagate
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False
    try:
        yield
    finally:
        log.removeHandler(handler)
        with suppress(OSError):  # a line that could not be written has been reported
            handler.close()
        log.setLevel(level)
        log.propagate = propagate


class Metrics:
    """Writes the metrics on rank 0, and warns of what they show (`evaluate.watch`); does nothing on other ranks.

    Args:
        step: the step the run resumes from. Later lines, of a run that was killed, are dropped.
        trackers: they show what is written, and more.
    """

    def __init__(self, output: Path, *, active: bool, step: int, trackers: Sequence[Tracker] = ()) -> None:
        self._file = None
        self._trackers = list(trackers)
        if not active:
            return
        self._path = output / METRICS_FILE
        with explained(self._path, late=True):
            _drop_after(self._path, step)
            self._watch = Watch(read_metrics(output) if self._path.exists() else ())
            self._file = self._path.open("a", encoding="utf-8")

    def write(self, kind: str, step: int, **values: Any) -> None:
        """Append one line ``{"kind", "step", ...}`` and show its numbers in the trackers."""
        if self._file is None:
            return
        line = {"kind": kind, "step": step, **values}
        with explained(self._path, late=True):
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
        found = {tag: values[name] for name, tag in _TAGS.get(kind, {}).items() if values.get(name) is not None}
        self.show(step, found)
        for reason in self._watch.add(line):
            log.warning(warning_texts.line(step, reason.code, reason.cause, reason.values))
            self.write("warning", step, **reason.to_dict())
            self.show(step, {f"warnings/{reason.code}": 1.0})

    @property
    def output(self) -> Path | None:
        """The folder that is written to; None on other ranks."""
        return None if self._file is None else self._path.parent

    @property
    def shown(self) -> bool:
        """Whether a tracker shows them."""
        return bool(self._trackers)

    def show(self, step: int, scalars: Mapping[str, float] = {}, samples: Sequence[Sample] = ()) -> None:
        """Show numbers by their tags, and answers, in the trackers."""
        for tracker in self._trackers:
            with explained(self._path, late=True):
                if scalars:
                    tracker.scalars(step, scalars)
                if samples:
                    tracker.samples(step, samples)

    def show_final(self) -> None:
        """Show the last metrics beside the settings in the trackers."""
        if self._file is None:
            return
        final: dict[str, float] = {}
        for line in read_metrics(self._path.parent) if self._trackers else ():
            found = line.get("values", {}) if line["kind"] == "answers" else {"loss": line.get("loss")}
            final |= {f"final/{line['kind']}_{name}": value for name, value in found.items() if value is not None}
        for tracker in self._trackers:
            with explained(self._path, late=True):
                tracker.final(final)

    def close(self) -> None:
        if self._file is None:
            return
        with explained(self._path, late=True):
            self._file.close()


def last_losses(output: Path) -> tuple[float | None, float | None]:
    """Return the last training loss and the last validation loss of a run's metrics, each None if there is none."""
    found: dict[str, float] = {}
    if (output / METRICS_FILE).is_file():
        lines = [line for line in read_metrics(output) if isinstance(line.get("loss"), float)]
        found = {str(line.get("kind")): line["loss"] for line in lines}
    return found.get("train"), found.get("validation")


def validation_loss(output: Path, step: int) -> float | None:
    """Return the validation loss at a step of a run's metrics; None if there is none."""
    lines = read_metrics(output) if (output / METRICS_FILE).is_file() else []
    return next((line.get("loss") for line in lines if line["kind"] == "validation" and line["step"] == step), None)


def first_loss(output: Path) -> tuple[int, float] | None:
    """Return the first training loss of a run's metrics, after the last step that it is the mean of; None without."""
    lines = read_metrics(output) if (output / METRICS_FILE).is_file() else []
    trained = (line for line in lines if line["kind"] == "train" and line.get("loss") is not None)
    return next(((line["step"], line["loss"]) for line in trained), None)


def _drop_after(path: Path, step: int) -> None:
    if not path.exists():
        return
    kept = [json.dumps(line) + "\n" for line in read_metrics(path.parent) if step and line["step"] <= step]
    files.write_text(path, "".join(kept), durable=True)


def limits(config: RunConfig, device: torch.device, total_steps: int) -> dict[str, float | None]:
    """Return what a run's metrics are held against: its last step, and the memory of its device and machine in GiB."""
    own, free = resident_memory(), free_memory()
    norm, on_gpu = config.train.max_grad_norm, device.type == "cuda"
    return {
        "total_steps": total_steps,
        "max_grad_norm": norm if math.isfinite(norm) else None,
        "memory_gib_limit": torch.cuda.mem_get_info(device)[1] / 2**30 if on_gpu else None,
        "host_gib_limit": None if own is None or free is None else (own + free) / 2**30,
    }


def peak_memory_gib(device: torch.device) -> float:
    """Return the device's peak memory so far; on a CPU, this process's peak."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kib / (2**20 if sys.platform != "darwin" else 2**30)
