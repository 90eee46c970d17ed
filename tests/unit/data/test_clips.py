"""Layouts of clips, from files to rows: as CogVideoX, CogKit, MSR-VTT, VATEX, messages and tables write them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from cogtune import CogVLM2ForCausalLM
from cogtune.checkpoint.random import make_tiny, random_model, tiny_video_config
from cogtune.cli.main import main
from cogtune.data.check import check
from cogtune.data.collate import collate
from cogtune.data.dataset import TrainRows
from cogtune.data.preview import preview_rows
from cogtune.data.preview_html import page
from cogtune.data.records import Example
from cogtune.data.sources import read_sources
from cogtune.data.split import split
from cogtune.errors import DataError
from cogtune.processing.token_file import find_token_file
from tests.support.clips import write_clip
from tests.support.data_folders import section, write_image

QUESTION = "Please describe this video in detail."
LENGTHS = {"a": 8, "b": 20, "c": 33}  # at 8 a second: 2, 3 and 5 frames


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("clips")
    return {name: write_clip(folder / f"{name}.mp4", length) for name, length in LENGTHS.items()}


@pytest.fixture
def put(clips):
    """Copies the clips to a folder under given names."""

    def place(folder: Path, names: dict[str, str]) -> None:
        for clip, name in names.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(clips[clip], folder / name)

    return place


def read(path: Path, **values: Any) -> list[Example]:
    rules = {"clips": True, "max_images": 99, "open_questions": values.pop("open_questions", False)}
    return read_sources(section(path, **values), **rules)[0]


def captions(examples: list[Example]) -> dict[str, list[str]]:
    for example in examples:
        assert all(talk.turns[0].question == QUESTION for talk in example.conversations)
    return {
        example.images[0].path.name: [talk.turns[0].answer for talk in example.conversations] for example in examples
    }


def lines(file: Path, records: list[Any]) -> Path:
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file


def table(folder: Path) -> None:
    (folder / "set.csv").write_text("video,text\na.mp4,one\nb.mp4,two\nc.mp4,three\n")


def parquet(folder: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet as files

    rows = [{"video": {"bytes": (folder / f"{n}.mp4").read_bytes(), "path": f"{n}.mp4"}, "caption": text}
            for n, text in (("a", "one"), ("b", "two"), ("c", "three"))]  # fmt: skip
    files.write_table(pyarrow.Table.from_pylist(rows), folder / "set.parquet")
    for name in "abc":
        (folder / f"{name}.mp4").unlink()


def messages(folder: Path) -> None:
    talk = [{"role": "user", "content": f"<video>{QUESTION}"}]
    lines(folder / "set.jsonl", [
        {"messages": [*talk, {"role": "assistant", "content": text}], "videos": [f"{name}.mp4"]}
        for name, text in (("a", "one"), ("b", "two"), ("c", "three"))
    ])  # fmt: skip


def parts(folder: Path) -> None:
    text_part = {"type": "text", "text": QUESTION}
    lines(folder / "set.jsonl", [
        {"messages": [
            {"role": "user", "content": [{"type": "video", "video": f"{name}.mp4"}, text_part]},
            {"role": "assistant", "content": text},
        ]} for name, text in (("a", "one"), ("b", "two"), ("c", "three"))
    ])  # fmt: skip


def llava(folder: Path) -> None:
    (folder / "set.json").write_text(json.dumps([
        {"video": f"{name}.mp4", "conversations": [
            {"from": "human", "value": f"<video>\n{QUESTION}"}, {"from": "gpt", "value": text},
        ]} for name, text in (("a", "one"), ("b", "two"), ("c", "three"))
    ]))  # fmt: skip


def own(folder: Path) -> None:
    lines(folder / "set.jsonl", [
        {"video": f"{name}.mp4", "conversations": [
            {"role": "user", "content": QUESTION}, {"role": "assistant", "content": text},
        ]} for name, text in (("a", "one"), ("b", "two"), ("c", "three"))
    ])  # fmt: skip


def cogvideox(folder: Path) -> None:
    for name, text in (("a", "one"), ("b", "two"), ("c", "three")):
        (folder / "videos/deep").mkdir(parents=True, exist_ok=True)
        (folder / "labels/deep").mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.mp4").rename(folder / f"videos/deep/{name}.mp4")
        (folder / f"labels/deep/{name}.txt").write_text(f"{text}\n")


def beside(folder: Path) -> None:
    for name, text in (("a", "one"), ("b", "two"), ("c", "three")):
        (folder / f"{name}.txt").write_text(text)


def prompts(folder: Path) -> None:
    (folder / "videos").mkdir()
    for name in "abc":
        (folder / f"{name}.mp4").rename(folder / f"videos/{name}.mp4")
    (folder / "videos.txt").write_text("videos/a.mp4\nvideos/b.mp4\nvideos/c.mp4\n")
    (folder / "prompts.txt").write_text("one\ntwo\nthree\n")


def metadata(folder: Path) -> None:
    texts = (("a", "one"), ("b", "two"), ("c", "three"))
    lines(folder / "metadata.jsonl", [{"file_name": f"{name}.mp4", "prompt": text} for name, text in texts])


LAYOUTS = [table, parquet, messages, parts, llava, own, cogvideox, beside, prompts, metadata]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda one: one.__name__)
def test_every_layout_is_told_and_read(tmp_path, put, layout) -> None:
    put(tmp_path, {name: f"{name}.mp4" for name in LENGTHS})
    layout(tmp_path)
    examples = read(tmp_path, extract_dir=tmp_path / "extracted")
    assert sorted(captions(examples).values()) == [["one"], ["three"], ["two"]]
    assert sorted([frame.index for frame in one.images] for one in examples) == [[0, 7], [0, 8, 16], [0, 8, 16, 24, 32]]
    with pytest.raises(DataError) as caught:  # for a model of pictures: which model fits
        read_sources(section(tmp_path))
    assert caught.value.code == "data-media-clips"
    assert "caption" in (caught.value.hint or "")


def test_msrvtt(tmp_path, put) -> None:
    put(tmp_path, {"a": "video0.mp4", "b": "videos/video1.mp4"})
    sentences = [{"sen_id": n, "video_id": f"video{n % 2}", "caption": f"text {n}"} for n in range(6)]
    videos = [{"video_id": "video0", "split": "train"}, {"video_id": "video1", "split": "validate"}]
    (tmp_path / "train_val.json").write_text(json.dumps({"videos": videos, "sentences": sentences}))
    with pytest.raises(DataError, match="train, validate"):
        read(tmp_path)
    assert captions(read(tmp_path, split="train")) == {"video0.mp4": ["text 0", "text 2", "text 4"]}
    assert captions(read(tmp_path, split="validate")) == {"video1.mp4": ["text 1", "text 3", "text 5"]}


def test_vatex_in_either_language(tmp_path, put) -> None:
    put(tmp_path, {"a": "Ptf_2VRj-V0_000122_000132.mp4"})
    record = {"videoID": "Ptf_2VRj-V0_000122_000132", "enCap": ["a man", "a person"], "chCap": ["一个男人"]}
    (tmp_path / "vatex.json").write_text(json.dumps([record]))
    name = f"{record['videoID']}.mp4"
    assert captions(read(tmp_path)) == {name: ["a man", "a person"]}
    assert captions(read(tmp_path, labels="labels_zh")) == {name: ["一个男人"]}


def test_clips_without_captions_are_asked(tmp_path, put) -> None:
    put(tmp_path, {"a": "a.mp4", "b": "b.mp4"})
    examples = read(tmp_path, open_questions=True, clip_question="What happens?")
    assert [one.conversations[0].turns[0].question for one in examples] == ["What happens?"] * 2
    assert [one.conversations[0].turns[0].answer for one in examples] == ["", ""]


def test_problems_are_named(tmp_path, put) -> None:
    put(tmp_path, {"a": "videos/a.mp4", "b": "videos/b.mp4"})
    (tmp_path / "videos/bad.mp4").write_text("no clip")
    (tmp_path / "videos/unlabelled.mp4").write_bytes((tmp_path / "videos/a.mp4").read_bytes())
    (tmp_path / "labels").mkdir()
    for name in ("a", "b", "bad", "gone"):
        (tmp_path / f"labels/{name}.txt").write_text("text")
    (tmp_path / "labels/b.txt").write_text(" ")
    examples, report = read_sources(section(tmp_path, on_bad="skip", max_bad_share=0.9), clips=True, max_images=99)
    assert [one.images[0].path.name for one in examples] == ["a.mp4"]
    assert report.bad == {"content": 1, "label-missing": 1, "clip-missing": 1, "clip-unreadable": 1}
    assert report.pictures == 1
    assert report.frames == 2
    assert "1 clips with 2 frames" in report.lines()[0]


def test_unequal_lists(tmp_path) -> None:
    (tmp_path / "videos.txt").write_text("a.mp4\nb.mp4\n")
    (tmp_path / "prompts.txt").write_text("one\n")
    with pytest.raises(DataError, match=r"2 lines in videos\.txt, 1 in prompts\.txt"):
        read(tmp_path)


def test_pictures_for_a_video_model(tmp_path) -> None:
    write_image(tmp_path / "images/a.png")
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels/a.json").write_text("{}")
    record = {
        "images": ["images/a.png"],
        "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}],
    }
    for path in (tmp_path, lines(tmp_path / "set.jsonl", [record])):
        with pytest.raises(DataError) as caught:
            read(path)
        assert caught.value.code == "data-media-pictures"
        assert "cogtune download model" in (caught.value.hint or "")
    (tmp_path / "set.csv").write_text("video,caption\nimages/a.png,text\n")
    with pytest.raises(DataError, match=r"a\.png is a picture"):
        read(tmp_path / "set.csv")


def test_the_sampling_is_part_of_the_data(tmp_path, put) -> None:
    put(tmp_path, {"b": "b.mp4"})
    (tmp_path / "b.txt").write_text("text")
    seen = {}
    for rule in ("chat", "base", "uniform", "fps"):
        examples, report = read_sources(
            section(tmp_path, frames=rule, max_frames=4, frame_rate=2.0), clips=True, max_images=99
        )
        seen[rule] = [frame.index for frame in examples[0].images], report.fingerprint
    assert [indices for indices, _ in seen.values()] == [[0, 8, 16], [0, 6, 12, 19], [0, 6, 13, 19], [0, 4, 8, 12]]
    assert len({digest for _, digest in seen.values()}) == 4


def test_a_clip_stays_on_one_side_of_the_split(tmp_path, put) -> None:
    for number in range(20):
        put(tmp_path, {"a": f"{number}.mp4"})
        (tmp_path / f"{number}.txt").write_text("text")
    examples = read(tmp_path)
    train, validation = split(examples, 0.5, 0)
    assert len(train) + len(validation) == 20
    assert 0 < len(validation) < 20


@pytest.fixture(scope="module")
def model() -> CogVLM2ForCausalLM:
    return random_model(tiny_video_config(vocab_size=264), 0)


def test_ten_captions_on_one_clip_and_clips_together_equal_each_alone(tmp_path, put, model) -> None:
    """The loss of a batch of trees is that of every answer alone, each with its own clip."""
    put(tmp_path, {name: f"{name}.mp4" for name in LENGTHS})
    texts = {"a": [f"text {n}" for n in range(10)], "b": ["b"], "c": ["a longer text", "c"]}
    lines(tmp_path / "set.jsonl", [
        {"video": f"{name}.mp4", "captions": [{"role": "caption", "content": text} for text in several]}
        for name, several in texts.items()
    ])  # fmt: skip
    encoder = find_token_file(str(make_tiny(tmp_path / "model", vision_experts=False))).encoder()
    examples = read(tmp_path / "set.jsonl")
    rows = TrainRows(examples, encoder, section(tmp_path), 8)
    assert [shape.images for shape in rows.shapes] == [2, 3, 5]
    assert [shape.answers for shape in rows.shapes] == [10, 1, 2]
    together = collate([rows.row(0, n) for n in range(3)], vision_experts=rows.vision_experts)
    assert together["pixel_values"].shape == (10, 3, 8, 8)
    assert together["routing"].num_vision == 0
    skipped = ("record_ids", "num_labels", "skipped")
    loss = model(**{key: value for key, value in together.items() if key not in skipped}).loss
    total, count = 0.0, 0
    for example, row in zip(examples, range(3), strict=True):
        pixels = torch.stack(rows.row(0, row).pixel_values)
        for talk in example.conversations:
            one = encoder.encode(talk.turns[0].question, answer=talk.turns[0].answer, images=len(example.images))
            alone = {"input_ids": torch.tensor([one.input_ids]), "token_type_ids": torch.tensor([one.token_type_ids]),
                     "labels": torch.tensor([one.labels])}  # fmt: skip
            labelled = sum(label != -100 for label in one.labels)
            total += model(**alone, pixel_values=pixels).loss.item() * labelled
            count += labelled
    assert count == together["num_labels"]
    assert abs(loss.item() - total / count) < 2e-6 * (1 + loss.item())


def test_check_and_preview(tmp_path, put, capsys, monkeypatch) -> None:
    folder = make_tiny(tmp_path / "model", vision_experts=False)
    put(tmp_path / "set", {"a": "a.mp4", "b": "b.mp4"})
    for name in "ab":
        (tmp_path / f"set/{name}.txt").write_text("a grey clip")
    shutil.copy(tmp_path / "set/a.mp4", tmp_path / "set/c.mp4")
    (tmp_path / "set/c.txt").write_text("another text")
    tokens = find_token_file(str(folder))
    found = check(section(tmp_path / "set"), 0, tokens)
    assert not found.errors
    assert found.counts["pictures"] == 3
    assert found.counts["frames"] == 7
    assert [finding.code for finding in found.warnings if "picture" in finding.code] == ["duplicate-picture"]
    monkeypatch.setenv("COGTUNE_LANG", "zh")
    assert main(["data", "check", str(tmp_path / "set"), "--model", str(folder)]) == 0
    said = capsys.readouterr().out
    assert "3 段视频，7 帧，3 个对话" in said
    assert "c.mp4：" in said
    assert "拉丁字母 100.0 %" in said
    monkeypatch.delenv("COGTUNE_LANG")
    examples = read(tmp_path / "set")
    rows = list(preview_rows(examples, section(tmp_path / "set"), tokens, 1))
    assert len(rows[0].images) == 2
    text = page(rows, title="t")
    assert text.count("<img") == 2
    assert "<figcaption>7</figcaption>" in text
    assert list(preview_rows(examples, section(tmp_path / "set"), tokens, 1, "b.mp4"))


def test_clips_of_high_dynamic_range_are_a_warning(tmp_path) -> None:
    folder = make_tiny(tmp_path / "model", vision_experts=False)
    options = {"x265-params": "log-level=none:pools=none"}
    for number, transfer in enumerate((16, 18, 1)):
        write_clip(
            tmp_path / "set" / "videos" / f"{number}.mp4", 8, codec="libx265", pixels="yuv420p10le", options=options,
            size=(64, 64), transfer=transfer,
        )  # fmt: skip
        (tmp_path / "set" / "labels").mkdir(exist_ok=True)
        (tmp_path / "set" / "labels" / f"{number}.txt").write_text("A thing moves.")
    report = check(section(tmp_path / "set"), 0, find_token_file(str(folder)))
    (found,) = [finding for finding in report.warnings if finding.code == "hdr-clips"]
    assert found.what.startswith("2 clips are HDR")
    assert "tonemap" in found.what
