"""MLflow, through its own client; ``MLFLOW_TRACKING_URI`` says where, as always."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from mlflow.entities import Metric, Param
from mlflow.tracking import MlflowClient

from cogtune.train.trackers.base import Outcome, Sample, TrackedRun, markdown

_STATUS = {"finished": "FINISHED", "failed": "FAILED", "stopped": "KILLED"}
_LONGEST = 6000  # characters of a parameter's value
_AT_ONCE = 100  # parameters of a call


class MLflowTracker:
    """Parameters, metrics, the configuration and a page of answers for each step as artifacts, pictures once."""

    def __init__(self, run: TrackedRun) -> None:
        self._client = client = MlflowClient()
        if run.key is None:
            found = client.get_experiment_by_name(run.project)
            experiment = client.create_experiment(run.project) if found is None else found.experiment_id
            self.key = str(client.create_run(experiment, run_name=run.name).info.run_id)
        else:
            self.key = run.key
            client.update_run(self.key, status="RUNNING")
        self.place = f"{client.tracking_uri}, run {self.key}"
        there = client.get_run(self.key).data.params  # a parameter cannot change; a continued run's other keys are tags
        settings = {key: str(value)[:_LONGEST] for key, value in run.settings.items()}
        new = [Param(key, value) for key, value in settings.items() if key not in there]
        for start in range(0, len(new), _AT_ONCE):
            client.log_batch(self.key, params=new[start : start + _AT_ONCE])
        for key, value in settings.items():
            if there.get(key, value) != value:
                client.set_tag(self.key, key, value)
        client.log_text(self.key, run.text, "config.yaml")
        self._pictures: set[str] = set()

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        now = int(time.time() * 1000)
        self._client.log_batch(self.key, metrics=[Metric(tag, value, now, step) for tag, value in values.items()])

    def samples(self, step: int, samples: Sequence[Sample]) -> None:
        text = "\n\n".join(f"# {name}\n\n{text}" for name, text in markdown(samples).items())
        self._client.log_text(self.key, text, f"answers/step-{step:06}.md")
        for sample in samples:  # the pictures stay the same
            if sample.picture is not None and sample.name not in self._pictures:
                self._client.log_image(self.key, sample.picture, artifact_file=f"{sample.name}.png")
                self._pictures.add(sample.name)

    def final(self, values: Mapping[str, float]) -> None:
        self.scalars(0, values)

    def close(self, outcome: Outcome) -> None:
        self._client.set_terminated(self.key, _STATUS[outcome])
