"""Captioning as a job: clips are answered, cut off, continued and shared, and what is written is read as data again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cogtune.checkpoint.random import make_tiny
from cogtune.cli.main import main
from cogtune.data.records import Question, file_of
from cogtune.data.sources import read_sources
from cogtune.errors import OutputFolderError
from cogtune.generate.captions import write_captions
from cogtune.generate.choices import ClosedQuestion
from cogtune.generate.loading import load_generator
from cogtune.generate.shares import Share, join, parse_share, refuse_other_parts, remove_parts
from cogtune.processing.frames import Frame
from tests.support.clips import write_clip
from tests.support.data_folders import section


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("model") / "tiny", vision_experts=False, eos_token_id=257)


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for number in range(5):
        write_clip(folder / f"videos/{'deep/' * (number % 2)}{number}.mp4", 8 + 5 * number)
    return folder


def predict(model: Path, clips: Path, output: Path, *more: str) -> list[dict[str, object]]:
    words = ["predict", "--model", model, "--data", clips, "--output", output, "--max-new-tokens", "6", *more]
    assert main([str(word) for word in words]) == 0
    return [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def whole(model, clips, tmp_path_factory) -> list[dict[str, object]]:
    return predict(model, clips, tmp_path_factory.mktemp("out") / "all.jsonl")


def test_every_clip_is_asked_the_published_question(whole, clips) -> None:
    assert [Path(str(row["video"])).name for row in whole] == ["0.mp4", "2.mp4", "4.mp4", "1.mp4", "3.mp4"]
    assert {row["question"] for row in whole} == {"Please describe this video in detail."}
    assert all(set(row) == {"id", "video", "turn", "question", "answer", "reference"} for row in whole)


@pytest.mark.parametrize("name", ["captions", "prompts.txt", "metadata.jsonl", "captions.parquet"])
def test_captions_are_written_back_and_read_again(name: str, whole, clips, tmp_path) -> None:
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    texts = {clips / "videos" / f"{'deep/' * (n % 2)}{n}.mp4": f"caption {n}" for n in range(5)}
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "videos").symlink_to(clips / "videos")
    inside = {folder / path.relative_to(clips): text for path, text in texts.items()}
    target = folder if name == "captions" else folder / name
    assert write_captions(target, inside) == 5
    assert write_captions(target, inside) == 5  # written again, the same
    data = target if name in ("metadata.jsonl", "captions.parquet") else folder
    examples, _ = read_sources(section(data, image_root=[clips, folder]) if data == target else section(data),
                               clips=True, max_images=99)  # fmt: skip
    found = {file_of(one.images[0]).name: one.conversations[0].turns[0].answer for one in examples}
    assert found == {path.name: text for path, text in texts.items()}
    with pytest.raises(OutputFolderError, match="another caption"):
        write_captions(target, dict.fromkeys(inside, "something else"))


def test_a_run_that_was_cut_off_goes_on_and_loses_nothing(model, clips, whole, tmp_path) -> None:
    output = tmp_path / "out.jsonl"
    assert predict(model, clips, output) == whole
    lines = output.read_bytes().split(b"\n")
    output.write_bytes(b"\n".join(lines[:2]) + b"\n" + lines[2][:10])
    assert predict(model, clips, output, "--captions", str(tmp_path / "labelled")) == whole
    labels = {path.stem: path.read_text(encoding="utf-8") for path in (tmp_path / "labelled").rglob("*.txt")}
    assert labels == {Path(str(row["video"])).stem: f"{str(row['answer']).strip()}\n" for row in whole}


def test_shares_joined_are_the_whole(model, clips, whole, tmp_path, capsys) -> None:
    from cogtune.generate.predictions_file import AnswerSettings, PredictionFile

    output = tmp_path / "out.jsonl"
    words = ["predict", "--model", str(model), "--data", str(clips), "--output", str(output), "--max-new-tokens", "6"]
    for number in range(2):
        assert main([*words, "--share", f"{number}/2"]) == 0
    assert not output.exists()
    assert sorted(path.name for path in tmp_path.glob("out.*.jsonl")) == ["out.0-of-2.jsonl", "out.1-of-2.jsonl"]
    with pytest.raises(OutputFolderError, match="over 2 processes, this one has 3"):
        refuse_other_parts(output, 3)
    questions = [
        Question(str(row["id"]), 0, (Frame(Path(str(row["video"])), 0, 0),), str(row["question"]), None, ())
        for row in whole
    ]
    file = PredictionFile(output, AnswerSettings({}, {}), questions)
    assert join(file, questions, 2) == 5
    remove_parts(output, 2)
    assert [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()] == whole
    assert not list(tmp_path.glob("out.*-of-*"))


def test_a_question_of_ones_own_is_asked_once_a_clip(model, clips, tmp_path) -> None:
    rows = predict(model, clips, tmp_path / "out.jsonl", "--question", "Is it good?", "--model.template", "vqa")
    assert [row["question"] for row in rows] == ["Is it good?"] * 5


def test_a_damaged_clip_is_left_out_and_named(model, clips, tmp_path, capsys) -> None:
    folder = tmp_path / "set"
    write_clip(folder / "videos/good.mp4", 8)
    (folder / "videos/bad.mp4").write_text("no clip")
    rows = predict(model, folder, tmp_path / "out.jsonl", "--data.on_bad", "skip", "--data.max_bad_share", "0.5")
    assert len(rows) == 1
    assert "1 clip-unreadable" in capsys.readouterr().out
    rows = predict(model, folder, tmp_path / "all.jsonl", "--captions", str(tmp_path / "labelled"))
    assert sorted(row.get("error", "") for row in rows) == ["", "clip-unreadable"]
    assert [path.name for path in (tmp_path / "labelled").rglob("*.txt")] == ["good.txt"]


@pytest.mark.parametrize("text", ["1", "2/2", "a/b", "-1/2"])
def test_shares_are_checked(text: str) -> None:
    with pytest.raises(Exception, match="expected K/N such as 0/4"):
        parse_share(text)
    assert parse_share("1/3") == Share(1, 3)


def test_closed_questions_about_clips_share_a_pass(model, clips, tmp_path) -> None:
    words = ("--choices", "good,bad", "--question", "Is it?")
    rows = predict(model, clips, tmp_path / "out.jsonl", *words)
    assert all(row["choices"] == ["good", "bad"] and row["answer"] in row["choices"] for row in rows)
    first = next(row for row in rows if str(row["video"]).endswith("0.mp4"))
    generator = load_generator(model, keys={"device": "cpu"})
    (alone,) = generator.score(first["video"], [ClosedQuestion("Is it?", ("good", "bad"))])
    generator.close()
    assert first["probabilities"] == pytest.approx(alone.probabilities, abs=1e-6)
