"""Weights & Biases, through its own package; ``WANDB_MODE=offline`` and its other variables work as they always do."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from html import escape

import wandb

from cogtune.train.trackers.base import Outcome, Sample, TrackedRun

_EXIT = {"finished": 0, "failed": 1, "stopped": 255}  # the service calls 255 a run that its user ended


class WandbTracker:
    """Config, charts over the key ``step``, answers as captions of their pictures, and final values in the summary."""

    def __init__(self, run: TrackedRun) -> None:
        self._run = wandb.init(
            project=run.project,
            name=run.name,
            id=run.key,
            resume=None if run.key is None else "allow",
            dir=None if os.environ.get("WANDB_DIR") else str(run.output),
            config=dict(run.settings),
            reinit="create_new",
            settings=wandb.Settings(console="off", silent=True),  # the run has a log of its own
        )
        # Steps repeat when a killed run goes on, and the package ignores a step below its own: it counts rows instead.
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")
        self.key = self._run.id
        self.place = f"wandb sync {self._run.sync_dir}" if self._run.offline else str(self._run.url)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({**values, "step": step})

    def samples(self, step: int, samples: Sequence[Sample]) -> None:
        shown = {
            one.name: wandb.Html(f"<pre>{escape(one.caption)}</pre>")
            if one.picture is None
            else wandb.Image(one.picture, caption=one.caption)
            for one in samples
        }
        self._run.log({**shown, "step": step})

    def final(self, values: Mapping[str, float]) -> None:
        self._run.summary.update(dict(values))

    def close(self, outcome: Outcome) -> None:
        self._run.finish(exit_code=_EXIT[outcome])
