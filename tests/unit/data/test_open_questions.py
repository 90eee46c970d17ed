"""Prediction asks questions that have no answer yet, in every format; training refuses them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cogtune.data.records import Question, iter_questions
from cogtune.data.sources import read_sources
from cogtune.errors import DataError
from cogtune.generate.predictions_file import record
from tests.support.data_folders import section, write_image, write_lines

ASK = {"role": "user", "content": "color?"}
SAY = {"role": "assistant", "content": "red"}
PART = [{"type": "image_url", "image_url": {"url": "p.png"}}, {"type": "text", "text": "color?"}]
LLAVA = {"from": "human", "value": "<image>\ncolor?"}


def lines(**one: Any) -> Callable[[Path], Path]:
    return lambda folder: write_lines(folder / "a.jsonl", [one])


def table(text: str) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        (folder / "a.csv").write_text(text)
        return folder / "a.csv"

    return write


def parquet(**row: Any) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet as files

        files.write_table(pyarrow.Table.from_pylist([row]), folder / "a.parquet")
        return folder / "a.parquet"

    return write


VQA = {"data_subtype": "test2015", "questions": [{"question_id": 1, "image_id": "p.png", "question": "color?"}]}


def whole(name: str, root: Any) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        write_image(folder / name.rpartition("/")[0] / "p.png")
        (folder / name).write_text(json.dumps(root))
        return folder / name

    return write


def labels(folder: Path) -> Path:
    write_image(folder / "d/images/p.png")
    (folder / "d/labels").mkdir()
    (folder / "d/labels/p.json").write_text(json.dumps({"conversations": [ASK]}))
    return folder / "d"


def images_alone(folder: Path) -> Path:
    write_image(folder / "d/images/p.png")
    return folder / "d"


def pictures(folder: Path) -> Path:
    write_image(folder / "d/p.png")
    return folder / "d"


CAPTION = "Describe this image in detail."
CASES = {
    "own": (lines(image="p.png", conversations=[ASK]), "color?"),
    "empty": (lines(image="p.png", conversations=[ASK, SAY | {"content": " "}]), "color?"),
    "null": (lines(image="p.png", conversations=[ASK, SAY | {"content": None}]), "color?"),
    "messages": (lines(images=["p.png"], messages=[ASK]), "color?"),
    "messages, null": (lines(images=["p.png"], messages=[ASK, SAY | {"content": None}]), "color?"),
    "openai": (lines(messages=[ASK | {"content": PART}]), "color?"),
    "llava": (lines(image="p.png", conversations=[LLAVA]), "color?"),
    "llava, empty": (lines(image="p.png", conversations=[LLAVA, {"from": "gpt", "value": ""}]), "color?"),
    "csv": (table("image,question\np.png,color?\n"), "color?"),
    "csv, empty": (table("image,question,answer\np.png,color?,\n"), "color?"),
    "csv of pictures": (table("image\np.png\n"), CAPTION),
    "parquet": (parquet(image="p.png", question="color?"), "color?"),
    "parquet, null": (parquet(image="p.png", question="color?", answer=None), "color?"),
    "parquet of pictures": (parquet(image="p.png"), CAPTION),
    "flat": (lines(images=["p.png"], query="<image>color?"), "color?"),
    "flat, pictures": (lines(image="p.png"), CAPTION),
    "vqa": (whole("v2_test2015_questions.json", VQA), "color?"),
    "vqa in a folder": (lambda folder: whole("d/v2_questions.json", VQA)(folder).parent, "color?"),
    "coco": (whole("image_info_test2017.json", {"images": [{"id": 7, "file_name": "p.png"}]}), CAPTION),
    "labels": (labels, "color?"),
    "images alone": (images_alone, CAPTION),
    "a folder of pictures": (pictures, CAPTION),
}


def asked(path: Path, **values: Any) -> list[Question]:
    return list(iter_questions(read_sources(section(path, **values), open_questions=True)[0]))


@pytest.mark.parametrize("name", CASES)
def test_a_question_without_an_answer_is_asked(tmp_path: Path, name: str) -> None:
    write_image(tmp_path / "p.png")
    write, question = CASES[name]
    path = write(tmp_path)
    (one,) = asked(path)
    assert (one.question, one.reference, len(one.images)) == (question, None, 1)
    assert record(one, "blue")["reference"] is None
    with pytest.raises(DataError):
        read_sources(section(path))


def test_an_open_tail_follows_its_history(tmp_path: Path) -> None:
    write_image(tmp_path / "p.png")
    first, last = asked(lines(image="p.png", conversations=[ASK, SAY, ASK])(tmp_path))
    assert (first.reference, first.history) == ("red", ())
    assert (last.reference, last.history) == (None, (("color?", "red"),))


def test_an_answer_missing_in_the_middle_is_refused(tmp_path: Path) -> None:
    path = lines(image=None, conversations=[ASK, SAY | {"content": ""}, ASK, SAY])(tmp_path)
    with pytest.raises(DataError, match="message 2"):
        asked(path)
