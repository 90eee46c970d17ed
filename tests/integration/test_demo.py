"""``cogtune demo`` on a few pictures, from data to page, with every way to a network shut."""

from __future__ import annotations

import json
import re
import socket
from pathlib import Path
from typing import Any, NoReturn

import pytest

from cogtune.adapters.attach import load_adapter
from cogtune.checkpoint.load import load_model
from cogtune.demo.base import BASE
from cogtune.demo.run import run
from cogtune.errors import OutputFolderError
from cogtune.generate.generator import Generator
from cogtune.processing.processor import CogVLM2Processor

CHANGES = {"train.epochs": 1, "train.max_steps": 4, "data.workers": 0, "eval.steps": 2, "log.steps": 1}
PICTURES = (64, 15)


class Demo:
    """One run of the demo, and what it said."""

    def __init__(self, output: Path) -> None:
        self.output, self.lines = output, list[str]()
        self.record: dict[str, Any] = run(output, pictures=PICTURES, changes=CHANGES, say=self.lines.append)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    def refuse(*_: object, **__: object) -> NoReturn:
        raise AssertionError("the demo tried to reach a network")

    with pytest.MonkeyPatch.context() as patch:
        for name in ("create_connection", "getaddrinfo"):
            patch.setattr(socket, name, refuse)
        for name in ("connect", "connect_ex"):
            patch.setattr(socket.socket, name, refuse)
        return Demo(tmp_path_factory.mktemp("demo") / "out")


def test_it_leaves_data_run_model_record_and_page(demo: Demo) -> None:
    out = demo.output
    assert len(list((out / "data/train/images").iterdir())) == 64
    assert len(list((out / "data/test/labels").iterdir())) == 15
    assert (out / "run/adapter/adapter_model.safetensors").is_file()
    assert list((out / "run").glob("events.out.tfevents*"))
    assert (out / "merged/model.safetensors.index.json").is_file()
    assert json.loads((out / "demo.json").read_text(encoding="utf-8")) == demo.record


def test_every_question_of_the_test_pictures_is_measured_three_times(demo: Demo) -> None:
    labels = [json.loads(file.read_text()) for file in (demo.output / "data/test/labels").iterdir()]
    total = sum(len(records) for records in labels)
    scores = demo.record["scores"]
    assert {"base", "tuned", "blind"} <= scores.keys()
    assert {found["total"] for found in scores.values()} == {total}
    assert demo.record["steps"] == 4
    assert demo.record["loss"]["last"] < demo.record["loss"]["first"]


def test_training_reads_a_pictures_questions_as_one_row(demo: Demo) -> None:
    data = json.loads((demo.output / "run/data.json").read_text(encoding="utf-8"))
    rows = data["train_rows"]["rows"] + data["validation_rows"]["rows"]
    answers = data["train_rows"]["trained_answers"] + data["validation_rows"]["trained_answers"]
    assert rows == 64
    assert answers == demo.record["data"]["train"]["questions"]


def test_the_merged_model_answers_as_base_and_adapter(demo: Demo) -> None:
    processor = CogVLM2Processor.from_pretrained(BASE)
    adapted = Generator(load_adapter(load_model(BASE), demo.output / "run/adapter"), processor)
    merged = Generator(load_model(demo.output / "merged"), processor)
    inputs = processor(image=demo.output / "data/test/images/00000.png", query="what shape is present?")
    one, other = (generator.model(**inputs).logits[0, -1] for generator in (adapted, merged))
    # the base is stored in bfloat16, so merging rounds each sum once to 8 bits
    assert (one - other).abs().max() <= 0.05 * one.abs().max()
    asked = demo.record["merged_answers"]
    assert len(asked) == 3
    assert len({one["picture"] for one in asked}) == 3


def test_the_page_shows_it_and_the_console_says_where_it_is(demo: Demo) -> None:
    page = (demo.output / "demo.html").read_text(encoding="utf-8")
    assert page.count("data:image/webp;base64,") == 15
    assert not re.search(r"href=\"[^#d]|@import|url\(|src=|<link", page)
    assert "<polyline" in page
    for name in ("base", "tuned", "blind"):
        assert f"<b>{100 * demo.record['scores'][name]['accuracy']:.1f}</b>" in page
    said = "\n".join(demo.lines)
    for path in ("demo.html", "run/adapter", "merged"):
        assert str(demo.output / path) in said
    assert f"tensorboard --logdir={demo.output / 'run'}" in said


def test_running_again_goes_on_from_what_is_there(demo: Demo) -> None:
    adapter = demo.output / "run/adapter/adapter_model.safetensors"
    before = adapter.read_bytes(), adapter.stat().st_mtime_ns
    again = Demo(demo.output).record
    assert again["continued"] is True
    assert (adapter.read_bytes(), adapter.stat().st_mtime_ns) == before
    assert {n: s["right"] for n, s in again["scores"].items()} == {
        n: s["right"] for n, s in demo.record["scores"].items()
    }


def test_a_folder_with_something_else_in_it_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("all of it")
    with pytest.raises(OutputFolderError, match="not the output of a demo"):
        run(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.txt"]
