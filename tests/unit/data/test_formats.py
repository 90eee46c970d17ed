"""Other tools' formats, each from a small file written by hand after its specification."""

from __future__ import annotations

import builtins
import io
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from cogtune.data.records import Example
from cogtune.data.sources import read_sources
from cogtune.errors import DataError, SetupError
from tests.support.bad_data import BAD_CONVERSATIONS, BAD_FILES, LATE_SYSTEM, talk
from tests.support.data_folders import dialogue, section, write_image, write_lines

FIXTURES = Path(__file__).parents[2] / "fixtures" / "formats"


def read(path: Path, **values: Any) -> list[Example]:
    return read_sources(section(path, **values))[0]


def texts(pictures: list[Example]) -> list[tuple[str | None, list[tuple[str, str]]]]:
    """Per picture its file's name and every question with its answer."""
    return [
        (
            next((image.name for image in picture.images), None),
            [(turn.question, turn.answer) for c in picture.conversations for turn in c.turns],
        )
        for picture in pictures
    ]


def refused(path: Path, **values: Any) -> DataError:
    with pytest.raises(DataError) as caught:
        read(path, **values)
    assert caught.value.hint
    return caught.value


LLAVA = [
    ("bus.jpg", [
        ("What are the colors of the bus in the image?", "The bus in the image is white and red."),
        ("What feature can be seen on the back of the bus?", "The back of the bus features an advertisement."),
        ("Is it moving?", "No."),
    ]),
    (None, [("2 + 2?", "4.")]),
]  # fmt: skip
VQA = [(
    "COCO_val2014_000000262148.jpg",
    [("Where is he looking?", "down"), ("What are the people doing?", "watching")],
)]  # fmt: skip
CAPTION = "Describe this image in detail."


@pytest.mark.parametrize("form", ["auto", "llava"])
def test_llava(form: str) -> None:
    pictures = read(FIXTURES / "llava.json", format=form)
    assert texts(pictures) == LLAVA
    # its ids are repeated for every conversation on a picture
    assert [c.id for p in pictures for c in p.conversations] == [
        "llava.json:000000033471", "llava.json:000000033471#2", "llava.json:wcP4Ab"]  # fmt: skip
    assert pictures[0].conversations[1].source.endswith("llava.json, record 2")


@pytest.mark.parametrize("form", ["auto", "sharegpt"])
def test_sharegpt(form: str) -> None:
    pictures = read(FIXTURES / "sharegpt.json", format=form, system="prepend")
    assert texts(pictures) == [
        ("kite.png", [
            ("Who are they?", "They're Kane and Gretzka from Bayern Munich."),
            ("What are they doing?", "They are celebrating on the soccer field."),
        ]),
        ("bus.jpg", [("你是一个助手。\n请描述这张图片", "一辆公交车。")]),
    ]  # fmt: skip


def test_ms_swift() -> None:
    assert texts(read(FIXTURES / "swift.jsonl", system="prepend")) == [
        (None, [("浙江的省会在哪？", "浙江的省会在杭州。")]),
        ("cat.png", [("What is in the image?", "A cat.")]),
        ("bus.jpg", [("You are a helpful assistant.\nDescribe it.", "A bus.")]),
    ]


@pytest.mark.parametrize("form", ["auto", "openai"])
def test_openai_parts(tmp_path: Path, form: str) -> None:
    pictures = read(FIXTURES / "openai.jsonl", format=form, extract_dir=tmp_path)
    assert [turns for _, turns in texts(pictures)] == [
        [("What is in this image?", "A cat.")],
        [("And here?", "A bus.")],
    ]
    (embedded,) = pictures[0].images
    assert embedded.is_relative_to(tmp_path)
    assert embedded.read_bytes() == (FIXTURES / "pictures" / "cat.png").read_bytes()
    assert pictures[1].images == (FIXTURES / "pictures" / "bus.jpg",)
    before = embedded.stat().st_mtime_ns
    again = read(FIXTURES / "openai.jsonl", format=form, extract_dir=tmp_path)
    assert again == pictures
    assert embedded.stat().st_mtime_ns == before, "a picture that is there is not written again"


@pytest.mark.parametrize("form", ["auto", "coco"])
def test_coco_captions(form: str) -> None:
    pictures = read(FIXTURES / "captions_val2014.json", format=form)
    assert texts(pictures) == [
        ("bus.jpg", [(CAPTION, "A bus on a dirt road."), (CAPTION, "A red bus beside a tree.")]),
        ("cat.png", [(CAPTION, "A cat on a sofa.")]),
    ]
    assert all(len(c.turns) == 1 for p in pictures for c in p.conversations), "captions are independent"


@pytest.mark.parametrize("form", ["auto", "vqa"])
@pytest.mark.parametrize(
    "name", ["", "v2_OpenEnded_mscoco_val2014_questions.json", "v2_mscoco_val2014_annotations.json"]
)
def test_vqa(form: str, name: str) -> None:
    pictures = read(FIXTURES / "vqa" / name, format=form)
    assert texts(pictures) == VQA
    assert pictures[0].conversations[1].id.endswith("_questions.json:262148001")


@pytest.mark.parametrize("form", ["auto", "csv"])
def test_csv_with_a_byte_order_mark(form: str) -> None:
    pictures = read(FIXTURES / "table.csv", format=form)
    assert texts(pictures) == [
        ("bus.jpg", [("What is it, exactly?", "A bus."), ("Colour?", "White, and\nred.")]),
        (None, [("2 + 2?", "4.")]),
    ]
    # the answer of the row before takes two lines
    assert pictures[1].conversations[0].source.endswith("table.csv:5")


def test_one_file_of_records_is_counted_under_its_name() -> None:
    """`data check table.csv` said `.: csv`."""
    (source,) = read_sources(section(FIXTURES / "table.csv"))[1].sources
    assert source.path == str(FIXTURES / "table.csv")


def test_tsv_of_captions() -> None:
    assert texts(read(FIXTURES / "table.tsv")) == [("cat.png", [(CAPTION, "A cat, lying down.")])]


def test_own_records_in_a_json_list(tmp_path: Path) -> None:
    write_image(tmp_path / "a.png")
    path = tmp_path / "all.json"
    path.write_text(json.dumps([{"image": "a.png", "id": "x", **dialogue("q", "a")}]))
    assert [c.id for p in read(path) for c in p.conversations] == ["x"]


def test_a_folder_with_one_json_file_beside_its_pictures(tmp_path: Path) -> None:
    """As LLaVA data comes: images/ and one file."""
    write_image(tmp_path / "images" / "1.jpg")
    record = {"id": "1", "image": "images/1.jpg", "conversations": [
        {"from": "human", "value": "<image>\nq"}, {"from": "gpt", "value": "a"}]}  # fmt: skip
    (tmp_path / "train.json").write_text(json.dumps([record]))
    (tmp_path / "notes.csv").write_text("a,b\n1,2\n")
    pictures, report = read_sources(section(tmp_path))
    assert texts(pictures) == [("1.jpg", [("q", "a")])]
    assert "notes.csv" in report.notes[0]


def test_trailing_commas_of_a_foreign_file_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "llava.json"
    path.write_text(
        '[{"id": "1", "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"},],},]'
    )
    pictures, report = read_sources(section(path))
    assert len(pictures) == 1
    assert report.repaired == {"trailing-comma": 1}


# ---- tables of pyarrow


def table(rows: list[dict[str, Any]]) -> Any:
    pyarrow = pytest.importorskip("pyarrow")
    return pyarrow.Table.from_pylist(rows)


def picture_bytes(color: str = "red") -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (5, 4), color).save(stream, "PNG")
    return stream.getvalue()


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    pytest.importorskip("pyarrow")
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(table(rows), path)
    return path


def save_to_disk(folder: Path, rows: list[dict[str, Any]]) -> Path:
    """What ``Dataset.save_to_disk`` leaves, by its documentation: Arrow streams and a state that lists them."""
    pytest.importorskip("pyarrow")
    import pyarrow.ipc

    folder.mkdir(parents=True)
    whole = table(rows)
    with pyarrow.ipc.new_stream(str(folder / "data-00000-of-00001.arrow"), whole.schema) as writer:
        writer.write_table(whole)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}))
    (folder / "dataset_info.json").write_text("{}")
    return folder


EMBEDDED = [
    {"image": {"bytes": picture_bytes(), "path": "1.png"}, "question": "What colour?", "answer": "red"},
    {"image": {"bytes": picture_bytes(), "path": "1.png"}, "question": "What is it?", "answer": "A square."},
    {"image": None, "question": "2 + 2?", "answer": "4"},
]


def test_parquet_with_embedded_pictures(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "set.parquet", EMBEDDED)
    pictures = read(path, extract_dir=tmp_path / "out")
    assert [turns for _, turns in texts(pictures)] == [
        [("What colour?", "red"), ("What is it?", "A square.")],
        [("2 + 2?", "4")],
    ]
    assert [image.read_bytes() for image in pictures[0].images] == [picture_bytes()]


def test_parquet_with_referenced_pictures(tmp_path: Path) -> None:
    write_image(tmp_path / "pictures" / "1.png")
    path = write_parquet(tmp_path / "set.parquet", [{"image": "pictures/1.png", "caption": "A square."}])
    assert texts(read(path)) == [("1.png", [(CAPTION, "A square.")])]


def test_parquet_with_messages_and_a_list_of_images(tmp_path: Path) -> None:
    messages = [
        {"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "What is it?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A square."}]},
    ]
    plain = [{"role": "user", "content": "<image>What is it?"}, {"role": "assistant", "content": "A square."}]
    images = [{"bytes": picture_bytes(), "path": None}]
    path = write_parquet(tmp_path / "plain.parquet", [{"messages": plain, "images": images}])
    assert texts(read(path, extract_dir=tmp_path / "out"))[0][1] == [("What is it?", "A square.")]
    path = write_parquet(tmp_path / "parts.parquet", [{"messages": messages, "images": images}])
    assert texts(read(path, extract_dir=tmp_path / "out"))[0][1] == [("What is it?", "A square.")]


@pytest.mark.parametrize("form", ["auto", "hf"])
def test_saved_data_set(tmp_path: Path, form: str) -> None:
    folder = save_to_disk(tmp_path / "set", EMBEDDED)
    assert len(read(folder, format=form, extract_dir=tmp_path / "out")) == 2


@pytest.mark.parametrize("text", ["What colour?", "question"], ids=["a text", "a column's name"])
def test_damaged_texts_of_a_saved_data_set_are_refused(tmp_path: Path, text: str) -> None:
    """The file is whole, its texts are no UTF-8: pyarrow itself says so only when they become Python's."""
    folder = save_to_disk(tmp_path / "set", EMBEDDED)
    file = folder / "data-00000-of-00001.arrow"
    content = file.read_bytes()
    assert text.encode() in content
    file.write_bytes(content.replace(text.encode(), b"\x80" + text.encode()[1:]))
    with pytest.raises(DataError, match="data-00000-of-00001") as caught:
        read(folder)
    assert caught.value.code == "data-table"


@pytest.mark.parametrize("name", ["../secret.arrow", "/etc/passwd", "a\0b", "", 7, None])
def test_a_saved_data_set_names_only_files_of_its_own(tmp_path: Path, name: object) -> None:
    folder = save_to_disk(tmp_path / "set" / "train", EMBEDDED)
    shutil.copyfile(folder / "data-00000-of-00001.arrow", tmp_path / "set" / "secret.arrow")
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name}]}))
    error = refused(folder)
    assert error.code == "unsafe-name"
    assert "state.json" in error.message
    (tmp_path / "set" / "dataset_dict.json").write_text(json.dumps({"splits": [name]}))
    error = refused(tmp_path / "set")
    assert error.code == "unsafe-name"
    assert "dataset_dict.json" in error.message


@pytest.mark.parametrize("text", ["{", "[]", '{"splits": 7}', "{}"])
def test_a_broken_list_of_splits(tmp_path: Path, text: str) -> None:
    save_to_disk(tmp_path / "set" / "train", EMBEDDED)
    (tmp_path / "set" / "dataset_dict.json").write_text(text)
    assert refused(tmp_path / "set").code == "data-table"


def test_saved_splits(tmp_path: Path) -> None:
    for name in ("train", "test"):
        save_to_disk(tmp_path / "set" / name, [{"image": None, "question": name, "answer": "a"}])
    (tmp_path / "set" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    pictures, report = read_sources(section(tmp_path / "set"))
    assert pictures[0].conversations[0].turns[0].question == "train"
    assert "not test" in report.notes[0]
    assert read(tmp_path / "set", split="test")[0].conversations[0].turns[0].question == "test"
    error = refused(tmp_path / "set", split="dev")
    assert error.code == "data-split-choice"
    assert "train, test" in error.message


def test_repository_of_parquet_files(tmp_path: Path) -> None:
    for name in ("train-00000-of-00002", "train-00001-of-00002", "validation-00000-of-00001"):
        write_parquet(tmp_path / "set" / "data" / f"{name}.parquet", [{"image": None, "question": name, "answer": "a"}])
    questions = [p.conversations[0].turns[0].question for p in read(tmp_path / "set")]
    assert questions == ["train-00000-of-00002", "train-00001-of-00002"]


def test_parquet_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "set.parquet").write_bytes(b"PAR1")
    real = builtins.__import__

    def absent(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.partition(".")[0] == "pyarrow":
            raise ImportError("No module named 'pyarrow'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(SetupError, match="pyarrow") as caught:
        read(tmp_path / "set.parquet")
    assert "cogtune[data]" in str(caught.value.hint)


def test_damaged_parquet(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    (tmp_path / "set.parquet").write_bytes(b"PAR1 not really")
    assert refused(tmp_path / "set.parquet").code == "data-table"


# ---- where pictures may lie


def llava(image: Any) -> dict[str, Any]:
    return {"image": image, "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}


def test_image_root_by_option(tmp_path: Path) -> None:
    """The first root that has the picture; the folder of the file is no root then."""
    for place in ("one/a.png", "two/a.png", "two/b.png", "lists/c.png"):
        write_image(tmp_path / place)
    path = write_lines(tmp_path / "lists" / "set.jsonl", [llava("a.png"), llava("b.png")])
    roots = [tmp_path / "one", tmp_path / "two"]
    pictures = read(path, image_root=roots)
    assert [p.images for p in pictures] == [(tmp_path / "one" / "a.png",), (tmp_path / "two" / "b.png",)]
    assert [p.key for p in pictures] == ["lists/one/a.png", "lists/two/b.png"]
    write_lines(path, [llava("c.png")])
    assert refused(path, image_root=roots).code == "image-missing"


@pytest.mark.parametrize("image", ["../secret.png", "pictures/../../secret.png", "/etc/passwd"])
def test_pictures_outside_of_the_roots_are_refused(tmp_path: Path, image: str) -> None:
    write_image(tmp_path / "secret.png")
    path = write_lines(tmp_path / "set" / "set.jsonl", [llava(image)])
    error = refused(path)
    assert error.code == "image-outside"
    assert "data.image_root" in str(error.hint)
    assert image in error.message
    if image != "/etc/passwd":
        write_lines(path, [llava(str(tmp_path / "secret.png"))])
        assert read(path, image_root=tmp_path)[0].key == "set/secret.png"


def test_linked_folders_work(tmp_path: Path) -> None:
    write_image(tmp_path / "disk" / "pictures" / "1.png")
    write_lines(tmp_path / "disk" / "set.jsonl", [llava("pictures/1.png"), llava("./pictures/1.png")])
    os.symlink(tmp_path / "disk", tmp_path / "link")
    (pictures,) = read(tmp_path / "link" / "set.jsonl")
    assert len(pictures.conversations) == 2
    # an absolute path that goes through the real folder, and one that goes through the link
    for place in ("disk", "link"):
        write_lines(tmp_path / "disk" / "set.jsonl", [llava(str(tmp_path / place / "pictures" / "1.png"))])
        assert read(tmp_path / "link" / "set.jsonl")[0].key == "link/pictures/1.png"
    # a folder of pictures that is a link itself
    (tmp_path / "set").mkdir()
    os.symlink(tmp_path / "disk" / "pictures", tmp_path / "set" / "pictures")
    path = write_lines(tmp_path / "set" / "set.jsonl", [llava("pictures/1.png")])
    assert read(path)[0].key == "set/pictures/1.png"


def test_image_root_that_nothing_uses_is_refused(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "set.jsonl", [{"image": None, **dialogue("q", "a")}])
    assert refused(path, image_root=tmp_path).code == "image-root"
    assert refused(path, image_root=tmp_path / "nowhere").code == "image-root"


# ---- what is wrong with a record


@pytest.mark.parametrize(
    ("record", "code", "found"), [b[1:] for b in BAD_CONVERSATIONS], ids=[b[0] for b in BAD_CONVERSATIONS]
)
def test_bad_conversation(tmp_path: Path, record: Any, code: str, found: str) -> None:
    path = write_lines(tmp_path / "set.jsonl", [*(talk(f"q{n}", "a") for n in range(12)), record])
    error = refused(path, extract_dir=tmp_path / "out")
    assert (error.code, f"{path}:13" in error.message, found in error.message) == (code, True, True), error
    assert len(read(path, on_bad="skip", extract_dir=tmp_path / "out")) == 12


def test_a_late_system_message_is_refused_when_prepended(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "set.jsonl", [LATE_SYSTEM])
    assert refused(path, system="prepend").code == "data-turns"


@pytest.mark.parametrize(("name", "text", "code", "found"), [b[1:] for b in BAD_FILES], ids=[b[0] for b in BAD_FILES])
def test_bad_file(tmp_path: Path, name: str, text: str | bytes, code: str, found: str) -> None:
    path = tmp_path / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    error = refused(path)
    assert (error.code, name in error.message, found in error.message) == (code, True, True), error


@pytest.mark.parametrize(
    ("spoil", "code", "found"),
    [
        (lambda q, a: a["annotations"].pop(), "data-vqa-pair", "262148001"),
        (lambda q, a: q["questions"].pop(), "data-vqa-pair", "without a question"),
        (lambda q, a: q["questions"][0].pop("question"), "data-missing-key", "question"),
        (lambda q, a: a["annotations"][0].pop("multiple_choice_answer"), "data-missing-key", "multiple_choice_answer"),
        (lambda q, a: q["questions"][0].update(image_id=7), "image-missing", "000000000007"),
        (lambda q, a: q.pop("questions"), "data-wrong-root", "questions"),
    ],
)
def test_bad_vqa(tmp_path: Path, spoil: Callable[[Any, Any], Any], code: str, found: str) -> None:
    names = ["v2_OpenEnded_mscoco_val2014_questions.json", "v2_mscoco_val2014_annotations.json"]
    roots = [json.loads((FIXTURES / "vqa" / name).read_text()) for name in names]
    spoil(*roots)
    for name, root in zip(names, roots, strict=True):
        (tmp_path / name).write_text(json.dumps(root))
    error = refused(tmp_path, format="vqa", image_root=FIXTURES / "vqa")
    assert (error.code, found in error.message) == (code, True), error


@pytest.mark.parametrize(
    ("name", "form"), [("llava.json", "csv"), ("table.csv", "llava"), ("llava.json", "folder"), ("", "csv-like")]
)
def test_the_named_format_has_to_fit(tmp_path: Path, name: str, form: str) -> None:
    if not name:
        (tmp_path / "empty").mkdir()
        assert refused(tmp_path / "empty", format="csv").code == "data-format"
        return
    error = refused(FIXTURES / name, format=form)
    assert error.code == "data-format"
    assert form in error.message


@pytest.mark.parametrize("answers", [7, "red", {"answer": "red"}, [7], [{"answer": 7}], None])
def test_vqa_answers_of_another_type_are_no_references(tmp_path: Path, answers: Any) -> None:
    """The answer that is trained stands beside them; a number in their place ended in a TypeError."""
    shutil.copytree(FIXTURES / "vqa", tmp_path / "vqa")
    file = tmp_path / "vqa" / "v2_mscoco_val2014_annotations.json"
    root = json.loads(file.read_text())
    root["annotations"][0]["answers"] = answers
    file.write_text(json.dumps(root))
    turns = [turn for picture in read(tmp_path / "vqa") for c in picture.conversations for turn in c.turns]
    assert turns[0].references == ()
