"""Repeated keys and ids, empty lists and ids of a wrong type cost their record, never others, and are said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cogtune.data.problems import Problems
from cogtune.data.sources import collect_sources
from tests.support.data_folders import section, write_image


def problems(path: Path) -> Problems:
    write_image(path.parent / "i.png")
    return collect_sources(section(path, on_bad="skip"))[2]


def found(path: Path) -> list[tuple[str, str]]:
    return [(problem.kind, problem.what) for problem in problems(path).found]


def test_a_key_that_stands_twice(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    good = json.dumps({"image": "i.png", "conversations": turns})
    bad = good[:-1] + f', "conversations": {json.dumps(turns)}}}'
    (tmp_path / "a.jsonl").write_text(f"{good}\n{bad}\n")
    ((kind, what),) = found(tmp_path / "a.jsonl")
    assert kind == "bad-json"
    assert '"conversations" stands twice' in what


@pytest.mark.parametrize(("image_id", "kind"), [(1, "duplicate-id"), ([1], "id"), (None, "id")])
def test_coco_ids(tmp_path: Path, image_id: Any, kind: str) -> None:
    images = [{"id": 1, "file_name": "i.png"}, {"id": 1, "file_name": "j.png"}, {"id": 2, "file_name": "i.png"}]
    annotations = [{"image_id": image_id, "caption": "x"}, {"image_id": 2, "caption": "ok"}]
    (tmp_path / "c.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    assert [one for one, _ in found(tmp_path / "c.json")] == [kind]


@pytest.mark.parametrize(("question_id", "kind"), [(1, "duplicate-id"), ([1], "id")])
def test_vqa_ids(tmp_path: Path, question_id: Any, kind: str) -> None:
    questions = [{"question_id": one, "image_id": "i.png", "question": "q"} for one in (question_id, 2)]
    answers = [{"question_id": one, "multiple_choice_answer": "a"} for one in (question_id, question_id, 2)]
    (tmp_path / "q_questions.json").write_text(json.dumps({"questions": questions}))
    (tmp_path / "q_annotations.json").write_text(json.dumps({"annotations": answers}))
    assert [one for one, _ in found(tmp_path / "q_questions.json")] == [kind]


def test_a_row_with_an_empty_list_of_captions(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = {"image": ["i.png", "i.png"], "caption": pyarrow.array([["one"], []], pyarrow.list_(pyarrow.string()))}
    parquet.write_table(pyarrow.table(rows), tmp_path / "c.parquet")
    assert found(tmp_path / "c.parquet") == [("content", "the list of captions is empty")]


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_a_question_beside_a_caption(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"q.{suffix}"
    if suffix == "csv":
        path.write_text("image,question,caption\ni.png,q,c\n")
    else:
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        parquet.write_table(pyarrow.table({"image": ["i.png"], "question": ["q"], "caption": ["c"]}), path)
    ((kind, what),) = found(path)
    assert kind == "missing-key"
    assert "without an answer" in what
    assert what.endswith("found: image, question, caption")
