"""SwanLab, through its own package; ``SWANLAB_MODE=offline`` and its other variables work as they always do."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import swanlab

from cogtune.train.trackers.base import Outcome, Sample, TrackedRun

_STATE = {"finished": "success", "failed": "crashed", "stopped": "aborted"}


class SwanLabTracker:
    """Config, charts, and answers as captions of their pictures; final values join the config."""

    def __init__(self, run: TrackedRun) -> None:
        settings = swanlab.Settings(interactive=False, terminal=swanlab.Settings.Terminal(proxy_type="none"))
        self._run = swanlab.init(
            project=run.project,
            name=run.name,
            id=run.key,
            resume="never" if run.key is None else "allow",
            log_dir=None if os.environ.get("SWANLAB_LOG_DIR") else str(run.output / "swanlog"),
            config=dict(run.settings),
            settings=settings,
        )
        self.key = self._run.id
        self.place = self._run.url if self._run.mode == "online" else f"swanlab sync {self._run.dir}"
        if run.key is None:
            self._run.log({"config": swanlab.Text(run.text)}, step=0)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def samples(self, step: int, samples: Sequence[Sample]) -> None:
        shown: dict[str, object] = {
            sample.name: swanlab.Text(sample.caption)
            if sample.picture is None
            else swanlab.Image(sample.picture, caption=sample.caption)
            for sample in samples
        }
        self._run.log(shown, step=step)

    def final(self, values: Mapping[str, float]) -> None:
        self._run.config.update(dict(values))

    def close(self, outcome: Outcome) -> None:
        self._run.finish(state=_STATE[outcome], error="see run.log" if outcome == "failed" else None)
