"""A question and its answer, or a caption, under keys of their own are read alike from every kind of file."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cogtune.data.sources import read_sources
from cogtune.errors import DataError
from tests.support.data_folders import section, write_image, write_lines

CAPTION = "Describe this image in detail."
PAIR = [("color?", "red")]
RECORDS: dict[str, tuple[dict[str, Any], list[tuple[str, str]]]] = {
    "question, answer": ({"image": "p.png", "question": "color?", "answer": "red"}, PAIR),
    "query, response": ({"images": ["p.png"], "query": "<image>color?", "response": "red"}, PAIR),
    "path in the query": ({"query": "<img>p.png</img>color?", "response": "red", "image": None}, PAIR),
    "history": (
        {"query": "size?", "response": "big", "images": ["p.png"], "history": [["<image>color?", "red"]]},
        [*PAIR, ("size?", "big")],
    ),
    "instruction, input": (
        {"instruction": "Answer.", "input": "color?", "output": "red", "image": "p.png"},
        [("Answer.\ncolor?", "red")],
    ),
    "instruction, no input": ({"instruction": "color?", "input": "", "output": "red", "image": "p.png"}, PAIR),
    "prompt, completion": ({"image": "p.png", "prompt": "color?", "completion": "red"}, PAIR),
    "prompt, completion as messages": (
        {
            "images": ["p.png"],
            "prompt": [{"role": "user", "content": "<image>color?"}],
            "completion": [{"role": "assistant", "content": "red"}],
        },
        PAIR,
    ),
    "caption": ({"image": "p.png", "caption": "A square."}, [(CAPTION, "A square.")]),
    "text": ({"file_name": "p.png", "text": "A square."}, [(CAPTION, "A square.")]),
    "captions": ({"image": "p.png", "captions": ["A.", "B."]}, [(CAPTION, "A."), (CAPTION, "B.")]),
    "capital letters": ({"Image": "p.png", "Question": "color?", "Answer": "red"}, PAIR),
}


def as_csv(folder: Path, record: dict[str, Any]) -> Path:
    if any(isinstance(value, list) or value is None for value in record.values()):
        pytest.skip("a cell holds no list")
    path = folder / "metadata.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([list(record), list(record.values())])
    return path


def as_parquet(folder: Path, record: dict[str, Any]) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist([record]), folder / "a.parquet")
    return folder / "a.parquet"


def text_file(name: str, text: Callable[[list[Any]], str]) -> Callable[[Path, dict[str, Any]], Path]:
    def write(folder: Path, record: dict[str, Any]) -> Path:
        (folder / name).write_text(text([record]))
        return folder / name

    return write


def printed(all_: list[Any]) -> str:
    return "\n".join(json.dumps(one, indent=2) for one in all_ * 2)


FILES: dict[str, Callable[[Path, dict[str, Any]], Path]] = {
    "jsonl": text_file("metadata.jsonl", lambda all_: json.dumps(all_[0])),
    "json list": text_file("a.json", json.dumps),
    "one json object": text_file("a.json", lambda all_: json.dumps(all_[0], indent=1)),
    "json of lines": text_file("a.json", lambda all_: "\n".join(json.dumps(one) for one in all_ * 2)),
    "json of printed objects": text_file("a.json", printed),
    "jsonl of a list": text_file("a.jsonl", json.dumps),
    "jsonl of a printed list": text_file("a.jsonl", lambda all_: json.dumps(all_, indent=2)),
    "jsonl of printed objects": text_file("a.jsonl", printed),
    "csv": as_csv,
    "parquet": as_parquet,
}  # fmt: skip


def read(path: Path, **values: Any) -> tuple[list[tuple[str | None, list[tuple[str, str]]]], list[str]]:
    examples, report = read_sources(section(path, **values))
    found = [
        (
            next((image.name for image in one.images), None),
            [(turn.question, turn.answer) for talk in one.conversations for turn in talk.turns],
        )
        for one in examples
    ]
    return found, report.lines()


def refused(path: Path, **values: Any) -> DataError:
    with pytest.raises(DataError) as caught:
        read(path, **values)
    assert caught.value.hint
    return caught.value


@pytest.mark.parametrize("name", RECORDS)
@pytest.mark.parametrize("file", FILES)
def test_read_from_every_file(tmp_path: Path, file: str, name: str) -> None:
    write_image(tmp_path / "p.png")
    record, turns = RECORDS[name]
    times = 2 if file in ("json of lines", "json of printed objects", "jsonl of printed objects") else 1
    assert read(FILES[file](tmp_path, record))[0] == [("p.png", turns * times)]


def test_in_a_folder_of_pictures(tmp_path: Path) -> None:
    """As imagefolder has it: metadata.jsonl beside the pictures."""
    write_image(tmp_path / "p.png")
    write_lines(tmp_path / "metadata.jsonl", [RECORDS["text"][0]])
    assert read(tmp_path)[0] == [("p.png", [(CAPTION, "A square.")])]


def test_a_record_without_a_picture_and_with_a_system_message(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [{"system": "Be brief.", "query": "2 + 2?", "response": "4"}])
    assert refused(path).code == "data-system"
    assert read(path, system="prepend")[0] == [(None, [("Be brief.\n2 + 2?", "4")])]


def test_keys_that_are_not_used_are_said_once(tmp_path: Path) -> None:
    write_image(tmp_path / "p.png")
    record = {"image": "p.png", "question": "q", "answer": "a", "A": "one", "B": "two", "empty": None}
    path = write_lines(tmp_path / "a.jsonl", [record, record])
    (line,) = [line for line in read(path)[1] if "not used" in line]
    assert line.endswith("keys that are not used: a, b") or line.endswith("keys that are not used: A, B")


@pytest.mark.parametrize(
    ("record", "code", "words"),
    [
        ({"image": "p.png", "question": "q"}, "data-missing-key", ("without an answer", "found: image, question")),
        ({"image": "p.png", "question": "q", "query": "r", "answer": "a"}, "data-missing-key", ("question, query",)),
        ({"question": "q", "answer": "a", "output": "b"}, "data-missing-key", ("answer, output",)),
        ({"question": "q", "answer": None}, "data-content", ("the answer",)),
        ({"question": "q", "answer": "a", "imgs": ["p.png"]}, "data-unread-key", ('"imgs"',)),
        ({"question": "<image>q", "answer": "a"}, "image-marker", ("names no picture",)),
        ({"question": "q", "answer": "a", "images": ["p.png", "p.png"]}, "data-several-images", ("2 pictures",)),
        ({"question": "q", "answer": "a", "image": "p.png", "history": [["x"]]}, "data-content", ("history",)),
        ({"question": "q", "answer": "a", "image": "p.png", "history": "x"}, "data-content", ("history",)),
        ({"image": None, "caption": "c"}, "image-path", ("a caption, and no picture",)),
        ({"image": ["p.png", None], "caption": "c"}, "image-path", ("null",)),
        ({"image": "p.png", "caption": "c", "text": "t"}, "data-missing-key", ("caption, text",)),
        ({"image": "p.png", "conversation": []}, "data-missing-key", ("found: image, conversation",)),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, record: Any, code: str, words: tuple[str, ...]) -> None:
    write_image(tmp_path / "p.png")
    error = refused(write_lines(tmp_path / "a.jsonl", [record]))
    assert (error.code, [word in error.message for word in words]) == (code, [True] * len(words)), error


def test_an_unknown_record_is_one_error_with_its_keys_and_the_nearest(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [{"uid": n, "quesion": "q", "anser": "a"} for n in range(3)])
    error = refused(path)
    assert error.code == "data-format"
    assert "uid, quesion, anser" in error.message
    assert "question (quesion)" in error.message
    assert "answer (anser)" in error.message
    assert "more" not in error.message
    (tmp_path / "b.json").write_text(json.dumps({"version": 1, "data": [{"question": "q", "answer": "a"}]}))
    assert "version, data" in refused(tmp_path / "b.json").message


def test_the_first_known_record_says_the_format(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [{"uid": 1}, *({"query": f"q{n}", "response": "a"} for n in range(12))])
    assert len(read(path, on_bad="skip")[0]) == 12
    assert "a.jsonl:1" in refused(path).message


def test_behind_a_damaged_printed_object_nothing_is_found(tmp_path: Path) -> None:
    good = json.dumps({"query": "q", "response": "a"}, indent=1)
    path = tmp_path / "a.jsonl"
    path.write_text(f'{good}\n{good}\n{{\n "query": "q",\n "response" "a"\n}}\n{good}\n')
    error = refused(path)
    assert error.code == "data-bad-json"
    assert "record 3" in error.message
    assert "after it are not found" in error.message
    assert "more" not in error.message
