"""A picture whose damage only decoding shows: check samples or decodes all, and training skips what it may skip."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from cogtune.cli.main import main
from cogtune.configuration.run_config import DataSection
from cogtune.data.check import check
from cogtune.data.picture_headers import Decodes
from cogtune.demo.base import BASE
from cogtune.processing.token_file import find_token_file

COUNT = 6


def damaged() -> bytes:
    """A PNG whose header and end are right, and whose pixels are not."""
    stream = io.BytesIO()
    Image.effect_noise((100, 100), 80).convert("RGB").save(stream, "PNG")
    content = bytearray(stream.getvalue())
    content[9000:9050] = bytes(50)
    return bytes(content)


def write(folder: Path, bad: set[int], count: int = COUNT) -> Path:
    for name in ("images", "labels"):
        (folder / name).mkdir(parents=True)
    label = json.dumps({"conversations": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]})
    for number in range(count):
        picture = folder / "images" / f"{number:03}.png"
        if number in bad:
            picture.write_bytes(damaged())
        else:
            Image.new("RGB", (8, 8), (number, 0, 0)).save(picture)
        (folder / "labels" / f"{number:03}.json").write_text(label)
    return folder


def found(folder: Path, *, full: bool, **keys: Any) -> list[str]:
    report = check(DataSection(path=[folder], validation_share=0.0, **keys), 0, find_token_file(None), full=full)
    return [finding.where for finding in report.findings if finding.code == "image-truncated"]


def test_check_decodes_the_first_pictures(tmp_path: Path) -> None:
    folder = write(tmp_path / "d", {3})
    assert found(folder, full=False) == [str(folder / "images" / "003.png")]


def test_check_decodes_every_picture_if_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write(tmp_path / "d", {69, 70, 75}, count=80)
    assert found(folder, full=False) == []
    assert len(found(folder, full=True)) == 3
    assert main(["data", "check", str(folder)]) == 0
    assert "64 of 80 pictures were decoded; --full decodes all" in capsys.readouterr().out
    assert main(["data", "check", str(folder), "--full"]) == 2
    assert "pictures were decoded" not in capsys.readouterr().out


def test_the_first_and_a_share_are_chosen() -> None:
    some, every = Decodes(full=False), Decodes(full=True)
    chosen = [number for number in range(1000) if some()]
    assert chosen == [*range(64), *range(100, 1000, 50)]
    assert all(every() for _ in range(1000))
    assert (some.count, every.count) == (len(chosen), 1000)


def test_damage_is_a_bad_record_like_any_other(tmp_path: Path) -> None:
    folder = write(tmp_path / "d", {3})
    data = DataSection(path=[folder], validation_share=0.0, on_bad="skip", max_bad_share=0.1)
    report = check(data, 0, find_token_file(None), full=True)
    assert [finding.code for finding in report.errors] == ["data-bad-share"]
    report = check(data.model_copy(update={"max_bad_share": 0.5}), 0, find_token_file(None), full=True)
    assert report.ok
    assert report.counts["conversations"] == COUNT - 1


@pytest.mark.parametrize("cache", ["on", "off"])
@pytest.mark.parametrize("share", ["0.5", "0.1"])
@pytest.mark.parametrize("validation", ["0", "0.3"])
def test_training_skips_what_it_may_skip(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], cache: str, share: str, validation: str
) -> None:
    folder = write(tmp_path / "d", {3} if validation == "0" else {1, 3})
    flags = ("--train.max_steps", "8", "--train.batch_size", "2", "--data.workers", "0", "--train.save_steps", "4")
    skip = ("--data.on_bad", "skip", "--data.max_bad_share", share, "--data.validation_share", validation)
    places = ("--model", str(BASE), "--data", str(folder), "--output", str(tmp_path / "o"))
    cached = ("--data.cache_features", cache, "--data.cache_dir", str(tmp_path / "c"))
    code = main(["train", *places, *flags, *skip, *cached])
    captured = capsys.readouterr()
    said = captured.out + captured.err
    assert "003.png: the picture is incomplete or damaged" in said
    assert code == (0 if share == "0.5" else 2), said
    if share == "0.5":
        lines = [json.loads(line) for line in (tmp_path / "o" / "metrics.jsonl").read_text().splitlines()]
        assert all(line["loss"] == line["loss"] for line in lines if "loss" in line)
        assert said.count("003.png: the picture is incomplete") == (2 if cache == "on" else 1)
    else:
        assert "data-bad-share" in said


def test_training_ends_at_it_by_default(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write(tmp_path / "d", {3})
    places = ("--model", str(BASE), "--data", str(folder), "--output", str(tmp_path / "o"))
    assert (
        main(["train", *places, "--train.max_steps", "8", "--data.workers", "0", "--data.cache_features", "off"]) == 2
    )
    assert "error[image-truncated]" in capsys.readouterr().err
