"""Data that is unusual and still works: pictures of every kind, names of every kind, texts of every kind."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from cogtune.cli.main import main
from cogtune.data.check import check
from cogtune.data.dataset import TrainRows
from cogtune.data.preview_html import images_html
from cogtune.data.sources import read_sources
from cogtune.processing.image import preprocess, read_image
from cogtune.processing.processor import CogVLM2Processor
from cogtune.processing.token_file import find_token_file
from tests.support.data_folders import dialogue, section, write_folder, write_label, write_lines


def one_picture(root: Path, image: Image.Image, name: str = "1.png", **save: object) -> Path:
    write_label(root / "labels" / f"{Path(name).stem}.json", dialogue("q", "a"))
    (root / "images").mkdir(exist_ok=True)
    image.save(root / "images" / name, **save)
    return root


@pytest.mark.parametrize(
    ("mode", "name"),
    [("CMYK", "1.jpg"), ("P", "1.png"), ("I;16", "1.png"), ("RGBA", "1.png"), ("LA", "1.png"), ("1", "1.png")],
)
def test_every_kind_of_pixel_is_read(tmp_path: Path, mode: str, name: str) -> None:
    source = Image.new(mode, (9, 7), 1)
    pictures, report = read_sources(section(one_picture(tmp_path / "set", source, name)))
    assert report.bad == {}
    (image,) = pictures[0].images
    assert preprocess(read_image(image), 8).isfinite().all()


@pytest.mark.parametrize("suffix", ["gif", "png", "webp"])
def test_animations_are_counted(tmp_path: Path, suffix: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    root = one_picture(tmp_path / "set", frames[0], f"1.{suffix}", save_all=True, append_images=frames[1:])
    _, report = read_sources(section(root))
    assert report.animated == 1
    assert any("first frame" in line for line in report.lines())


def turned(root: Path, orientation: int, name: str) -> Path:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return one_picture(root, Image.new("RGB", (30, 20)), name, exif=exif)


@pytest.mark.parametrize("name", ["1.jpg", "1.png", "1.webp", "1.tiff"])
def test_orientations_are_counted(tmp_path: Path, name: str) -> None:
    _, report = read_sources(section(turned(tmp_path / "set", 6, name)))
    assert report.turned == 1
    assert any("EXIF" in line and "data.exif: apply" in line for line in report.lines())
    _, upright = read_sources(section(turned(tmp_path / "upright", 1, name)))
    assert upright.turned == 0


@pytest.mark.parametrize("orientation", range(2, 9))
def test_orientation_by_option_is_what_a_viewer_shows(tmp_path: Path, orientation: int) -> None:
    """Against the definition: where the upright picture's corner lies in the stored one."""
    corner = {2: (29, 0), 3: (29, 19), 4: (0, 19), 5: (0, 0), 6: (0, 19), 7: (29, 19), 8: (29, 0)}[orientation]
    stored = Image.new("RGB", (30, 20))
    stored.putpixel(corner, (255, 255, 255))
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "1.png"
    stored.save(path, exif=exif)
    seen = read_image(path, exif="apply")
    assert seen.size == ((20, 30) if orientation >= 5 else (30, 20))
    assert seen.getpixel((0, 0)) == (255, 255, 255)
    assert read_image(path).tobytes() == stored.tobytes()


def test_training_rows_follow_the_option(tmp_path: Path, tiny_checkpoint: Path) -> None:
    root = turned(tmp_path / "set", 3, "1.png")
    stored = Image.effect_noise((30, 20), 90).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 3
    stored.save(root / "images" / "1.png", exif=exif)
    processor = CogVLM2Processor.from_pretrained(tiny_checkpoint)
    for choice, expected in {"ignore": stored, "apply": stored.transpose(Image.Transpose.ROTATE_180)}.items():
        data = section(root, exif=choice)
        rows = TrainRows(read_sources(data)[0], processor.encoder, data, processor.image_size)
        (pixels,) = rows[0, 0].pixel_values
        assert pixels.equal(preprocess(expected, processor.image_size))


def test_names_with_spaces_chinese_and_dots(tmp_path: Path) -> None:
    stems = ["a.b.c", "two words", "图片 一.二", "emoji 🚌"]
    folder = write_folder(tmp_path / "数据 集", {stem: dialogue("问题", "答案") for stem in stems})
    lines = [{"image": f"images/{stem}.jpg", **dialogue("问题", "答案")} for stem in stems]
    path = write_lines(folder / "全部.jsonl", lines)
    assert len(read_sources(section(folder))[0]) == len(read_sources(section(path))[0]) == 4


def test_texts_that_spell_special_tokens_are_kept_counted_and_said(tmp_path: Path) -> None:
    records = {"1": dialogue("What is <|end_of_text|>?", "A token."), "2": dialogue("q <|x|>", "<| not one |>")}
    pictures, report = read_sources(section(write_folder(tmp_path / "set", records)))
    assert report.special == 1
    assert pictures[0].conversations[0].turns[0].question == "What is <|end_of_text|>?"
    assert any(line.startswith("warning: 1 conversations spell special tokens") for line in report.lines())


def photos(root: Path, count: int, turned_ones: int) -> Path:
    """Pictures, the first of them with the orientation of a phone held upright."""
    exif = Image.Exif()
    exif[0x0112] = 6
    for number in range(count):
        more = {"exif": exif} if number < turned_ones else {}
        one_picture(root, Image.new("RGB", (30, 20), (number, 9, 9)), f"{number}.jpg", **more)
    return root


def test_turning_is_proposed_where_more_than_one_in_a_hundred_is_turned(tmp_path: Path) -> None:
    few, many = photos(tmp_path / "few", 100, 1), photos(tmp_path / "many", 100, 2)
    tokens = find_token_file(None)

    def proposed(root: Path, **values: str) -> list[str]:
        found = check(section(root, **values), 0, tokens).warnings
        return [finding.what for finding in found if finding.code == "turned-pictures"]

    assert proposed(few) == []
    (what,) = proposed(many)
    assert what.startswith("2 of 100 pictures")
    assert "data.exif apply" in what
    assert proposed(many, exif="apply") == []


def test_init_proposes_it_with_the_reason(tmp_path: Path) -> None:
    for root, proposed in ((photos(tmp_path / "a", 20, 1), True), (photos(tmp_path / "b", 20, 0), False)):
        assert main(["init", str(root), "--output", str(root / "run.yaml"), "--card", "24GiB"]) == 0
        text = (root / "run.yaml").read_text()
        assert ("# 1 of 20 pictures are stored turned or mirrored" in text) == proposed
        assert ("exif: apply" in text) == proposed


@pytest.mark.parametrize(
    ("exif", "note"), [("ignore", "data.exif apply would turn it"), ("apply", "turned as its EXIF says")]
)
def test_the_preview_marks_a_turned_picture(tmp_path: Path, exif: str, note: str) -> None:
    root = photos(tmp_path / "set", 2, 1)
    first, second = sorted((root / "images").iterdir())
    assert '<span class="turned">' in images_html((first,), exif)
    assert note in images_html((first,), exif)
    assert "turned" not in images_html((second,), exif)
