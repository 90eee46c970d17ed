"""What is read from folders and JSON lines: matching, keys, ids, groups, weights, fingerprint."""

from __future__ import annotations

import json
import shutil
import unicodedata
from pathlib import Path

import pytest
from PIL import Image

from cogtune.data.records import Turn, iter_questions
from cogtune.data.sources import read_sources
from tests.support.data_folders import dialogue, section, write_folder, write_image, write_label, write_lines


def test_folder_pictures_come_in_order_of_their_names(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "set", {"b": dialogue("q", "a"), "a": dialogue("q1", "a1", "q2", "a2")})
    pictures, report = read_sources(section(root))
    assert [picture.key for picture in pictures] == ["set/a", "set/b"]
    conversation = pictures[0].conversations[0]
    assert conversation.id == "set/a#0"
    assert conversation.turns == (Turn("q1", "a1"), Turn("q2", "a2"))
    assert pictures[0].images == (root / "images" / "a.jpg",)
    assert (report.pictures, report.conversations, report.turns) == (2, 2, 3)
    assert json.loads(json.dumps(report.to_dict()))["sources"][0]["labels"] == "labels"


@pytest.mark.parametrize("suffix", [".jpg", ".JPG", ".jpeg", ".png", ".PNG", ".bmp", ".gif", ".webp", ".tiff", ".ppm"])
def test_any_format_and_case_of_suffix(tmp_path: Path, suffix: str) -> None:
    pictures, _ = read_sources(section(write_folder(tmp_path / "set", {"x": dialogue("q", "a")}, suffix=suffix)))
    assert [picture.key for picture in pictures] == ["set/x"]


def test_odd_names_match_by_stem(tmp_path: Path) -> None:
    stems = ["a.b.c", "two words", "图片 一", "0001"]
    root = write_folder(tmp_path / "数据", {stem: dialogue("问题", "答案") for stem in stems})
    pictures, _ = read_sources(section(root))
    assert sorted(picture.key for picture in pictures) == sorted(f"数据/{stem}" for stem in stems)


def test_decomposed_accents_match_composed_ones(tmp_path: Path) -> None:
    write_image(tmp_path / "set" / "images" / (unicodedata.normalize("NFD", "é") + ".png"))
    write_label(tmp_path / "set" / "labels" / "é.json", dialogue("q", "a"))
    pictures, _ = read_sources(section(tmp_path / "set"))
    assert pictures[0].key == "set/é"


def test_litter_of_file_managers_is_no_data(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "set", {"a": dialogue("q", "a")})
    for name in ("images/.DS_Store", "images/Thumbs.db", "labels/._a.json"):
        (root / name).write_bytes(b"litter")
    assert len(read_sources(section(root))[0]) == 1


def test_label_file_with_several_conversations(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "set", {"a": [dialogue("q", "a"), dialogue("p", "b"), {"captions": [
        {"role": "caption", "content": "one"}, {"role": "caption", "content": "two"}]}]})  # fmt: skip
    pictures, _ = read_sources(section(root, caption_question="What is there?"))
    conversations = pictures[0].conversations
    assert [conversation.id for conversation in conversations] == [f"set/a#{k}" for k in range(4)]
    assert conversations[2].turns == (Turn("What is there?", "one"),)
    assert conversations[3].turns == (Turn("What is there?", "two"),)


def test_byte_order_mark_and_trailing_commas(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "set", {"a": dialogue("q", "a"), "b": dialogue("q", "a")})
    (root / "labels" / "a.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(dialogue("fran\u00e7ais", "a")).encode())
    sloppy = '{"conversations": [{"role": "user", "content": "a,]"}, {"role": "assistant", "content": "b\\",}",},],}'
    (root / "labels" / "b.json").write_text(sloppy)
    pictures, report = read_sources(section(root))
    assert pictures[0].conversations[0].turns[0].question == "français"
    assert pictures[1].conversations[0].turns == (Turn("a,]", 'b",}'),)
    assert report.repaired == {"trailing-comma": 1}


def test_label_folder_by_option(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "set", {"a": dialogue("q", "english")}, labels="labels_en")
    assert read_sources(section(root))[1].sources[0].labels == "labels_en"
    write_label(root / "labels_zh" / "a.json", dialogue("问", "中文"))
    pictures, report = read_sources(section(root, labels="labels_zh"))
    assert pictures[0].conversations[0].turns[0].answer == "中文"
    assert report.sources[0].labels == "labels_zh"


def test_published_layout_three_folders_with_the_same_names(tmp_path: Path) -> None:
    """The published set unpacks to three folders that all number their pictures from 00000001."""
    names = ["llava_details-minigpt4_3500_formate", "llava_instruction_multi_conversations_formate",
             "llava_instruction_single_conversation_formate"]  # fmt: skip
    captions = {"captions": [{"role": "caption", "content": "a picture"}]}
    for name, record in zip(names, [captions, dialogue("q", "a", "q2", "a2"), dialogue("q", "a")], strict=True):
        write_folder(tmp_path / name, {"00000001": record, "00000002": record}, labels="labels_en")
    pictures, report = read_sources(section(*(tmp_path / name for name in names)))
    assert [picture.key for picture in pictures] == [f"{name}/0000000{n}" for name in names for n in (1, 2)]
    ids = [question.id for question in iter_questions(pictures)]
    assert len(set(ids)) == 6
    assert report.pictures == 6


def test_folders_with_the_same_name_take_more_of_their_path(tmp_path: Path) -> None:
    roots = [write_folder(tmp_path / side / "train", {"1": dialogue("q", "a")}) for side in ("x", "y")]
    pictures, _ = read_sources(section(*roots))
    assert [picture.key for picture in pictures] == ["x/train/1", "y/train/1"]


def test_keys_do_not_depend_on_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_folder(tmp_path / "set", {"1": dialogue("q", "a")})
    monkeypatch.chdir(root)
    keys = {path: read_sources(section(path))[0][0].key for path in (".", "../set", str(root))}
    assert set(keys.values()) == {"set/1"}


def test_jsonl_groups_lines_about_one_picture(tmp_path: Path) -> None:
    write_image(tmp_path / "set" / "pics" / "cat.png")
    path = write_lines(tmp_path / "set" / "train.jsonl", [
        {"image": "pics/cat.png", "id": "first", **dialogue("q", "a")},
        {"image": None, **dialogue("text", "only")},
        {"image": str(tmp_path / "set" / "pics" / "cat.png"), **dialogue("p", "b")},
        {"image": "./pics/cat.png", "id": 7, **dialogue("r", "c")},
    ])  # fmt: skip
    pictures, report = read_sources(section(path))
    assert [picture.key for picture in pictures] == ["set/pics/cat.png", "train.jsonl:2"]
    assert [c.id for c in pictures[0].conversations] == ["first", "train.jsonl:3", "7"]
    assert pictures[1].images == ()
    assert (report.pictures, report.conversations, report.text_only) == (1, 4, 1)


def test_folder_of_jsonl_files_reads_them_all(tmp_path: Path) -> None:
    write_image(tmp_path / "set" / "1.png")
    for name in ("b", "a"):
        write_lines(tmp_path / "set" / f"{name}.jsonl", [{"image": "1.png", **dialogue(name, "a")}])
    pictures, _ = read_sources(section(tmp_path / "set"))
    assert [c.id for c in pictures[0].conversations] == ["a.jsonl:1", "b.jsonl:1"]


def test_jsonl_files_of_one_name_are_told_apart(tmp_path: Path) -> None:
    paths = [write_lines(tmp_path / side / "t.jsonl", [{"image": None, **dialogue("q", "a")}]) for side in ("x", "y")]
    pictures, _ = read_sources(section(*paths))
    assert [picture.conversations[0].id for picture in pictures] == ["x/t.jsonl:1", "y/t.jsonl:1"]


def test_jsonl_beside_label_folders_is_noted(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "set", {"a": dialogue("q", "a")})
    write_lines(root / "predictions.jsonl", [{"id": "x"}])
    _, report = read_sources(section(root))
    assert "predictions.jsonl" in report.notes[0]


def test_weights_belong_to_their_folder(tmp_path: Path) -> None:
    roots = [write_folder(tmp_path / name, {"1": dialogue("q", "a")}) for name in ("x", "y")]
    pictures, report = read_sources(section(roots[0], (roots[1], 2.5)))
    assert [picture.weight for picture in pictures] == [1.0, 2.5]
    assert [source.weight for source in report.sources] == [1.0, 2.5]


def test_fingerprint_follows_the_data_not_its_place(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "here" / "set", {"1": dialogue("q", "a"), "2": dialogue("q", "a")})
    fingerprint = read_sources(section(root))[1].fingerprint
    moved = shutil.copytree(root, tmp_path / "there" / "set")
    assert read_sources(section(moved))[1].fingerprint == fingerprint
    write_label(moved / "labels" / "2.json", dialogue("q", "b"))
    assert read_sources(section(moved))[1].fingerprint != fingerprint
    write_label(moved / "labels" / "2.json", dialogue("q", "a"))
    Image.effect_noise((24, 16), 99).convert("RGB").save(moved / "images" / "2.jpg")
    assert read_sources(section(moved))[1].fingerprint != fingerprint


def test_questions_come_with_the_turns_before_them(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "set", {"1": dialogue("q1", "a1", "q2", "a2")})
    questions = list(iter_questions(read_sources(section(root))[0]))
    assert [(q.id, q.turn, q.question, q.reference, q.history) for q in questions] == [
        ("set/1#0", 0, "q1", "a1", ()),
        ("set/1#0", 1, "q2", "a2", (("q1", "a1"),)),
    ]
