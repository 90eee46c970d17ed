"""The split: seeded, stable, the same everywhere, and never a picture on both sides."""

from __future__ import annotations

from pathlib import Path

import pytest

from cogtune.data.records import Conversation, Example, Turn
from cogtune.data.split import read_and_split, split
from cogtune.errors import DataError
from tests.support.data_folders import dialogue, section, write_folder, write_image, write_lines


def picture(number: int, folder: str = "set") -> Example:
    image = Path(f"/data/{folder}/images/{number}.jpg")
    talk = Conversation(f"{folder}/{number}#0", (Turn("q", "a"),), "here")
    return Example(f"{folder}/{number}", (image,), (talk,), 1.0, f"{folder}/{number}")


PICTURES = [picture(number) for number in range(4000)]


def keys(pictures: list[Example]) -> set[str]:
    return {item.key for item in pictures}


def test_share_and_seed() -> None:
    train, validation = split(PICTURES, 0.05, seed=0)
    assert len(train) + len(validation) == 4000
    assert 160 <= len(validation) <= 240  # three standard deviations of a binomial draw
    assert not keys(train) & keys(validation)
    assert keys(split(PICTURES, 0.05, seed=0)[1]) == keys(validation)
    assert keys(split(PICTURES, 0.05, seed=1)[1]) != keys(validation)


def test_the_draw_is_the_same_in_every_version() -> None:
    assert sorted(keys(split(PICTURES[:60], 0.1, seed=7)[1])) == ["set/2", "set/23", "set/34", "set/35", "set/45"]


def test_adding_pictures_and_folders_moves_nothing() -> None:
    half = keys(split(PICTURES[::2], 0.05, seed=0)[1])
    everything = keys(split([*(picture(n, "other") for n in range(100)), *PICTURES], 0.05, seed=0)[1])
    assert half == everything & keys(PICTURES[::2])


def test_a_larger_share_keeps_the_smaller_one() -> None:
    assert keys(split(PICTURES, 0.05, seed=0)[1]) <= keys(split(PICTURES, 0.2, seed=0)[1])


def test_no_share_is_no_validation() -> None:
    train, validation = split(PICTURES, 0, seed=0)
    assert (len(train), validation) == (4000, [])


def test_one_file_named_by_two_sources_goes_one_way(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "set", {f"{n}": dialogue("q", "a") for n in range(60)})
    lines = [{"image": f"images/{n}.jpg", **dialogue("p", "b")} for n in range(60)]
    path = write_lines(root / "more.jsonl", lines)
    result = read_and_split(section(root, path, validation_share=0.5), seed=0)
    sides = [{p.images for p in side} for side in (result.train, result.validation)]
    assert not sides[0] & sides[1]
    assert sum(len(p.conversations) for p in result.train + result.validation) == 120


def test_equal_texts_go_one_way(tmp_path: Path) -> None:
    lines = [{"image": None, **dialogue(f"q{n % 30}", "a")} for n in range(90)]
    result = read_and_split(section(write_lines(tmp_path / "t.jsonl", lines), validation_share=0.5), seed=0)
    sides = [{p.conversations[0].turns for p in side} for side in (result.train, result.validation)]
    assert sides[0]
    assert sides[1]
    assert not sides[0] & sides[1]


def test_split_keys_do_not_change_when_a_folder_of_the_same_name_joins(tmp_path: Path) -> None:
    roots = [
        write_folder(tmp_path / side / "set", {f"{n}": dialogue(f"{side}{n}", "a") for n in range(40)})
        for side in ("x", "y")
    ]
    alone = read_and_split(section(roots[0], validation_share=0.3), seed=0)
    both = read_and_split(section(*roots, validation_share=0.3), seed=0)
    images = {p.images for p in alone.validation}
    assert images == {p.images for p in both.validation if p.images and p.images[0].is_relative_to(roots[0])}


def test_own_validation_folders(tmp_path: Path) -> None:
    train = write_folder(tmp_path / "train", {"1": dialogue("q", "a")})
    held_out = write_folder(tmp_path / "val", {"1": dialogue("q", "a"), "2": dialogue("q", "a")})
    result = read_and_split(section(train, validation=[held_out]), seed=0)
    assert (len(result.train), len(result.validation)) == (1, 2)
    assert result.to_dict()["validation_pictures"] == 2


def test_a_picture_in_both_is_refused(tmp_path: Path) -> None:
    train = write_folder(tmp_path / "train", {"1": dialogue("q", "a")})
    path = write_lines(tmp_path / "val.jsonl", [{"image": "train/images/1.jpg", **dialogue("q", "a")}])
    with pytest.raises(DataError, match="validation has the picture") as caught:
        read_and_split(section(train, validation=[path]), seed=0)
    assert caught.value.code == "data-overlap"


def test_tiny_set_without_validation_is_noted(tmp_path: Path) -> None:
    write_image(tmp_path / "set" / "images" / "1.jpg")
    root = write_folder(tmp_path / "set", {"1": dialogue("q", "a")})
    result = read_and_split(section(root), seed=0)
    assert result.validation == []
    assert "validation is empty" in result.report.notes[0]


def test_nothing_to_train_on_is_refused(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "set", {"1": dialogue("q", "a")})
    with pytest.raises(DataError, match="none to train on"):
        read_and_split(section(root, validation_share=0.999999), seed=0)


def test_a_share_far_from_what_was_asked_is_noted(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "set", {f"{n}": dialogue("q", "a") for n in range(16)})
    noted, far = set(), set()
    for seed in range(60):
        result = read_and_split(section(root, validation_share=0.2), seed=seed)
        if any("another train.seed" in note for note in result.report.notes):
            noted.add(seed)
            assert f"validation has {len(result.validation)} of 16" in result.report.notes[-1]
        if abs(len(result.validation) - 3.2) > 3.2 and result.validation:  # two standard deviations of 16 draws
            far.add(seed)
    assert noted == far
    assert 0 < len(noted) < 12
