"""Training from the feature cache is training with the tower, and nothing that happens to the cache changes that."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from cogtune.errors import CogtuneError, ConfigError, DataError, DiskFullError
from cogtune.features.store import FeatureCacheError
from cogtune.model.vision import VisionModel
from cogtune.system import files
from cogtune.train.run import train
from tests.support.training import make_config, write_data

STEPS = {"data__validation_share": 0.3, "train__max_steps": 8, "train__save_steps": 4}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    return write_data(folder / "pictures", 8, text_only=3)


class Run:
    """The same run, with the tower or from a cache of its own; counts the pictures that the tower saw."""

    def __init__(self, base: Path, data: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.base, self.data, self.folder, self.cache = base, data, folder, folder / "cache"
        self.seen = 0
        original = VisionModel.features

        def counted(model: VisionModel, pixels: torch.Tensor) -> torch.Tensor:
            self.seen += len(pixels)
            return original(model, pixels)

        monkeypatch.setattr(VisionModel, "features", counted)

    def __call__(self, name: str, cached: str = "on", **more: Any) -> dict[str, torch.Tensor]:
        self.seen = 0
        values = {**STEPS, "data__cache_dir": self.cache, "data__cache_features": cached, **more}
        sources = [self.data, self.data.with_suffix(".jsonl")]
        result = train(make_config(self.base, sources, self.folder / name, **values))
        assert result.adapter is not None
        return load_file(result.adapter / "adapter_model.safetensors")

    def files(self) -> list[Path]:
        return sorted(self.cache.glob("*/??/*"))


@pytest.fixture
def run(tiny_checkpoint: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    return Run(tiny_checkpoint, data, tmp_path, monkeypatch)


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_cached_training_is_live_training(run: Run, dtype: str) -> None:
    """Bit for bit, where the live tower sees one picture at a time as filling does; validation included."""
    live = run("live", "off", model__dtype=dtype)
    assert run.seen > 8
    cached = run("cached", model__dtype=dtype)
    assert run.seen == 4  # the eight files hold four different pictures
    assert same(live, cached)
    assert same(live, run("again", model__dtype=dtype))
    assert run.seen == 0


def test_float8_is_close_and_says_how_close(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    exact = run("exact")
    rounded = run("rounded", data__cache_dtype="float8")
    assert not same(exact, rounded)
    moved = sum(float((exact[name] - rounded[name]).norm() ** 2) for name in exact) ** 0.5
    assert moved < 0.05 * sum(float(value.norm() ** 2) for value in exact.values()) ** 0.5
    assert "error of the stored format" in capsys.readouterr().out


def test_auto_caches_what_is_used_more_than_once(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    run("many", "auto")
    assert run.files()
    shutil.rmtree(run.cache)
    capsys.readouterr()
    run("once", "auto", train__max_steps=1, data__validation_share=0)
    assert not run.files()
    assert "the tower runs in every step: it would run 1 times" in capsys.readouterr().out
    run("little", "auto", data__cache_budget="5kB")
    assert not run.files()
    assert "do not fit data.cache_budget 5kB" in capsys.readouterr().out


def test_only_pictures_that_the_run_shows_are_filled(run: Run) -> None:
    run("short", train__max_steps=1, data__validation_share=0, train__batch_size=2)
    assert run.seen <= 2


def test_what_trains_in_the_tower_is_never_cached(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        run("on", lora__targets=["experts", r".*vision\.transformer\.layers\.0\.mlp\.fc1"])
    assert caught.value.code == "cache-tower-trains"
    run("auto", "auto", lora__targets=["experts", "vision-tower"], train__max_steps=1)
    assert not run.files()
    assert "lora.targets train it" in capsys.readouterr().out


def test_a_budget_that_is_too_small_is_an_error_when_the_cache_was_asked_for(run: Run) -> None:
    with pytest.raises(ConfigError) as caught:
        run("on", data__cache_budget="5kB")
    assert caught.value.code == "cache-budget"
    assert "5.0 kB" in caught.value.message


def test_damaged_files_are_never_used_and_the_same_command_repairs_them(run: Run) -> None:
    """Torn and missing ones are found at the start, one of the right size when it is read."""
    whole = run("whole")
    torn, gone, flipped = run.files()[:3]
    torn.write_bytes(torn.read_bytes()[:-9])
    gone.unlink()
    content = bytearray(flipped.read_bytes())
    content[-1] ^= 1
    flipped.write_bytes(content)
    with pytest.raises(FeatureCacheError) as caught:
        run("damaged")
    assert caught.value.code == "cache-damaged"
    assert run.seen == 2
    assert not flipped.exists()
    assert same(whole, run("damaged"))
    assert run.seen == 1
    assert len({file.stat().st_size for file in run.files()}) == 1


def test_a_picture_that_changes_is_computed_anew(run: Run, data: Path, tmp_path: Path) -> None:
    shutil.copytree(data, tmp_path / "data")
    shutil.copy(data.with_suffix(".jsonl"), tmp_path / "data.jsonl")
    run("original")
    run.data = tmp_path / "data"
    run("copied")
    assert run.seen == 0, "the copy's pictures are known by their content"
    picture = run.data / "images" / "000.png"
    size = picture.stat().st_size
    Image.new("RGB", (12, 10), (220, 41, 40)).save(picture)
    assert picture.stat().st_size == size
    live = run("live", "off")
    assert same(live, run("after"))
    assert run.seen == 1


def test_a_full_disk_while_filling_loses_nothing(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run("whole", "off")
    original, written = files.write_file, 0

    def full(path: Path, content: bytes) -> None:
        nonlocal written
        if path.is_relative_to(run.cache) and len(content) > 1000:
            written += 1
            if written > 2:
                raise OSError(28, "No space left on device", str(path))
        original(path, content)

    monkeypatch.setattr(files, "write_file", full)
    with pytest.raises(DiskFullError) as caught:
        run("full")
    assert "feature cache" in caught.value.message
    assert len(run.files()) == 2
    assert not list(run.cache.rglob(".*"))
    monkeypatch.setattr(files, "write_file", original)
    assert same(whole, run("full"))
    assert run.seen == 2


def test_a_cache_that_may_only_be_read(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A complete one is used; what is missing cannot be computed."""
    whole, original = run("whole"), files.write_file

    def forbid(path: Path, content: bytes) -> None:
        if path.is_relative_to(run.cache):
            raise PermissionError(13, "Permission denied", str(path))
        original(path, content)

    monkeypatch.setattr(files, "write_file", forbid)
    assert same(whole, run("again"))
    run.files()[0].unlink()
    with pytest.raises(FeatureCacheError) as caught:
        run("on")
    assert caught.value.code == "cache-unwritable"
    assert "pictures are not in it" in caught.value.message
    assert same(whole, run("auto", "auto"))
    assert run.seen > 4
    assert "cannot be written (Permission denied)" in capsys.readouterr().out


def test_a_picture_that_cannot_be_decoded_is_found_while_filling(
    run: Run, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With ``data.on_bad: skip`` its features are left out, and another row is trained in its place."""
    run.data = Path(shutil.copytree(data, tmp_path / "data"))
    shutil.copy(data.with_suffix(".jsonl"), tmp_path / "data.jsonl")
    for name in ("001", "002"):
        picture = run.data / "images" / f"{name}.png"
        content = bytearray(picture.read_bytes())
        start = content.index(b"IDAT") + 6
        content[start : start + 4] = b"\xff\xff\xff\xff"
        picture.write_bytes(content)
    with pytest.raises(DataError) as caught:
        run("bad")
    assert caught.value.code == "image-truncated"
    run("skip", data__on_bad="skip", data__max_bad_share=0.9)
    said = capsys.readouterr().out
    for name in ("001.png", "002.png"):
        assert f"{name}: the picture is incomplete or damaged" in said
    with pytest.raises(CogtuneError) as caught:
        run("too many", data__on_bad="skip", data__max_bad_share=0.01)
    assert caught.value.code == "data-bad-share"
