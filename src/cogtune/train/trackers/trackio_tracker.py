"""Trackio, through its own package: a folder of this machine, or where ``TRACKIO_SPACE_ID`` says."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence

import trackio

from cogtune.train.trackers.base import Outcome, Sample, TrackedRun


class TrackioTracker:
    """Config, charts, and a table of answers with pictures; the final values are metrics of the last step."""

    def __init__(self, run: TrackedRun) -> None:
        # The package finds a run by its name, so it must be the only one: folders are often called `output`.
        name = run.key or f"{run.name}-{secrets.token_hex(3)}"
        resume = "never" if run.key is None else "allow"
        self._run = trackio.init(run.project, name=name, resume=resume, config=dict(run.settings), embed=False)
        self.key = name
        self.place = f"trackio show --project {run.project}"
        self._step = 0
        if run.key is None:
            self._run.log({"config": trackio.Markdown(f"```yaml\n{run.text}\n```")}, step=0)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)
        self._step = step

    def samples(self, step: int, samples: Sequence[Sample]) -> None:
        rows = [
            [one.question, one.right, one.answer, "" if one.picture is None else trackio.Image(one.picture)]
            for one in samples
        ]
        table = trackio.Table(columns=["question", "right", "answer", "picture"], data=rows)
        self._run.log({"answers/samples": table}, step=step)

    def final(self, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=self._step)

    def close(self, outcome: Outcome) -> None:
        self._run.finish()
