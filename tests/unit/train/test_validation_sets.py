"""Validation sets with names: each measured by itself, and any of them may choose the best checkpoint."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cogtune.cli.main import main
from cogtune.configuration.load import load_config
from cogtune.errors import ConfigError
from cogtune.evaluate.report.load import report_of
from cogtune.evaluate.report.page import render
from cogtune.evaluate.run_folder import read_metrics
from cogtune.train.answers import AnswerCheck, Answered, answers_file
from cogtune.train.progress import Progress
from cogtune.train.run import train
from cogtune.train.run_inputs import read_inputs
from tests.support.training import make_config, write_data


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    return {name: write_data(tmp_path / name, count) for name, count in (("train", 6), ("near", 5), ("far", 3))}


def configured(base: Path, folders: dict[str, Path], output: Path, **values: Any):
    named = {"near": str(folders["near"]), "far": [str(folders["far"])]}
    given = {"data__validation": [named], "train__max_steps": 2, "eval__max_new_tokens": 4, **values}
    return make_config(base, folders["train"], output, **given)


def lines(output: Path, kind: str) -> list[dict[str, Any]]:
    return [line for line in read_metrics(output) if line["kind"] == kind]


def test_each_is_measured_by_itself_and_all_together_as_one(
    tiny_checkpoint: Path, folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The oracle of the whole is a run whose two folders are one set."""
    train(configured(tiny_checkpoint, folders, tmp_path / "one", eval__metric="far/exact", log__tensorboard=True))
    both = [str(folders["near"]), str(folders["far"])]
    train(configured(tiny_checkpoint, folders, tmp_path / "other", data__validation=both, eval__generate=0))
    (named,), (whole,) = lines(tmp_path / "one", "validation"), lines(tmp_path / "other", "validation")
    assert (named["loss"], named["labels"]) == (pytest.approx(whole["loss"], rel=1e-6), whole["labels"])
    sets = named["sets"]
    assert list(sets) == ["near", "far"]
    assert sum(one["loss"] * one["labels"] for one in sets.values()) == pytest.approx(named["loss"] * named["labels"])
    assert sets["near"]["loss"] != sets["far"]["loss"]
    answers = lines(tmp_path / "one", "answers")[-1]
    assert {"near/exact", "far/exact"} <= set(answers["values"])
    assert not any("/" not in name for name in answers["values"])
    rows = [json.loads(line) for line in answers_file(tmp_path / "one", 2).read_text().splitlines()]
    assert [row["set"] for row in rows] == ["near"] * 9 + ["far"] * 6
    said = capsys.readouterr().out
    assert "validation near: 9 answers in 5 rows" in said
    assert f"near/loss {sets['near']['loss']:.4f}  far/loss {sets['far']['loss']:.4f}" in said
    report = report_of(tmp_path / "one")
    assert report.result is not None
    assert {way: list(parts) for way, parts in report.result["metrics"][0]["groups"].items()}["set"] == ["near", "far"]
    page = render(report)
    assert "near/exact" in page
    assert "far</span>" in page

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "one"))
    events.Reload()
    assert {"validation/near/loss", "validation/far/loss", "answers/far/exact"} <= set(events.Tags()["scalars"])


def test_the_loss_of_one_of_them_chooses(
    tiny_checkpoint: Path, folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = {"train__max_steps": 4, "eval__steps": 1, "eval__generate": 0, "eval__metric": "far/loss"}
    result = train(configured(tiny_checkpoint, folders, tmp_path / "out", train__lr="0.5", **more))
    found = {line["step"]: line["sets"]["far"]["loss"] for line in lines(tmp_path / "out", "validation")}
    best = min(found, key=lambda step: found[step])
    assert (result.best_step, result.best_metric, result.best_value) == (best, "far/loss", found[best])
    record = json.loads((tmp_path / "out" / "run.json").read_text())["result"]
    assert {name: record[name] for name in ("best_step", "best_metric", "best_value")} == {
        "best_step": best, "best_metric": "far/loss", "best_value": found[best]}  # fmt: skip
    assert f"best far/loss {found[best]:.4f} at step {best}" in capsys.readouterr().out
    again = train(configured(tiny_checkpoint, folders, tmp_path / "out", train__lr="0.5", **more))
    assert replace(again) == result, "a run that has ended says the same"
    main(["runs", str(tmp_path)])
    assert f"far/loss {found[best]:.4f}" in capsys.readouterr().out


def test_another_metric_does_not_compare_with_values_of_the_one_before(
    tiny_checkpoint: Path, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that goes on with another eval.metric: 0.1 of `exact` is better than a loss of 6, and the reverse."""
    values = {"near/exact": 0.1, "far/exact": 0.1}
    monkeypatch.setattr(AnswerCheck, "run", lambda self, engine, stop: Answered(values, [""] * 15, 0.0))
    for metric, steps in (("near/exact", 1), ("loss", 2)):
        result = train(
            configured(tiny_checkpoint, folders, tmp_path / "out", train__max_steps=steps, eval__metric=metric,
                       eval__metrics="exact", train__schedule="constant")
        )  # fmt: skip
    assert (result.best_step, result.best_metric) == (2, "loss")


def test_a_checkpoint_of_the_time_of_losses_alone_is_continued(tmp_path: Path) -> None:
    found = Progress.of({"progress": {"step": 4, "best_loss": 0.5, "best_step": 3}}, tmp_path)
    assert (found.best_step, found.best_metric, found.best_value) == (3, "loss", 0.5)


@pytest.mark.parametrize(
    ("values", "message"),
    [({"eval__metric": "middle/exact"}, r"middle/exact is of no validation set\n.*near/exact, far/exact"),
     ({"eval__metric": "exact"}, r"there are several validation sets\n.*near/exact, far/exact"),
     ({"eval__metric": "far/exact", "eval__generate": 0}, "needs answers to validation questions"),
     ({"eval__metric": "far/iou"}, r"iou fits none of the 6 records")],
)  # fmt: skip
def test_a_metric_of_no_set_is_refused_before_weights_are_read(
    tiny_checkpoint: Path, folders: dict[str, Path], tmp_path: Path, values: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        train(configured(tiny_checkpoint, folders, tmp_path / "out", **values))
    import re

    assert re.search(message, str(caught.value)), str(caught.value)
    assert not (tmp_path / "out").exists()


def test_names_are_written_in_several_ways() -> None:
    common = {"model.path": "base", "data.path": "data", "train.output": "out"}
    given: list[Any] = [
        "{near: a, far: [b, c]}",
        [{"near": "a"}, {"far": ["b", "c"]}],
        [{"path": "a", "name": "near"}, {"path": "b", "name": "far"}, {"path": "c", "name": "far"}],
    ]
    for value in given:
        found = load_config(None, {**common, "data.validation": value}).data.validation_sets
        assert {name: list(map(str, paths)) for name, paths in found.items()} == {"near": ["a"], "far": ["b", "c"]}
    assert list(load_config(None, {**common, "data.validation": ["a", "b"]}).data.validation_sets) == [""]
    refused: list[tuple[list[Any], str]] = [
        (["a", {"far": "b"}], "some validation sets have a name"), ([{"a/b": "c"}], "`a/b` is no name"),
        ([{"near": ["a", "a"]}], "listed twice"), ([{"near": 3}], "data.validation"),
    ]  # fmt: skip
    for wrong, message in refused:
        with pytest.raises(ConfigError, match=message):
            load_config(None, {**common, "data.validation": wrong})


def test_the_check_counts_each(
    tiny_checkpoint: Path, folders: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    named = "{near: %s, far: %s}" % (folders["near"], folders["far"])  # noqa: UP031
    assert (
        main(["data", "check", str(folders["train"]), "--model", str(tiny_checkpoint), "--data.validation", named]) == 0
    )
    said = capsys.readouterr().out
    assert "validation set near: 5 pictures and texts" in said
    assert "validation set far: 3 pictures and texts" in said


def test_rows_with_other_pictures_are_the_same_but_for_these(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = write_data(tmp_path / "held", 4, text_only=2)
    config = make_config(tiny_checkpoint, [folder, tmp_path / "held.jsonl"], tmp_path / "out")
    rows = read_inputs(config).rows
    own, other = rows.exchanged(64)
    assert len(own) == len(other) == 4, "texts have no picture to exchange"
    for at in range(4):
        one, two = own[at], other[at]
        assert one.row == two.row
        assert not torch.equal(one.pixel_values[0], two.pixel_values[0])
    shown = [own[at].pixel_values[0] for at in range(4)]
    assert all(torch.equal(other[at].pixel_values[0], shown[(at + 1) % 4]) for at in range(4))
    assert [len(side) for side in rows.exchanged(3)] == [3, 3]
    alone, _ = read_inputs(
        make_config(tiny_checkpoint, write_data(tmp_path / "one", 1), tmp_path / "o")
    ).rows.exchanged(9)
    assert len(alone) == 0, "a single picture has no partner"


@pytest.mark.parametrize("cached", ["off", "on"])
def test_once_late_in_a_run_rows_are_measured_with_other_pictures(
    tiny_checkpoint: Path, folders: dict[str, Path], tmp_path: Path, cached: str
) -> None:
    """The oracle: the whole loss of the sets' rows, all of which have pictures; and an untrained model that does not
    look, because what it trains cannot reach the pictures, has the same with others'."""
    more = {"train__max_steps": 8, "eval__steps": 1, "eval__generate": 0, "data__cache_features": cached}
    train(configured(tiny_checkpoint, folders, tmp_path / "out", train__lr=1e-30, **more))
    found = {line["step"]: line for line in lines(tmp_path / "out", "validation")}
    assert [step for step, line in found.items() if "exchanged" in line] == [6]
    line = found[6]
    assert line["exchanged"] == 8
    assert line["own_pictures"] == pytest.approx(line["loss"], rel=1e-6)
    assert line["other_pictures"] != line["own_pictures"]
    (warned,) = [one for one in lines(tmp_path / "out", "warning") if one["code"] == "watch-picture-ignored"]
    assert (warned["step"], warned["values"]["rows"]) == (6, 8)
