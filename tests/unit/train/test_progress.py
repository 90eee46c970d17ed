"""The log's lines: each about its own step and its own stretch of time, whenever its norm is looked at."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cogtune.evaluate.run_folder import read_metrics
from cogtune.train import progress as module
from cogtune.train.engines.async_scalar import AsyncScalar
from cogtune.train.log import Metrics, last_losses
from cogtune.train.progress import Progress, Reporter


class _At:
    """A norm that arrives at a given second."""

    def __init__(self, second: float, norm: float = 0.0) -> None:
        self.second, self._norm = second, norm

    def value(self) -> float:
        return self._norm

    def seconds_since(self, earlier: _At) -> float:
        return self.second - earlier.second


def train_one(progress: Progress, reporter: Reporter, samples: int) -> None:
    """What the loop counts in a step, up to its launch."""
    progress.step += 1
    progress.samples += samples
    progress.tokens += 10 * samples
    progress.window_loss, progress.window_labels = progress.window_loss + 6.0 * samples, progress.window_labels + 2
    reporter.step(0.1 * progress.step, 0.5 * progress.step, 3.0 * samples, 2)


def test_a_line_looked_at_during_the_next_step_is_about_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two steps a line; the next step's rows are counted before the norm is looked at."""
    monkeypatch.setattr(module, "AsyncScalar", lambda value: _At(100.0))
    metrics, progress = Metrics(tmp_path, active=True, step=0), Progress()
    reporter = Reporter(metrics, progress, 5, 2, torch.device("cpu"))
    train_one(progress, reporter, 4)
    reporter.arrived(_At(103.0, 1.0))  # type: ignore[arg-type]
    train_one(progress, reporter, 4)
    progress.samples += 7  # step 3 is on its way
    progress.tokens += 70
    reporter.arrived(_At(104.0, 2.0))  # type: ignore[arg-type]
    train_one(progress, reporter, 0)
    reporter.arrived(_At(106.0, 3.0))  # type: ignore[arg-type]
    reporter.away(10.0)
    train_one(progress, reporter, 5)
    reporter.arrived(_At(117.0, 4.0))  # type: ignore[arg-type]
    train_one(progress, reporter, 3)
    reporter.arrived(_At(118.0, 5.0))  # type: ignore[arg-type]
    metrics.close()
    names = ("step", "grad_norm", "lr", "epoch", "loss", "labels", "samples_per_second", "tokens_per_second")
    found = [[line[name] for name in names] for line in read_metrics(tmp_path)]
    assert [pytest.approx(values) for values in found] == [
        [2, 2.0, 0.2, 1.0, 12.0, 4, 8 / 4, 80 / 4],
        [4, 4.0, 0.4, 2.0, 7.5, 4, 12 / 3, 120 / 3],  # thirteen seconds, ten of them away
        [5, 5.0, 0.5, 2.5, 9.0, 2, 3 / 1, 30 / 1],
    ]


def test_on_the_host_a_number_has_arrived_when_it_is_made() -> None:
    first = AsyncScalar(torch.tensor(0.1, dtype=torch.float64))
    second = AsyncScalar(torch.tensor(2.5, requires_grad=True))
    assert (first.value(), second.value()) == (0.1, 2.5)
    assert second.seconds_since(first) == -first.seconds_since(second) > 0


def test_metrics_end_at_the_first_line_that_is_none(tmp_path: Path) -> None:
    """Bytes that are no text, a value that is no line of ours, a line cut short: what stands before it counts."""
    good = b'{"kind": "train", "step": 1, "loss": 2.5}\n'
    for broken in (b'{"kind": "tr\x84"}\n', b"[" * 100_000 + b"\n", b"7\n", b'{"loss": 3.0}\n', b'{"kind": "tra'):
        (tmp_path / "metrics.jsonl").write_bytes(good + broken + (good if broken.endswith(b"\n") else b""))
        assert [line["step"] for line in read_metrics(tmp_path)] == [1], broken
        assert last_losses(tmp_path) == (2.5, None)


def test_lines_come_at_the_first_step_and_by_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    """Metrics every 100 steps; a step takes 6 seconds, so a line comes at 1, 4, 7 and at the last step."""
    clock = iter(range(0, 1000, 6))
    monkeypatch.setattr(module, "AsyncScalar", lambda value: _At(100.0))
    monkeypatch.setattr(module.time, "perf_counter", lambda: float(next(clock)))
    monkeypatch.setattr(module.log, "propagate", True)
    metrics, progress = Metrics(tmp_path, active=True, step=0), Progress()
    with caplog.at_level("INFO", logger="cogtune"):
        reporter = Reporter(metrics, progress, 9, 100, torch.device("cpu"))
        for number in range(1, 10):
            train_one(progress, reporter, 2)
            reporter.arrived(_At(100.0 + number, 1.0))  # type: ignore[arg-type]
    metrics.close()
    said = [record.getMessage() for record in caplog.records]
    assert [line.split("/")[0] for line in said] == ["step 1", "step 4", "step 7", "step 9"]
    assert "the first step took 6.0 s" in said[0]
    assert "ETA" not in said[0], "one step, compiling included, tells nothing about the others"
    assert said[1].endswith("ETA 0:00:30"), "five steps of six seconds"
    assert "2.00 samples/s" in said[1]
