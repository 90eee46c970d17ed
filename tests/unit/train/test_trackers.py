"""Trackers: what each package gets of a run, that a run goes on without one that fails, and that this is said."""

from __future__ import annotations

import json
import sqlite3
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from cogtune.errors import RunError, SetupError
from cogtune.train import model_setup
from cogtune.train.loop import Loop
from cogtune.train.run import train
from cogtune.train.trackers import delivery, opening
from cogtune.train.trackers.base import Outcome, Sample, TrackedRun
from cogtune.train.trackers.delivery import Delivery
from tests.support.training import make_config, write_data

NAMES = ("wandb", "mlflow", "swanlab", "trackio")
INSTALLED = [name for name in NAMES if find_spec(name) is not None]


def configured(base: Path, folder: Path, trackers: Sequence[str], **values: Any):
    if not (folder / "train").is_dir():
        write_data(folder / "train", 4)
        write_data(folder / "held", 2)
    given = {"data__validation": [str(folder / "held")], "train__max_steps": 2, "eval__max_new_tokens": 4}
    return make_config(base, folder / "train", folder / "out", log__trackers=list(trackers), **(given | values))


class Recorder:
    """A tracker that keeps what it gets, and fails when asked to."""

    def __init__(self, run: TrackedRun, fails: Callable[[int], bool] = lambda call: False) -> None:
        self.run, self.key, self.place, self._fails = run, run.key or "key", "here", fails
        self.calls, self.thread = 0, threading.current_thread()
        self.scalar_values: dict[str, list[tuple[int, float]]] = {}
        self.sample_values: dict[int, list[Sample]] = {}
        self.final_values: dict[str, float] = {}
        self.outcome: Outcome | None = None

    def _called(self) -> None:
        assert threading.current_thread() is self.thread
        self.calls += 1
        if self._fails(self.calls):
            raise ConnectionError(f"no answer to call\n{self.calls}")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._called()
        for tag, value in values.items():
            self.scalar_values.setdefault(tag, []).append((step, value))

    def samples(self, step: int, samples: Sequence[Sample]) -> None:
        self._called()
        self.sample_values[step] = list(samples)

    def final(self, values: Mapping[str, float]) -> None:
        self._called()
        self.final_values = dict(values)

    def close(self, outcome: Outcome) -> None:
        self.outcome = outcome


@pytest.fixture
def recorders(monkeypatch: pytest.MonkeyPatch) -> list[Recorder]:
    """The trackers that runs open, which record; all packages count as installed."""
    found: list[Recorder] = []

    def opened(package: Any, run: TrackedRun) -> Recorder:
        found.append(Recorder(run))
        return found[-1]

    monkeypatch.setattr(opening, "_open", opened)
    monkeypatch.setattr(opening, "find_spec", lambda name: True)
    return found


def test_one_gets_everything_and_the_same_run_again_when_it_continues(
    tiny_checkpoint: Path, tmp_path: Path, recorders: list[Recorder]
) -> None:
    train(configured(tiny_checkpoint, tmp_path, ["wandb"], log__project="cats", train__max_steps=2))
    (first,) = recorders
    assert (first.run.project, first.run.name, first.run.key) == ("cats", "out", None)
    assert first.run.settings["train.lr"] == 1e-3
    assert "lr: 0.001" in first.run.text
    assert [step for step, _ in first.scalar_values["train/loss"]] == [1, 2]
    assert [step for step, _ in first.scalar_values["validation/loss"]] == [2]
    assert [step for step, _ in first.scalar_values["adapter/layer 00"]] == [2]
    assert [step for step, _ in first.scalar_values["answers/exact"]] == [0, 2]
    assert first.sample_values.keys() == {0, 2}
    sample = first.sample_values[2][0]
    assert sample.picture is not None
    assert sample.picture.shape == (256, 256, 3)
    written = [json.loads(line) for line in (tmp_path / "out/answers/step-000002.jsonl").read_text().splitlines()]
    assert (sample.question, sample.answer) == (written[0]["question"], written[0]["answer"])
    assert first.final_values["final/train_loss"] == first.scalar_values["train/loss"][-1][1]
    assert first.outcome == "finished"
    train(configured(tiny_checkpoint, tmp_path, ["wandb"], train__max_steps=3))
    assert recorders[1].run.key == "key"
    assert [step for step, _ in recorders[1].scalar_values["train/loss"]] == [3]


def test_a_missing_package_is_named_before_anything_is_read(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(opening, "find_spec", lambda name: None if name == "mlflow" else True)
    with pytest.raises(SetupError, match="mlflow is not installed") as found:
        train(configured(tiny_checkpoint, tmp_path, ["wandb", "mlflow"], model__path=str(tmp_path / "none")))
    assert found.value.hint == "pip install 'cogtune[track]'"
    assert not (tmp_path / "out").exists()


def test_one_that_cannot_be_opened_stops_a_new_run_before_its_model_is_loaded_and_not_one_that_continues(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refused(package: Any, run: TrackedRun) -> Recorder:
        raise ConnectionError("no API key configured")

    monkeypatch.setattr(opening, "_open", refused)
    monkeypatch.setattr(opening, "find_spec", lambda name: True)
    with monkeypatch.context() as inside:
        inside.setattr(model_setup, "load_base", lambda *a, **k: pytest.fail("the model was loaded"))
        with pytest.raises(SetupError, match=r"wandb cannot be opened: no API key") as found:
            train(configured(tiny_checkpoint, tmp_path, ["wandb"]))
    assert "wandb login" in str(found.value.hint)
    train(configured(tiny_checkpoint, tmp_path, []))
    assert train(configured(tiny_checkpoint, tmp_path, ["wandb"], train__max_steps=3)).steps == 3
    assert "wandb cannot be opened: no API key configured" in (tmp_path / "out" / "run.log").read_text()


def test_one_that_fails_does_not_end_the_run_and_is_given_up_loudly(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(opening, "find_spec", lambda name: True)
    found: list[Recorder] = []

    def opened(package: Any, run: TrackedRun) -> Recorder:
        found.append(Recorder(run, lambda call: call > 2))
        return found[-1]

    monkeypatch.setattr(opening, "_open", opened)
    assert train(configured(tiny_checkpoint, tmp_path, ["wandb"], train__max_steps=6)).steps == 6
    log = (tmp_path / "out" / "run.log").read_text()
    assert "WARNING wandb: a report could not be delivered; training goes on: no answer to call 3" in log
    assert "wandb: 3 reports in a row failed; it gets no more of this run: no answer to call 5" in log
    assert "reports were lost; metrics.jsonl has all numbers" in log
    assert (found[0].calls, found[0].outcome) == (5, "finished")  # called three times in vain, then only closed


@pytest.mark.parametrize(("raised", "outcome"), [(RunError("broken"), "failed"), (KeyboardInterrupt(), "stopped")])
def test_one_is_told_how_the_run_ended(
    tiny_checkpoint: Path,
    tmp_path: Path,
    recorders: list[Recorder],
    monkeypatch: pytest.MonkeyPatch,
    raised: BaseException,
    outcome: Outcome,
) -> None:
    def ends(self: Loop) -> None:
        raise raised

    monkeypatch.setattr(Loop, "run", ends)
    with pytest.raises(type(raised)):
        train(configured(tiny_checkpoint, tmp_path, ["mlflow"]))
    assert recorders[0].outcome == outcome


def test_a_slow_one_neither_holds_the_run_nor_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delivery, "_WAITING", 2)
    monkeypatch.setattr(delivery, "_CLOSING", 0.05)
    free, said = threading.Event(), []

    class Slow(Recorder):
        def scalars(self, step: int, values: Mapping[str, float]) -> None:
            free.wait()

    run = TrackedRun(tmp_path, "cogtune", "out", {}, "")
    tracker = Delivery("mlflow", lambda: Slow(run), said.append)
    for step in range(10):
        tracker.scalars(step, {"train/loss": 1.0})
    tracker.close("finished")
    free.set()
    assert "takes reports more slowly than they come" in said[0]
    assert "not done after" in said[1]
    assert "reports were lost" in said[2]


@pytest.fixture(scope="module")
def tracked(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps and its continuation to three, in every package that is installed, without a network."""
    if not INSTALLED:
        pytest.skip("no tracker's package is installed")
    folder = tmp_path_factory.mktemp("tracked")
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("HOME", str(folder))  # where packages keep their settings
        for name in ("WANDB_MODE", "SWANLAB_MODE"):
            environment.setenv(name, "offline")
        environment.setenv("WANDB_SILENT", "true")
        environment.setenv("MLFLOW_TRACKING_URI", f"file:{folder / 'mlruns'}")
        environment.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
        environment.setenv("TRACKIO_DIR", str(folder / "trackio"))
        for steps in (2, 3):
            train(configured(tiny_checkpoint, folder, INSTALLED, train__max_steps=steps))
    log = (folder / "out" / "run.log").read_text()
    assert "WARNING" not in log
    return folder


def key_of(folder: Path, name: str) -> str:
    if name not in INSTALLED:
        pytest.skip(f"{name} is not installed")
    return str(json.loads((folder / "out" / opening.TRACKERS_FILE).read_text())[name])


def last_line(folder: Path, kind: str) -> dict[str, Any]:
    lines = map(json.loads, (folder / "out" / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["kind"] == kind][-1]


def test_mlflow_has_the_run(tracked: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key = key_of(tracked, "mlflow")
    from mlflow.tracking import MlflowClient

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    client = MlflowClient(f"file:{tracked / 'mlruns'}")
    found = client.get_run(key)
    assert (found.info.run_name, found.info.status) == ("out", "FINISHED")
    assert found.data.params["train.lr"] == "0.001"
    assert (found.data.params["train.max_steps"], found.data.tags["train.max_steps"]) == ("2", "3")
    history = client.get_metric_history(key, "train/loss")
    assert [point.step for point in history] == [1, 2, 3]
    assert history[-1].value == last_line(tracked, "train")["loss"]
    assert found.data.metrics["final/validation_loss"] == last_line(tracked, "validation")["loss"]
    pages = [one.path for one in client.list_artifacts(key, "answers")]
    assert {"answers/sample 0.png", "answers/step-000000.md", "answers/step-000003.md"} <= set(pages)
    assert "config.yaml" in [one.path for one in client.list_artifacts(key)]


def test_trackio_has_the_run(tracked: Path) -> None:
    key = key_of(tracked, "trackio")
    with closing(sqlite3.connect(tracked / "trackio" / "cogtune.db")) as database:
        rows = database.execute("select step, metrics from metrics where run_name = ?", (key,)).fetchall()
        (settings,) = database.execute("select config from configs where run_name = ?", (key,)).fetchone()
    points = [(step, line["train/loss"]) for step, text in rows if "train/loss" in (line := json.loads(text))]
    assert [step for step, _ in points] == [1, 2, 3]
    assert points[-1][1] == last_line(tracked, "train")["loss"]
    assert json.loads(settings)["train.lr"] == 1e-3
    assert any(b"answers/samples" in text for _, text in rows)
    assert list((tracked / "trackio").rglob("*.png"))


def test_wandb_and_swanlab_have_the_run(tracked: Path) -> None:
    """Their files are records of protobuf, in which names and texts stand as they are."""
    for name, pattern in (
        ("wandb", "wandb/offline-run-*/run-{key}.wandb"),
        ("swanlab", "swanlog/run-*/run-{key}.swanlab"),
    ):
        key = key_of(tracked, name)
        files = sorted((tracked / "out").glob(pattern.format(key=key)))
        assert len(files) == 2, name  # one for each start, of one run
        settings = [path for file in files for path in file.parent.glob("files/config.yaml")]  # SwanLab's are not in it
        content = b"".join(path.read_bytes() for path in [*files, *settings])
        for text in (b"train/loss", b"answers/exact", b"adapter/layer 00", b"train.lr", b"final/validation_loss"):
            assert text in content, (name, text)
        assert list(files[0].parent.rglob("*.png")), name
