"""TensorBoard's event files, in the run's folder itself."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from textwrap import indent
from typing import Any

from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from cogtune.system.file_errors import explained
from cogtune.train.trackers.base import Outcome, Sample, TrackedRun, markdown


class TensorBoardTracker:
    """Writes events; those after ``step``, of a run that was killed, are marked as void."""

    def __init__(self, run: TrackedRun, step: int) -> None:
        self.key, self.place = str(run.output), f"tensorboard --logdir {run.output}"
        self._run = run
        self._writer = SummaryWriter(str(run.output), purge_step=step + 1 if step else None)
        self._writer.add_text("config", indent(run.text, "    "), step)
        self._flush()

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for tag, value in values.items():
            self._writer.add_scalar(tag, value, step)
        self._flush()

    def samples(self, step: int, samples: Sequence[Sample]) -> None:
        for name, text in markdown(samples).items():
            self._writer.add_text(name, text, step)
        for sample in samples if step == 0 else ():  # the pictures stay the same
            if sample.picture is not None:
                self._writer.add_image(sample.name, sample.picture, step, dataformats="HWC")
        self._flush()

    def final(self, values: Mapping[str, float]) -> None:
        events: Any = self._writer.file_writer
        for summary in hparams(dict(self._run.settings), dict(values)):  # `add_hparams` would begin another file
            events.add_summary(summary)
        self.scalars(0, values)

    def close(self, outcome: Outcome) -> None:
        with explained(self._run.output, late=True):
            self._writer.close()

    def _flush(self) -> None:
        os.stat(self._run.output)  # raise here if the folder is gone; the writer's thread would print a traceback
        self._writer.flush()
