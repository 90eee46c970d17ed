"""Boxes of data sets: what their numbers are, checked, and moved into the picture that the model sees."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from cogtune.checkpoint.random import make_tiny
from cogtune.configuration.input_sections import SourceSection
from cogtune.data.boxes import box_text, find_boxes
from cogtune.data.check import check
from cogtune.data.convert import write
from cogtune.data.grounding import thousandths, turned_box
from cogtune.data.preview import preview_rows
from cogtune.data.preview_html import page
from cogtune.data.records import iter_questions
from cogtune.data.sources import read_sources
from cogtune.errors import DataError
from cogtune.processing.image import read_image
from cogtune.processing.token_file import find_token_file
from tests.support.data_folders import section, write_lines

WIDTH, HEIGHT = 40, 20


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    for number in range(4):
        Image.new("RGB", (WIDTH, HEIGHT), (60 * number, 90, 120)).save(tmp_path / f"{number}.png")
    return tmp_path


def answers(file: Path, **keys: Any) -> list[str | None]:
    return [asked.reference for asked in iter_questions(read_sources(section(file, **keys))[0])]


def rows(folder: Path, *boxes: Any, key: str = "bbox", **more: Any) -> Path:
    """One record for each box, each with its own picture."""
    lines = [
        {"image": f"{number % 4}.png", "expression": f"the thing {number}", key: box} | more
        for number, box in enumerate(boxes)
    ]
    return write_lines(folder / "refs.jsonl", lines)


def test_a_referring_expression_becomes_the_published_question_and_answer(pictures: Path) -> None:
    file = rows(pictures, [4.5, 2, 20, 10], [30, 5, 40, 20], [1, 1, 2, 2])
    examples, report = read_sources(section(file))
    asked = list(iter_questions(examples))
    assert asked[0].question == (
        "Can you point out the thing 0 in the image and provide the bounding boxes of its location?"
    )
    assert [one.reference for one in asked] == ["[[112,100,500,500]]", "[[750,250,999,999]]", "[[025,050,050,100]]"]
    assert report.boxes == 3
    assert any("3 boxes, read as pixels (x0, y0, x1, y1)" in line for line in report.notes)
    own = section(file, box_question="Where is {expression}?")
    assert next(iter_questions(read_sources(own)[0])).question == "Where is the thing 0?"


@pytest.mark.parametrize(
    ("boxes", "said", "first"),
    [
        ([[30.5, 2, 9, 10], [1, 1, 30, 2]], "pixels (x, y, width, height)", "[[762,100,988,600]]"),
        ([[30, 2, 39, 10.5], [20, 10, 35, 18]], "pixels (x0, y0, x1, y1)", "[[750,100,975,525]]"),
        ([[0.5, 0.1, 0.75, 0.6], [0.9, 0.9, 1, 1]], "fractions of the picture (x0, y0, x1, y1)", "[[500,100,750,600]]"),
        ([[500, 100, 750, 600], [900, 900, 990, 999]], "thousandths (x0, y0, x1, y1)", "[[500,100,750,600]]"),
    ],
    ids=["coco", "corners", "fractions", "thousandths"],
)
def test_what_the_numbers_are_is_found_and_said(pictures: Path, boxes: Any, said: str, first: str) -> None:
    examples, report = read_sources(section(rows(pictures, *boxes)))
    assert next(iter_questions(examples)).reference == first
    assert any(said in line for line in report.notes)


@pytest.mark.parametrize(
    ("boxes", "more", "keys"),
    [
        ([[4, 2, 20, 10]], {}, {}),  # as well a size
        ([[12, 5, 30, 20]], {}, {"box_form": "corners"}),  # as well thousandths
    ],
)
def test_what_cannot_be_told_is_asked_for(pictures: Path, boxes: Any, more: Any, keys: Any) -> None:
    file = rows(pictures, *boxes, **more)
    with pytest.raises(DataError, match="can be pixels") as caught:
        read_sources(section(file, **keys))
    assert caught.value.code == "data-box-unit"
    assert "data.box_form" in (caught.value.hint or "")
    assert answers(file, boxes="pixels", box_form="corners")[0] in ("[[100,100,500,500]]", "[[300,250,750,999]]")


def test_a_records_own_size_is_what_its_pixels_count_in(pictures: Path) -> None:
    """The picture was made smaller after it was annotated."""
    file = rows(pictures, [100, 50, 350, 150], [10, 10, 390, 190], width=400, height=200)
    assert answers(file)[0] == "[[250,250,875,750]]"


@pytest.mark.parametrize(
    ("box", "code", "said"),
    [
        ([20, 2, 4, 10], "data-box-inverted", "ends before it begins"),
        ([4, 2, 4, 10], "data-box-empty", "no area"),
        ([4, 2, 60, 10], "data-box-outside", "40 x 20 pixels"),
        ([-9, 2, 20, 10], "data-box-outside", "reaches out"),
        ([4, 2, 20], "data-box-form", "four numbers"),
        ([4, 2, 20, "x"], "data-box-form", "four numbers"),
        ([[4, 2, 20, 10], [1, 2]], "data-box-form", "four numbers"),
        ("[1, 2, 3", "data-box-form", "four numbers"),
        ([4, 2, 10**400, 10], "data-box-form", "four numbers"),
        ([4, 2, float("nan"), 10], "data-box-form", "four numbers"),
    ],
)
def test_a_box_that_is_none_is_named_and_counted(pictures: Path, box: Any, code: str, said: str) -> None:
    file = rows(pictures, [1, 1, 2, 2], box, [3, 3, 9, 9])
    keys: dict[str, Any] = {"boxes": "pixels", "box_form": "corners"}
    with pytest.raises(DataError, match=said) as caught:
        read_sources(section(file, **keys))
    assert caught.value.code == code
    assert "refs.jsonl:2" in caught.value.message
    examples, report = read_sources(section(file, on_bad="skip", max_bad_share=0.5, **keys))
    assert report.bad == {code.removeprefix("data-"): 1}
    assert (report.conversations, report.boxes, len(examples)) == (2, 2, 2)


def test_a_missing_picture_and_none_at_all(pictures: Path) -> None:
    for image, code in (("gone.png", "image-missing"), (None, "image-path")):
        line = {"image": image, "expression": "a dog", "bbox": [1, 1, 2, 2]}
        with pytest.raises(DataError) as caught:
            read_sources(section(write_lines(pictures / "lost.jsonl", [line])))
        assert caught.value.code.removeprefix("data-") == code


def test_layouts(pictures: Path) -> None:
    """RefCOCO's sentences, several boxes, a question as it stands, a table, records without a box to be asked."""
    lines = [
        {"file_name": "0.png", "sentences": [{"sent": "the left dog"}, {"raw": "a dog"}], "bbox": [30.5, 2, 9, 9]},
        {"image": "1.png", "question": "Where are the two?", "bboxes": [[30.5, 2, 9, 9], [0, 0, 4, 4]]},
    ]  # fmt: skip
    asked = list(iter_questions(read_sources(section(write_lines(pictures / "a.jsonl", lines)))[0]))
    assert [one.question.split(" in the")[0] for one in asked] == [
        "Can you point out the left dog", "Can you point out a dog", "Where are the two?",
    ]  # fmt: skip
    assert asked[2].reference == "[[762,100,988,550;000,000,100,200]]"
    (pictures / "t.csv").write_text('image,expression,bbox\n0.png,a dog,"[30.5, 2, 9, 9]"\n', encoding="utf-8")
    assert answers(pictures / "t.csv", box_form="size") == ["[[762,100,988,550]]"]
    open_ = write_lines(pictures / "o.jsonl", [{"image": "0.png", "expression": "a dog"}])
    (only,) = iter_questions(read_sources(SourceSection(path=[open_]), open_questions=True)[0])
    assert only.reference is None
    assert "point out a dog" in only.question


def test_a_box_beside_an_answer_stays_information(pictures: Path) -> None:
    line = {"image": "0.png", "question": "What is it?", "answer": "A dog.", "bbox": [1, 2, 3, 4]}
    examples, report = read_sources(section(write_lines(pictures / "q.jsonl", [line])))
    assert next(iter_questions(examples)).reference == "A dog."
    assert report.boxes == 0
    assert any("bbox" in note for note in report.notes)


def _talk(folder: Path, question: str, answer: str) -> Path:
    messages = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
    return write_lines(folder / "llava.jsonl", [{"image": "0.png", "conversations": messages}])


def test_boxes_in_texts_stay_thousandths_unless_a_unit_is_named(pictures: Path) -> None:
    file = _talk(pictures, "What is at [0.1, 0.2, 0.5, 0.9]?", "A dog at [0.25,0.5,1.0,1.0] and [1, 2].")
    assert answers(file) == ["A dog at [0.25,0.5,1.0,1.0] and [1, 2]."]
    examples, report = read_sources(section(file, boxes="fractions"))
    (asked,) = iter_questions(examples)
    assert asked.question == "What is at [[100,200,500,900]]?"
    assert asked.reference == "A dog at [[250,500,999,999]] and [1, 2]."
    assert report.boxes == 2
    file = _talk(pictures, "Where?", "[[10,5,20,15;0,0,40,20]]")
    assert answers(file) == ["[[10,5,20,15;0,0,40,20]]"]
    assert answers(file, boxes="pixels") == ["[[250,250,500,750;000,000,999,999]]"]


def test_texts_that_are_no_boxes_are_counted_or_with_a_unit_refused(pictures: Path) -> None:
    file = _talk(pictures, "The matrix?", "[[9,8,7,6]], or [[1,2],[3,4]], or [[1200,0,1300,5]]")
    _, report = read_sources(section(file))
    assert any("1 box-inverted" in line and "1 box-outside" in line for line in report.notes)
    with pytest.raises(DataError, match="ends before it begins"):
        read_sources(section(file, boxes="thousandths"))
    text_only = write_lines(pictures / "t.jsonl", [{"question": "The matrix?", "answer": "[[9,8,7,6]]"}])
    assert answers(text_only, boxes="thousandths") == ["[[9,8,7,6]]"]


def _turned(folder: Path, orientation: int) -> tuple[Path, np.ndarray[Any, Any]]:
    """A picture stored with an EXIF orientation, one bright square in it; and its pixels as stored."""
    pixels = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    pixels[4:8, 6:16] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(folder / "turned.png", exif=exif)
    return folder / "turned.png", pixels


@pytest.mark.parametrize("orientation", range(1, 9))
def test_boxes_turn_with_their_picture(tmp_path: Path, orientation: int) -> None:
    """Of each pair (box in the stored or in the turned picture, picture seen stored or turned) where it can be told."""
    path, pixels = _turned(tmp_path, orientation)
    with Image.open(path) as image:
        upright = np.asarray(ImageOps.exif_transpose(image))

    def corners(shown: np.ndarray[Any, Any]) -> list[float]:
        rows_, columns = np.nonzero(shown[..., 0])
        return [float(columns.min()), float(rows_.min()), columns.max() + 1.0, rows_.max() + 1.0]

    def fractions(shown: np.ndarray[Any, Any]) -> tuple[float, ...]:
        sides = (shown.shape[1], shown.shape[0]) * 2
        return tuple(value / side for value, side in zip(corners(shown), sides, strict=True))

    assert turned_box(fractions(pixels), orientation) == pytest.approx(fractions(upright))  # type: ignore[arg-type]
    told = orientation in (1, 5, 6, 7, 8)  # only a picture on its side shows which of the two a size means
    for exif in ("ignore", "apply"):
        seen = np.asarray(read_image(path, exif=exif))
        wanted = box_text([thousandths(fractions(seen))])  # type: ignore[arg-type]
        for written in (pixels, upright) if told else (seen,):
            size = {"width": written.shape[1], "height": written.shape[0]}
            line = {"image": "turned.png", "expression": "a square", "bbox": corners(written)}
            file = write_lines(tmp_path / "one.jsonl", [line | (size if told else {})])
            keys = {"boxes": "pixels", "box_form": "corners", "exif": exif}
            examples, report = read_sources(section(file, **keys))
            assert next(iter_questions(examples)).reference == wanted
            assert any("EXIF orientation, and no record says" in note for note in report.notes) != told


def test_thousandths_keep_an_area_and_three_digits() -> None:
    assert box_text([thousandths((0.1, 0.1, 0.1001, 1.0))]) == "[[100,100,101,999]]"
    assert box_text([thousandths((0.9999, 0.0, 1.0, 0.0001))]) == "[[998,000,999,001]]"
    assert find_boxes("[[012,345,678,999]]") == [(12, 345, 678, 999)]


def _drawn(html: str) -> np.ndarray[Any, Any]:
    import base64

    found = re.search(r"data:image/jpeg;base64,([^\"]+)", html)
    assert found is not None
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(found[1]))).convert("RGB")).astype(int)


def test_the_preview_draws_them(pictures: Path, tmp_path: Path) -> None:
    tokens = find_token_file(str(make_tiny(tmp_path / "model")))
    file = rows(pictures, [10.5, 5, 30, 15], [30, 5, 40, 19])
    data = section(file)
    shown = list(preview_rows(read_sources(data)[0], data, tokens, 1))
    assert shown[0].boxes == ((262, 250, 750, 750),)
    image = _drawn(page(shown, title="t"))
    side = image.shape[0]
    plain = image[2, 2]
    edge, inside = image[side // 4, side // 2], image[side // 2, side // 2]
    assert abs(edge - plain).sum() > 60
    assert abs(inside - plain).sum() < 20


def test_a_check_says_which_models_write_boxes(pictures: Path) -> None:
    file = rows(pictures, [10.5, 5, 30, 15], [30, 5, 40, 19])
    report = check(section(file, validation_share=0.0), 0, find_token_file(None))
    assert any("cogvlm-grounding" in finding.what for finding in report.warnings)
    named = check(section(file, validation_share=0.0), 0, find_token_file("THUDM/cogvlm-grounding-generalist-hf"))
    assert not any("cogvlm-grounding" in finding.what for finding in named.warnings)


def test_records_are_written_back_with_boxes_the_model_knows(pictures: Path, tmp_path: Path) -> None:
    file = rows(pictures, [10.5, 5, 30, 15], [30, 5, 40, 19])
    write(read_sources(section(file))[0], tmp_path / "out.jsonl")
    written = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert "[[262,250,750,750]]" in json.dumps(written[0])
