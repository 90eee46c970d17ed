"""Answers to validation questions during training: those of the model as it stands, and what depends on them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cogtune.errors import ConfigError
from cogtune.evaluate.run_folder import read_metrics
from cogtune.generate.decoding import Decoding
from cogtune.generate.loading import load_generator
from cogtune.processing.clip import read_clip
from cogtune.processing.frames import Sampling
from cogtune.train.answers import AnswerCheck, Answered, answers_file, sample_picture
from cogtune.train.log import Metrics
from cogtune.train.run import train
from tests.support.training import make_config, write_data


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    return write_data(tmp_path / "train", 6), write_data(tmp_path / "held", 5)


def configured(base: Path, folders: tuple[Path, Path], output: Path, **values: Any):
    given = {"data__validation": [str(folders[1])], "train__max_steps": 2, "eval__max_new_tokens": 8, **values}
    return make_config(base, folders[0], output, **given)


def written(output: Path, step: int) -> list[dict[str, Any]]:
    return [json.loads(line) for line in answers_file(output, step).read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("cached", ["off", "on"])
def test_they_are_those_of_the_generator_before_the_first_step_and_after_the_last(
    tiny_checkpoint: Path, folders: tuple[Path, Path], tmp_path: Path, cached: str
) -> None:
    """With histories, several at once and from cached features; the first are the base's."""
    output = tmp_path / "out"
    result = train(configured(tiny_checkpoint, folders, output, data__cache_features=cached, train__lr="1e-1"))
    first, last = written(output, 0), written(output, 2)
    assert len(first) == 9  # five pictures with one to three turns
    assert [row["answer"] for row in first] != [row["answer"] for row in last]
    labels = {path.stem: json.loads(path.read_text())["conversations"] for path in (folders[1] / "labels").iterdir()}
    for rows, adapter in ((first, None), (last, result.adapter)):
        generator = load_generator(tiny_checkpoint, adapter=adapter, keys={"device": "cpu", "model.dtype": "float32"})
        asks = []
        for row in rows:
            turns = labels[Path(row["images"][0]).stem][: 2 * row["turn"]]
            history = [(turns[at]["content"], turns[at + 1]["content"]) for at in range(0, len(turns), 2)]
            asks.append((row["images"][0], row["question"], history))
        assert generator.answer_batch(asks, Decoding(max_new_tokens=8)) == [row["answer"] for row in rows]
        generator.close()
    lines = [line for line in read_metrics(output) if line["kind"] == "answers"]
    assert [(line["step"], line["records"]) for line in lines] == [(0, 9), (2, 9)]
    assert {"exact", "token_f1"} <= set(lines[0]["values"])


def test_so_many_questions_are_asked_at_even_distances(
    tiny_checkpoint: Path, folders: tuple[Path, Path], tmp_path: Path
) -> None:
    train(configured(tiny_checkpoint, folders, tmp_path / "out", eval__generate=3, train__max_steps=1))
    assert [(Path(row["images"][0]).stem, row["turn"]) for row in written(tmp_path / "out", 0)] == [
        ("000", 0), ("002", 0), ("003", 0)]  # fmt: skip
    train(configured(tiny_checkpoint, folders, tmp_path / "none", eval__generate=0, train__max_steps=1))
    assert not (tmp_path / "none" / "answers").exists()


def test_a_metric_chooses_the_best_checkpoint_and_stops(
    tiny_checkpoint: Path, folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Less is better for an error rate; the loss falls at every validation meanwhile."""
    values = iter([0.9, 0.5, 0.3, 0.4, 0.3, 0.1])
    monkeypatch.setattr(
        AnswerCheck, "run", lambda self, engine, stop: Answered({"wer": next(values)}, [""] * 9, 0.0)
    )  # fmt: skip
    result = train(
        configured(tiny_checkpoint, folders, tmp_path / "out", train__max_steps=9, eval__steps=1, train__save_steps=100,
                   eval__metrics="wer", eval__metric="wer", eval__patience=2)
    )  # fmt: skip
    assert (result.steps, result.best_step) == (4, 2)
    best = [line["best"] for line in read_metrics(tmp_path / "out") if line["kind"] == "validation"]
    assert best == [True, True, False, False]


@pytest.mark.parametrize(
    ("values", "message"),
    [({"eval__metrics": "iou"}, r"iou fits none of the 9 records"),
     ({"eval__metric": "accuracy"}, "no metric is called `accuracy`"),
     ({"eval__metric": "exact", "eval__generate": 0}, r"eval.metric exact needs answers to validation questions"),
     ({"eval__metric": "exact", "data__validation": []}, r"eval.metric exact needs answers")],
)  # fmt: skip
def test_metrics_that_cannot_be_are_refused_before_weights_are_read(
    tiny_checkpoint: Path, folders: tuple[Path, Path], tmp_path: Path, values: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        train(configured(tiny_checkpoint, folders, tmp_path / "out", **values))
    assert not (tmp_path / "out").exists()


def test_tensorboard_shows_values_and_samples(
    tiny_checkpoint: Path, folders: tuple[Path, Path], tmp_path: Path
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(configured(tiny_checkpoint, folders, tmp_path / "out", log__tensorboard=True))
    events = EventAccumulator(str(tmp_path / "out"), size_guidance={"tensors": 0})
    events.Reload()
    tags = events.Tags()
    assert {"answers/exact", "answers/token_f1"} <= set(tags["scalars"])
    assert "answers/sample 0" in tags["images"]
    (text, _) = events.Tensors("answers/sample 0/text_summary")
    assert {"adapter/layer 00", "adapter/layer 01"} <= set(tags["scalars"])
    assert {"final/train_loss", "final/answers_exact"} <= set(tags["scalars"])
    assert b"lr: 0.001" in events.Tensors("config/text_summary")[0].tensor_proto.string_val[0]
    assert b"What colour is picture 0?" in text.tensor_proto.string_val[0]


def test_a_clip_is_shown_as_frames_side_by_side(tmp_path: Path) -> None:
    from tests.support.clips import shade, write_clip  # skips where there is no PyAV

    clip = read_clip(write_clip(tmp_path / "clip.mp4", 24), Sampling("uniform", 8))
    strip = sample_picture(clip.frames)
    assert strip is not None
    assert strip.shape == (256, 4 * 256, 3)
    shades = [float(strip[:, place * 256 : (place + 1) * 256].mean()) for place in range(4)]
    assert shades == pytest.approx([shade(clip.frames[index].index) for index in (0, 2, 4, 6)], abs=4)  # the codec's


def test_a_run_that_starts_over_has_the_first_answers_once(tmp_path: Path) -> None:
    for _ in range(2):
        metrics = Metrics(tmp_path, active=True, step=0)
        metrics.write("answers", 0, values={"exact": 0.5})
        metrics.close()
    assert len(read_metrics(tmp_path)) == 1
