"""Every kind of bad data: exit 2, a message that says what, where and what to do; skipped and counted by option."""

from __future__ import annotations

import io
import json
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from cogtune.data.sources import read_sources
from cogtune.errors import DataError
from tests.support.data_folders import dialogue, section, write_folder, write_image, write_label, write_lines

GOOD = dialogue("What is it?", "A cat.")


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content}


def refused(*paths: Any, **values: Any) -> DataError:
    with pytest.raises(DataError) as caught:
        read_sources(section(*paths, **values))
    error = caught.value
    assert error.exit_code == 2
    assert error.hint
    return error


def good_folder(tmp_path: Path, count: int = 20) -> Path:
    return write_folder(tmp_path / "set", {f"{n:03}": GOOD for n in range(count)})


# ---- folders that cannot be read at all


def nothing(root: Path) -> None:
    root.mkdir()


def no_labels(root: Path) -> None:
    write_image(root / "images" / "1.jpg")


def empty_images(root: Path) -> None:
    write_label(root / "labels" / "1.json", GOOD)
    (root / "images").mkdir()


def empty_labels(root: Path) -> None:
    no_labels(root)
    (root / "labels").mkdir()


def two_label_folders(root: Path) -> None:
    write_folder(root, {"1": GOOD}, labels="labels_en")
    write_label(root / "labels_zh" / "1.json", GOOD)


@pytest.mark.parametrize(
    ("make", "code", "found"),
    [
        (nothing, "data-no-images", "no folder images/"),
        (no_labels, "data-no-labels", "no label folder"),
        (empty_images, "data-no-images", "holds no picture"),
        (empty_labels, "data-no-labels", "holds no .json file"),
        (two_label_folders, "data-label-choice", "labels_en/ and labels_zh/"),
    ],
)
@pytest.mark.parametrize("on_bad", ["error", "skip"])
def test_unusable_folder(tmp_path: Path, make: Callable[[Path], None], code: str, found: str, on_bad: str) -> None:
    make(tmp_path / "set")
    error = refused(tmp_path / "set", on_bad=on_bad)
    assert error.code == code
    assert str(tmp_path / "set") in error.message
    assert found in error.message


def test_path_that_does_not_exist(tmp_path: Path) -> None:
    assert "no such file" in refused(tmp_path / "nowhere").message
    (tmp_path / "data.docx").write_text("a,b")
    assert ".jsonl" in refused(tmp_path / "data.docx").message


def test_chosen_label_folder_is_missing(tmp_path: Path) -> None:
    write_folder(tmp_path / "set", {"1": GOOD}, labels="labels_en")
    error = refused(tmp_path / "set", labels="labels_zh")
    assert "labels_zh/" in error.message
    assert "labels_en/" in error.message


def test_folder_named_twice(tmp_path: Path) -> None:
    root = good_folder(tmp_path, 1)
    assert "weight" in str(refused(root, root / ".." / "set").hint)


# ---- records: a label file's content, and what the message must name

BAD_RECORDS: list[tuple[str, Any, str, str]] = [
    ("number as root", 3, "data-wrong-root", "a number"),
    ("text as root", "text", "data-wrong-root", "a text"),
    ("null as root", None, "data-wrong-root", "null"),
    ("empty list", [], "data-no-records", "empty"),
    ("list of texts", ["a"], "data-wrong-root", "record 1"),
    ("neither key", {"messages": []}, "data-missing-key", "found: messages"),
    ("both keys", {**GOOD, "captions": []}, "data-missing-key", "both"),
    ("conversations no list", {"conversations": {}}, "data-wrong-root", "an object"),
    ("no message", {"conversations": []}, "data-turns", "empty"),
    ("message no object", {"conversations": ["hi"]}, "data-wrong-root", "message 1"),
    ("no role", {"conversations": [{"content": "x"}, assistant("y")]}, "data-missing-key", '"role"'),
    ("no content", {"conversations": [user("x"), {"role": "assistant"}]}, "data-missing-key", "message 2"),
    ("odd turns", dialogue("q", "a", "q2"), "data-turns", "3 messages"),
    ("assistant first", {"conversations": [assistant("a"), user("q")]}, "data-turns", "message 1"),
    ("user twice", {"conversations": [user("q"), user("q")]}, "data-turns", "message 2"),
    ("unknown role", {"conversations": [{"role": "human", "content": "q"}, assistant("a")]}, "data-role", '"human"'),
    ("list as role", {"conversations": [{"role": [], "content": "q"}, assistant("a")]}, "data-role", "[]"),
    ("caption by a user", {"captions": [user("q")]}, "data-role", '"caption"'),
    ("empty content", {"conversations": [user("q"), assistant("")]}, "data-content", "message 2 is empty"),
    ("blank content", {"conversations": [user(" \n"), assistant("a")]}, "data-content", "message 1 is empty"),
    ("number as content", {"conversations": [user("q"), assistant(7)]}, "data-content", "a number"),
    ("null as content", {"conversations": [user(None), assistant("a")]}, "data-content", "null"),
    ("list as content", {"conversations": [user(["q"]), assistant("a")]}, "data-content", "a list"),
]


@pytest.mark.parametrize(("record", "code", "found"), [r[1:] for r in BAD_RECORDS], ids=[r[0] for r in BAD_RECORDS])
def test_bad_record_in_a_label_file(tmp_path: Path, record: Any, code: str, found: str) -> None:
    root = good_folder(tmp_path)
    label = write_label(root / "labels" / "007.json", record)
    error = refused(root)
    assert (error.code, str(label) in error.message, found in error.message) == (code, True, True), error
    assert "on_bad" in str(error.hint)
    pictures, report = read_sources(section(root, on_bad="skip"))
    assert len(pictures) == 19
    assert report.bad == {code.removeprefix("data-"): 1}
    assert str(label) in report.bad_examples[0]


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (b"", "empty"),
        (b'{"conversations": [', "line 1"),
        (b"\xff\xfe{}", "UTF-8"),
        ("问题".encode("gbk"), "UTF-8"),
        (b"[" * 100_000, "JSON"),
        (b"1" * 10_000, "JSON"),
        (json.dumps(dialogue("\ud83d", "a")).encode(), "surrogate"),
    ],
    ids=["empty", "cut off", "utf-16", "gbk", "nested", "huge number", "half a surrogate pair"],
)
def test_label_that_is_no_json(tmp_path: Path, data: bytes, found: str) -> None:
    root = good_folder(tmp_path)
    (root / "labels" / "003.json").write_bytes(data)
    error = refused(root)
    assert "003.json" in error.message
    assert found in error.message


def test_one_bad_conversation_costs_only_itself(tmp_path: Path) -> None:
    root = good_folder(tmp_path)
    write_label(root / "labels" / "000.json", [GOOD, dialogue("q"), GOOD])
    assert "000.json, record 2" in refused(root).message
    pictures, report = read_sources(section(root, on_bad="skip"))
    assert [c.id for c in pictures[0].conversations] == ["set/000#0", "set/000#2"]
    assert report.bad == {"turns": 1}


# ---- pictures


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds no pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def encoded(form: str, cut: float = 1.0) -> bytes:
    stream = io.BytesIO()
    Image.effect_noise((64, 64), 80).convert("RGB").save(stream, form)
    data = stream.getvalue()
    return data[: int(len(data) * cut)]


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"", "image-empty"),
        (b"this is no picture", "image-unreadable"),
        (encoded("JPEG", 0.6), "image-truncated"),
        (encoded("PNG", 0.6), "image-truncated"),
        (encoded("GIF", 0.6), "image-truncated"),
        (encoded("BMP", 0.6), "image-truncated"),
        (encoded("TIFF", 0.6), "image-truncated"),
        (encoded("JPEG")[:20], "image-unreadable"),
        (png_header(60_000, 60_000), "image-too-large"),
    ],
    ids=["empty", "text", "jpeg", "png", "gif", "bmp", "tiff", "header cut", "bomb"],
)
def test_bad_picture(tmp_path: Path, data: bytes, code: str) -> None:
    root = good_folder(tmp_path)
    path = root / "images" / "005.jpg"
    path.write_bytes(data)
    error = refused(root)
    assert (error.code, str(path) in error.message) == (code, True), error
    pictures, report = read_sources(section(root, on_bad="skip"))
    assert len(pictures) == 19
    assert report.bad == {code.removeprefix("data-"): 1}


def test_truncated_webp_is_refused(tmp_path: Path) -> None:
    root = good_folder(tmp_path)
    (root / "images" / "005.jpg").write_bytes(encoded("WEBP", 0.6))
    assert "005.jpg" in refused(root).message


def test_pixel_limit_is_the_configured_one(tmp_path: Path) -> None:
    root = good_folder(tmp_path, 1)
    error = refused(root, max_pixels=383)
    assert "24 x 16" in error.message
    assert "383" in error.message
    assert len(read_sources(section(root, max_pixels=384))[0]) == 1
    before = Image.MAX_IMAGE_PIXELS
    read_sources(section(root, max_pixels=10**12))
    assert before == Image.MAX_IMAGE_PIXELS


def test_label_without_picture_and_the_reverse(tmp_path: Path) -> None:
    root = good_folder(tmp_path)
    (root / "images" / "004.jpg").unlink()
    (root / "labels" / "009.json").unlink()
    error = refused(root)
    assert error.code == "image-missing"
    assert "004.json" in error.message
    assert "and 1 more:" in error.message
    assert "label-missing" in error.message
    pictures, report = read_sources(section(root, on_bad="skip"))
    assert len(pictures) == 18
    assert report.bad == {"image-missing": 1, "label-missing": 1}


def test_two_pictures_with_one_stem(tmp_path: Path) -> None:
    root = good_folder(tmp_path)
    write_image(root / "images" / "002.png")
    error = refused(root)
    assert error.code == "data-same-stem"
    assert "002.png" in error.message
    assert "002.jpg" in error.message
    assert len(read_sources(section(root, on_bad="skip"))[0]) == 19


def test_folders_and_other_files_among_the_data(tmp_path: Path) -> None:
    root = good_folder(tmp_path)
    (root / "images" / "more").mkdir()
    (root / "labels" / "notes.txt").write_text("x")
    report = read_sources(section(root, on_bad="skip"))[1]
    assert report.bad == {"not-a-file": 1, "extra-file": 1}
    assert refused(root).code == "data-not-a-file"


# ---- JSON lines


@pytest.mark.parametrize(
    ("line", "code", "found"),
    [
        ({"image": "gone.png", **GOOD}, "image-missing", "gone.png"),
        (GOOD, "image-path", '"image"'),
        ({"image": 3, **GOOD}, "image-path", "3"),
        ({"image": "", **GOOD}, "image-path", "''"),
        ({"image": None}, "data-missing-key", "found: image"),
        ([GOOD], "data-wrong-root", "a list"),
        ({"image": None, "id": ["x"], **GOOD}, "data-id", "['x']"),
        ({"image": None, "id": "0", **GOOD}, "data-duplicate-id", ":1"),
    ],
)
def test_bad_line(tmp_path: Path, line: Any, code: str, found: str) -> None:
    path = tmp_path / "set.jsonl"
    write_lines(path, [*({"image": None, "id": n, **GOOD} for n in range(12)), line])
    error = refused(path)
    assert (error.code, f"{path}:13" in error.message, found in error.message) == (code, True, True), error
    pictures, report = read_sources(section(path, on_bad="skip"))
    assert len(pictures) == 12
    assert report.bad == {code.removeprefix("data-"): 1}


def test_bad_picture_of_several_lines_costs_all_of_them(tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(b"nothing")
    lines = [{"image": "bad.png", **GOOD}] * 2 + [{"image": None, **GOOD}] * 20
    path = write_lines(tmp_path / "set.jsonl", lines)
    assert "bad.png" in refused(path).message
    assert read_sources(section(path, on_bad="skip"))[1].bad == {"image-unreadable": 2}


def test_file_without_a_line(tmp_path: Path) -> None:
    path = tmp_path / "set.jsonl"
    path.write_text("\n\n")
    assert refused(path).code == "data-no-records"


# ---- the share that may be skipped


def test_more_than_the_allowed_share_is_an_error_with_counts_and_examples(tmp_path: Path) -> None:
    root = good_folder(tmp_path)
    for stem in ("001", "002", "003"):
        (root / "labels" / f"{stem}.json").write_text("{")
    error = refused(root, on_bad="skip")
    assert error.code == "data-bad-share"
    assert "3 of 20" in error.message
    assert "3 bad-json" in error.message
    assert "001.json" in error.message
    assert len(read_sources(section(root, on_bad="skip", max_bad_share=0.15))[0]) == 17


def test_nothing_left_is_an_error_at_any_share(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "set", {"1": dialogue("q")})
    assert refused(root, on_bad="skip", max_bad_share=1.0).code == "data-bad-share"
