"""Data made to hang or to exhaust: special files, long texts and conversations cost their record, in bounded time."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from cogtune.configuration.run_config import DataSection
from cogtune.data.budget import Budget, longest_history
from cogtune.data.check import CheckReport, check
from cogtune.data.problems import BadRecordError
from cogtune.data.record_json import MAX_TURNS, parse_json
from cogtune.errors import DataError
from cogtune.processing.image import read_image
from cogtune.processing.token_file import estimated_tokens, find_token_file

LABEL = json.dumps({"conversations": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("images", "labels"):
        (tmp_path / name).mkdir()
    for number in range(3):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / "images" / f"{number}.png")
        (tmp_path / "labels" / f"{number}.json").write_text(LABEL)
    return tmp_path


def checked(path: Path, **keys: Any) -> CheckReport:
    return check(DataSection(path=[path], validation_share=0.0, **keys), 0, find_token_file(None))


def special(path: Path, kind: str) -> None:
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to({"device": "/dev/zero", "loop": path.name}[kind])


@pytest.mark.parametrize("kind", ["pipe", "device", "loop"])
@pytest.mark.parametrize("place", ["images/1.png", "labels/1.json"])
def test_a_special_file_costs_its_record(folder: Path, kind: str, place: str) -> None:
    special(folder / place, kind)
    report = checked(folder, on_bad="skip", max_bad_share=1.0)
    assert report.ok, report.errors
    assert [finding.code for finding in report.warnings if place in finding.where], report.warnings
    assert report.counts["conversations"] == 2


@pytest.mark.parametrize("kind", ["pipe", "device", "loop"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.parquet", "a.arrow"])
def test_a_special_file_as_data_is_refused(tmp_path: Path, kind: str, name: str) -> None:
    special(tmp_path / name, kind)
    assert [finding.code for finding in checked(tmp_path / name).errors] == ["data-no-such-path"]


@pytest.mark.parametrize("kind", ["pipe", "device", "loop"])
@pytest.mark.parametrize("image", ["x.png", "./x.png"])
def test_a_special_file_as_a_records_picture_costs_the_record(tmp_path: Path, kind: str, image: str) -> None:
    special(tmp_path / "x.png", kind)
    line = json.loads(LABEL) | {"image": image}
    (tmp_path / "a.jsonl").write_text(json.dumps(line) + "\n" + json.dumps(line | {"image": None}))
    report = checked(tmp_path / "a.jsonl", on_bad="skip", max_bad_share=1.0)
    assert report.ok, report.errors
    assert report.counts["conversations"] == 1


@pytest.mark.parametrize(
    "text",
    ['{"a":"' + '\\"' * 400_000, '{"a":"' + '\\"' * 400_000 + "\\", '"' * 400_001, ", " * 400_000, "[" * 400_000],
    ids=["quotes", "quotes and a backslash", "empty texts", "commas", "lists"],
)
def test_broken_json_is_refused_in_linear_time(text: str) -> None:
    """Each of these took hours when an unfinished text was searched again from every quote in it."""
    with pytest.raises(BadRecordError, match="JSON"):
        parse_json(text.encode())


def test_the_repair_of_commas_keeps_texts() -> None:
    text = r'{"a": "x,]\",}", "b": [1, 2,  ], }'
    assert parse_json(text.encode()) == ({"a": 'x,]",}', "b": [1, 2]}, True)


def test_a_repeated_key_among_many_is_found_in_linear_time() -> None:
    keys = ",".join(f'"{number}":0' for number in range(100_000))
    with pytest.raises(BadRecordError, match='"99999" stands twice'):
        parse_json(f'{{{keys},"99999":1}}'.encode())


def test_white_space_is_counted_in_linear_time() -> None:
    assert len(estimated_tokens(" " * 1_000_000 + "x")) == 1
    assert len(estimated_tokens("one two\n\n  three")) == 4


def test_deep_json_is_refused(tmp_path: Path) -> None:
    (tmp_path / "deep.json").write_text("[" * 60_000 + "]" * 60_000)
    assert [finding.code for finding in checked(tmp_path / "deep.json").errors] == ["data-bad-json"]


def conversation(turns: int) -> str:
    messages = [
        message
        for number in range(turns)
        for message in ({"role": "user", "content": f"q{number}?"}, {"role": "assistant", "content": f"a{number}"})
    ]
    return json.dumps({"image": None, "conversations": messages})


@pytest.mark.parametrize(("turns", "codes"), [(MAX_TURNS, []), (MAX_TURNS + 1, ["data-many-turns"])])
def test_turns_of_a_conversation_are_limited(tmp_path: Path, turns: int, codes: list[str]) -> None:
    (tmp_path / "long.jsonl").write_text(conversation(turns))
    assert [finding.code for finding in checked(tmp_path / "long.jsonl", max_input_len=200).errors] == codes[:1]


def test_a_history_is_found_with_few_prompts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The tokens looked at grow with the turns, not with their square."""
    seen = []
    monkeypatch.setattr(
        Budget, "_prompt", lambda self, item, own=Budget._prompt: seen.append(item.turn - item.first) or own(self, item)
    )
    (tmp_path / "long.jsonl").write_text(conversation(400))
    report = checked(tmp_path / "long.jsonl", max_input_len=100)
    assert report.budget["trained"] == 400
    assert max(seen) < 30
    assert len(seen) < 4 * 400


def test_a_guess_changes_no_history() -> None:
    """Against trying every first turn in order."""
    draw = random.Random(0)
    for _ in range(2000):
        turn = draw.randrange(12)
        earliest, limit = draw.randrange(turn + 1), draw.randrange(30)
        sizes = [draw.randrange(8) for _ in range(turn + 1)]
        prompts = {first: [0] * sum(sizes[first:]) for first in range(turn + 1)}
        expected = next((first for first in range(earliest, turn) if len(prompts[first]) <= limit), turn)
        for guess in (None, *range(earliest, turn + 1)):
            search = longest_history(earliest, turn, limit, guess)
            asked, state = next(search), SimpleNamespace(result=None)
            while state.result is None:
                assert earliest <= asked <= turn
                try:
                    asked = search.send(prompts[asked])
                except StopIteration as stop:
                    state.result = stop.value
            assert state.result == (expected, prompts[expected])


def test_an_unrelated_column_that_python_cannot_hold_is_no_error(tmp_path: Path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    Image.new("RGB", (8, 8)).save(tmp_path / "i.png")
    when = pa.array([2**62, 0], pa.timestamp("us"))
    columns = {"image": ["i.png"] * 2, "question": ["q", "r"], "answer": ["a", "b"], "when": when}
    pq.write_table(pa.table(columns), tmp_path / "w.parquet")
    report = checked(tmp_path / "w.parquet")
    assert report.ok, report.errors
    assert report.counts["conversations"] == 2


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b", "x" * 200 + "/" + "y" * 300])
def test_a_path_that_no_system_takes_is_a_picture_that_cannot_be_read(name: str) -> None:
    with pytest.raises(DataError) as caught:
        read_image(name)
    assert caught.value.code in ("image-unreadable", "image-missing")
    assert len(str(caught.value)) < 600
