"""`cogtune eval` as it is typed: models answer each question once, and an interrupted evaluation continues."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from cogtune.cli.main import main
from cogtune.generate.choices import ClosedQuestion
from cogtune.generate.loading import load_generator
from cogtune.train.run import train
from tests.support.adapters import write_adapter
from tests.support.data_folders import dialogue, write_folder, write_label
from tests.support.training import make_config


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_folder(
        tmp_path / "data",
        {"a": [dialogue("a0?", "A0", "a1?", "A1"), dialogue("b0?", "B0")], "c": dialogue("c0?", "C0", "c1?", "C1"),
         "d": dialogue("d0?", "D0")},
    )  # fmt: skip


@pytest.fixture
def adapter(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    return write_adapter(tiny_checkpoint, tmp_path / "adapter", size=0.3)


def evaluate(base: Path, adapter: Path, data: Path, output: Path, *more: object) -> int:
    chosen = ["--model", base, "--adapter", adapter, "--data", data, "--output", output, "--max-new-tokens", 6]
    return main(["eval", *map(str, [*chosen, "--device", "cpu", "--against", "base", *more])])


def answers(output: Path) -> dict[str, list[dict[str, Any]]]:
    files = sorted((output / "answers").glob("*.jsonl"))
    return {file.name: [json.loads(line) for line in file.read_text("utf-8").splitlines()] for file in files}


def test_models_and_controls_answer_each_question_once_and_continue(
    tiny_checkpoint: Path, adapter: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    assert evaluate(tiny_checkpoint, adapter, data, output, "--control", "swap", "--control", "blank", "--json") == 0
    printed = capsys.readouterr()
    assert re.findall(r"6/6 questions, ([0-9.]+)/s", printed.err).count("0.00") == 0, "a rate of answers that just came"
    found = json.loads(printed.out)
    assert [(one["name"], one["control"]) for one in found["models"]] == [
        ("tuned", None), ("base", None), ("tuned", "swap"), ("tuned", "blank")]  # fmt: skip
    assert found["data"]["questions"] == 6
    assert found["metrics"][0]["name"] == "exact"
    whole = answers(output)
    assert len(whole) == 4
    for rows in whole.values():
        assert [row["question"] for row in rows] == ["a0?", "a1?", "b0?", "c0?", "c1?", "d0?"]
    (blank,) = (rows for name, rows in whole.items() if name.endswith("-blank.jsonl"))
    assert {Path(row["image"]).name for row in blank} == {"blank.png"}
    (swap,) = (rows for name, rows in whole.items() if name.endswith("-swap.jsonl"))
    assert [Path(row["image"]).stem for row in swap] == ["c", "c", "c", "d", "d", "a"]

    result = (output / "eval.json").read_bytes()
    (base,) = (output / "answers").glob("model-*.jsonl")
    content = base.read_bytes()
    base.write_bytes(content[: len(content) // 2])
    assert evaluate(tiny_checkpoint, adapter, data, output, "--control", "swap", "--control", "blank") == 0
    assert "base: 6 questions, " in (said := capsys.readouterr().out)
    assert "answered earlier" in said
    assert base.read_bytes() == content
    assert (output / "eval.json").read_bytes() == result


def test_predict_gives_the_same_answers(
    tiny_checkpoint: Path, adapter: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate(tiny_checkpoint, adapter, data, tmp_path / "out") == 0
    words = [
        "predict",
        "--model",
        tiny_checkpoint,
        "--adapter",
        adapter,
        "--data",
        data,
        "--output",
        tmp_path / "p.jsonl",
    ]
    assert main([*map(str, words), "--max-new-tokens", "6", "--device", "cpu"]) == 0
    (own,) = (tmp_path / "out" / "answers").glob("adapter-*.jsonl")
    assert own.read_bytes() == (tmp_path / "p.jsonl").read_bytes()
    capsys.readouterr()
    assert main(["eval", "--predictions", str(tmp_path / "p.jsonl"), "--output", str(tmp_path / "q"), "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    first = json.loads((tmp_path / "out" / "eval.json").read_text("utf-8"))
    assert again["metrics"][0]["values"][0] == first["metrics"][0]["values"][0]


def test_other_settings_or_data_are_refused_by_name(
    tiny_checkpoint: Path, adapter: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    assert evaluate(tiny_checkpoint, adapter, data, output) == 0
    before = answers(output)
    assert evaluate(tiny_checkpoint, adapter, data, output, "--own-history") == 2
    assert "own-history: false there, true now" in capsys.readouterr().err
    assert evaluate(tiny_checkpoint, adapter, data, output, "--model.template", "vqa") == 2
    assert "model.template: null there, vqa now" in capsys.readouterr().err
    write_label(data / "labels" / "c.json", dialogue("c0?", "C0"))
    assert evaluate(tiny_checkpoint, adapter, data, output) == 2
    assert "data: " in capsys.readouterr().err
    assert answers(output) == before
    assert evaluate(tiny_checkpoint, adapter, data, output, "--temperature", "0.5") == 2
    assert "--temperature has no effect in `cogtune eval`" in capsys.readouterr().err


def test_an_adapter_for_another_base_is_refused(
    adapter: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from cogtune.checkpoint.random import make_tiny

    other = make_tiny(tmp_path / "other", seed=1, hidden_size=32)
    assert evaluate(other, adapter, data, tmp_path / "out") == 2
    assert "error[" in capsys.readouterr().err


def test_an_adapter_on_another_base_of_the_same_shapes_is_warned_of(
    tiny_checkpoint: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It fits, and answers badly. A copy of the right base elsewhere is the right base."""
    from cogtune.checkpoint.random import make_tiny

    adapter = train(make_config(tiny_checkpoint, data, tmp_path / "run", train__max_steps=1)).adapter
    assert adapter is not None
    other, copy = make_tiny(tmp_path / "other", seed=1), shutil.copytree(tiny_checkpoint, tmp_path / "copy")
    for base, warned in ((other, 1), (copy, 0), (tiny_checkpoint, 0)):
        assert evaluate(base, adapter, data, tmp_path / f"out-{base.name}") == 0
        assert capsys.readouterr().out.count(f"was trained on {tiny_checkpoint}; {base} has other weights") == warned


def test_closed_questions_are_answered_by_the_likeliest_choice(
    tiny_checkpoint: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The choice that `Generator.score` calls best, for those questions that the choices answer."""
    records = {
        "a": [dialogue("a0?", "yes"), dialogue("a1?", "no")],
        "b": dialogue("b0?", "No."),
        "c": dialogue("c?", "7"),
    }
    data, output = write_folder(tmp_path / "data", records), tmp_path / "out"
    assert evaluate(tiny_checkpoint, adapter, data, output, "--choices", "yes,no", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["data"]["questions"] == 3
    generator = load_generator(tiny_checkpoint, adapter=adapter, keys={"device": "cpu"})
    (rows,) = (rows for name, rows in answers(output).items() if name.startswith("adapter-"))
    for row in rows:
        (scores,) = generator.score(row["image"], [ClosedQuestion(row["question"], ("yes", "no"))])
        assert row["answer"] == scores.best
    assert evaluate(tiny_checkpoint, adapter, data, output, "--choices", "yes") == 2
    assert evaluate(tiny_checkpoint, adapter, data, output, "--choices", "left,right") == 2
    assert "no right answer of the data is one of left, right" in capsys.readouterr().err
    parts = ("--choices", "yes,no", "--quant.stream", "all")
    assert evaluate(tiny_checkpoint, adapter, data, tmp_path / "parts", *parts) == 2
    told = capsys.readouterr().err
    assert "closed questions are answered by a model on one device" in told
    assert "loading" not in told
