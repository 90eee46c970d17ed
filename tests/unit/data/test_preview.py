"""``data preview`` shows exactly the rows that training builds; ``data convert`` keeps every question and answer."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from cogtune.cli.main import main
from cogtune.data.dataset import TrainRows
from cogtune.data.preview import RowPreview, preview_rows
from cogtune.data.sources import read_sources
from cogtune.errors import DataError
from cogtune.processing.processor import CogVLM2Processor
from cogtune.processing.token_file import find_token_file
from tests.support.data_folders import dialogue, section, write_folder, write_image, write_lines

FIXTURES = Path(__file__).parents[2] / "fixtures" / "formats"
RECORDS = {
    "a": [dialogue("Is it red?", "yes", "Why?", "It is 漂亮的."), dialogue("Is it blue?", "no")],
    "b": dialogue("q" * 90, "long", "What?", "A cat. <|end_of_text|>"),
}


def previews(root: Path, model: Path, **values: Any) -> list[RowPreview]:
    data = section(root, validation_share=0, **values)
    return list(preview_rows(read_sources(data)[0], data, find_token_file(str(model)), 9))


@pytest.mark.parametrize("values", [{}, {"max_input_len": 60}, {"max_output_len": 5, "long_answer": "truncate"}])
def test_rows_are_those_of_training(tmp_path: Path, tiny_checkpoint: Path, values: dict[str, Any]) -> None:
    root = write_folder(tmp_path / "set", RECORDS)
    shown = previews(root, tiny_checkpoint, **values)
    data = section(root, validation_share=0, **values)
    processor = CogVLM2Processor.from_pretrained(tiny_checkpoint)
    rows = TrainRows(read_sources(data)[0], processor.encoder, data, processor.image_size)
    assert len(shown) == len(rows)
    for number, row in enumerate(shown):
        trained = rows[0, number].row
        assert row.tokens == len(trained)
        assert row.trained == sum(label != -100 for label in trained.labels)
        assert [segment.parent for segment in row.segments] == trained.segment_parents
        for segment in row.segments:
            places = [at for at, of in enumerate(trained.segment_ids) if of == segment.number]
            assert sum(token.count for token in segment.tokens) == len(places)
            assert segment.trained == sum(trained.labels[at] != -100 for at in places)
            ids = [trained.input_ids[at] for at in places if not trained.token_type_ids[at]]
            text = "".join(token.text for token in segment.tokens)
            assert text == processor.tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def test_a_character_of_several_tokens_is_one_piece(tmp_path: Path, tiny_checkpoint: Path) -> None:
    (row, _) = previews(write_folder(tmp_path / "set", RECORDS), tiny_checkpoint)
    tokens = [token for segment in row.segments for token in segment.tokens]
    assert [(token.count, token.trained) for token in tokens if token.text == "漂"] == [(3, True)]
    assert sum(token.count for token in tokens if token.kind == "picture") == row.segments[0].tokens[1].count


def test_answers_left_out_are_counted(tmp_path: Path, tiny_checkpoint: Path) -> None:
    root = write_folder(tmp_path / "set", RECORDS)
    assert [row.dropped for row in previews(root, tiny_checkpoint, max_output_len=4)] == [1, 1]
    empty = previews(root, tiny_checkpoint, max_output_len=1)
    assert [(row.dropped, row.segments) for row in empty] == [(3, ()), (2, ())]


@pytest.mark.parametrize("record", ["set/b", "set/b#0", "b.jpg"])
def test_one_record_by_name(tmp_path: Path, tiny_checkpoint: Path, record: str) -> None:
    data = section(write_folder(tmp_path / "set", RECORDS))
    pictures, tokens = read_sources(data)[0], find_token_file(str(tiny_checkpoint))
    (row,) = preview_rows(pictures, data, tokens, 1, record)
    assert row.key == "set/b"
    with pytest.raises(DataError, match="nobody"):
        list(preview_rows(pictures, data, tokens, 1, "nobody"))


def test_command_prints_rows(tmp_path: Path, tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write_folder(tmp_path / "set", RECORDS)
    assert main(["data", "preview", str(root), "--model", str(tiny_checkpoint), "--count", "1"]) == 0
    printed = capsys.readouterr().out
    assert "set/a" in printed
    assert "set/b" not in printed
    assert "Question: Is it " in printed
    assert "yes<|end_of_text|>" in printed


def test_what_is_printed_into_a_pipe_has_no_width_and_no_talk_of_colours(
    tmp_path: Path, tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = "word " * 40
    root = write_folder(tmp_path / "set", {"a": [dialogue(f"{asked}{n}?", "yes") for n in range(5)]})
    assert main(["data", "preview", str(root), "--model", str(tiny_checkpoint)]) == 0
    printed = capsys.readouterr().out
    assert asked.strip() in printed
    assert not any(line.endswith("  ") for line in printed.splitlines())
    assert "violet" not in printed
    assert "from 5 places" in printed


def test_command_writes_one_page_that_needs_nothing_else(tmp_path: Path, tiny_checkpoint: Path) -> None:
    records = {**RECORDS, "c": dialogue("<script>alert(1)</script>", "a & b")}
    root, page = write_folder(tmp_path / "set", records), tmp_path / "preview.html"
    assert main(["data", "preview", str(root), "--model", str(tiny_checkpoint), "--html", str(page)]) == 0
    text = page.read_text(encoding="utf-8")
    assert not re.findall(r"(?:src|href)=\"(?!data:)|https?://|<script|@import|url\(", text)
    assert text.count("data:image/jpeg;base64,") == 3
    assert "&lt;" in text
    assert 'class="t special trained"' in text


def test_command_needs_a_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write_folder(tmp_path / "set", RECORDS)
    assert main(["data", "preview", str(root)]) == 2
    assert "error[checkpoint-tokenizer]" in capsys.readouterr().err
    assert main(["data", "preview", str(root), "--count", "few"]) == 2
    assert "--count" in capsys.readouterr().err


# ---- convert


def contents(path: Path, **values: Any) -> list[tuple[bytes | None, list[list[tuple[str, str]]]]]:
    pictures = read_sources(section(path, **values))[0]
    found = [
        (
            next((image.read_bytes() for image in picture.images), None),
            [[(turn.question, turn.answer) for turn in c.turns] for c in picture.conversations],
        )
        for picture in pictures
    ]
    return sorted(found, key=lambda pair: pair[0] or b"")


@pytest.mark.parametrize("name", ["llava.json", "openai.jsonl", "captions_val2014.json", "vqa", "table.csv"])
@pytest.mark.parametrize("link", [False, True])
def test_converted_lines_hold_the_same(tmp_path: Path, name: str, link: bool) -> None:
    target, out = tmp_path / "set" / "new.jsonl", str(tmp_path / "out")
    flags = ["--data.extract_dir", out, *(["--link"] if link else [])]
    assert main(["data", "convert", str(FIXTURES / name), str(target), *flags]) == 0
    assert contents(target) == contents(FIXTURES / name, extract_dir=out)
    assert any(path.is_symlink() for path in target.parent.rglob("*")) == link


@pytest.mark.parametrize("name", ["captions_val2014.json", "vqa"])
def test_converted_folder_holds_the_same(tmp_path: Path, name: str) -> None:
    target = tmp_path / "set"
    assert main(["data", "convert", str(FIXTURES / name), str(target)]) == 0
    assert contents(target) == contents(FIXTURES / name)
    assert not list(tmp_path.glob(".*")), "nothing half-written is left"


def test_pictures_of_one_name_are_numbered(tmp_path: Path) -> None:
    lines = [{"image": f"{side}/1.{suffix}", **dialogue(side, "a")} for side, suffix in (("x", "png"), ("y", "jpg"))]
    for number, line in enumerate(lines):
        write_image(tmp_path / str(line["image"]), (number, 2, 3))
    path = write_lines(tmp_path / "set.jsonl", lines)
    assert main(["data", "convert", str(path), str(tmp_path / "new")]) == 0
    assert sorted(file.name for file in (tmp_path / "new" / "images").iterdir()) == ["1-2.jpg", "1.png"]
    assert contents(tmp_path / "new") == contents(path)


def test_pictures_below_the_target_stay_where_they_are(tmp_path: Path) -> None:
    write_image(tmp_path / "pictures" / "1.png")
    path = write_lines(tmp_path / "set.jsonl", [{"image": "pictures/1.png", **dialogue("q", "a")}])
    assert main(["data", "convert", str(path), str(tmp_path / "new.jsonl")]) == 0
    assert '"image": "pictures/1.png"' in (tmp_path / "new.jsonl").read_text()
    assert not (tmp_path / "new-images").exists()


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["llava.json", "folder"], "convert-text-only"),
        (["llava.json", "there.jsonl"], "convert-target"),
        (["llava.json"], "config-missing"),
        (["llava.json", "new.jsonl", "--data.image_root", "nowhere"], "image-root"),
        (["gone.json", "new.jsonl"], "data-no-such-path"),
    ],
)
def test_what_cannot_be_converted(
    tmp_path: Path, arguments: list[str], code: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "there.jsonl").write_text("")
    source, *rest = arguments
    placed = [str(tmp_path / word) if not word.startswith("--") else word for word in rest]
    assert main(["data", "convert", str(FIXTURES / source), *placed]) == 2
    assert f"error[{code}]" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["there.jsonl"]
