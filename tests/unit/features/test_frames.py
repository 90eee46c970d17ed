"""Frames of clips in the feature cache: stored one by one, computed clip by clip, found by what they show."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from cogtune.checkpoint.load import load_tower
from cogtune.checkpoint.model_files import load_model_config
from cogtune.checkpoint.random import make_tiny
from cogtune.data.pixels import tower_inputs
from cogtune.distributed.group import Group
from cogtune.errors import DataError
from cogtune.features.cache import FeatureCache
from cogtune.features.fill import FillSettings
from cogtune.features.variant import make_variant
from cogtune.processing.clip import read_clip
from cogtune.processing.frames import Frame, Sampling
from tests.support.clips import write_clip


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("model") / "tiny", dtype=torch.float32, vision_experts=False)


def opened(model: Path, root: Path, frames: list[Frame]) -> FeatureCache:
    variant = make_variant("tower", load_model_config(model), "float32", "float32")
    return FeatureCache(root, variant, frames, Group.alone())


def filled(model: Path, cache: FeatureCache, *, batch: int = 24) -> tuple[int, int]:
    cache.make_room("80%")
    settings = FillSettings(image_size=8, max_pixels=None, batch=batch, workers=2)
    tower = load_tower(model, dtype=torch.float32, device="cpu")
    report = cache.fill(lambda: tower.features, settings, torch.device("cpu"), "tiny", lambda line: None)
    return report.computed, report.found


def test_frames_are_those_of_the_live_tower(model, tmp_path) -> None:
    clips = [write_clip(tmp_path / f"{number}.mp4", 8 + 9 * number, rate=7) for number in range(3)]
    frames = [frame for clip in clips for frame in read_clip(clip, Sampling()).frames]
    cache = opened(model, tmp_path / "cache", frames)
    assert (cache.lookup.pictures, cache.lookup.to_compute) == (len(frames), len(frames))
    computed, found = filled(model, cache)
    assert computed + found == len(frames)
    reader = cache.reader(torch.float32)
    tower = load_tower(model, dtype=torch.float32, device="cpu")
    for frame, pixels in zip(frames, tower_inputs(frames, 8), strict=True):
        torch.testing.assert_close(reader(frame), tower.features(pixels[None])[0], rtol=1e-5, atol=1e-5)
    reader.release()
    again = opened(model, tmp_path / "cache", frames)
    assert again.lookup.to_compute <= len(frames)  # a file that was only just written is not trusted by its times
    moved = tmp_path / "moved"
    moved.mkdir()
    for clip in clips:
        shutil.copy(clip, moved / clip.name)
    copies = [frame for clip in clips for frame in read_clip(moved / clip.name, Sampling()).frames]
    other = opened(model, tmp_path / "cache", copies)
    assert filled(model, other)[0] == 0  # found by their content


def test_another_sampling_computes_only_what_is_new(model, tmp_path) -> None:
    clip = write_clip(tmp_path / "a.mp4", 17, rate=7)
    some = list(read_clip(clip, Sampling()).frames)
    filled(model, opened(model, tmp_path / "cache", some))
    more = list(read_clip(clip, Sampling("uniform", 17)).frames)
    assert filled(model, opened(model, tmp_path / "cache", more))[0] == len(more) - len(some)


def test_a_clip_that_breaks_off_is_an_error(model, tmp_path) -> None:
    clip = write_clip(tmp_path / "a.mkv", 40, rate=8, options={"g": "8"})
    frames = list(read_clip(clip, Sampling()).frames)
    clip.write_bytes(clip.read_bytes()[:-700])
    with pytest.raises(DataError) as caught:
        filled(model, opened(model, tmp_path / "cache", frames))
    assert caught.value.code == "clip-truncated"
