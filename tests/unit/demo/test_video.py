"""The video demo's parts at a small size: clips, the base in the published layout, and what is measured."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest

from cogtune.data.sources import read_sources
from cogtune.demo import moving, video
from cogtune.processing.clip import decode, read_clip
from cogtune.processing.frames import Sampling
from tests.support.data_folders import section

pytest.importorskip("av")


def test_clips_show_the_scenes_and_only_their_order_tells_the_way(tmp_path: Path) -> None:
    rng = random.Random(0)
    scenes = [moving.draw(rng, moving=True) for _ in range(6)]
    moving.write_folder(scenes, tmp_path)
    examples, _ = read_sources(section(tmp_path), clips=True, max_images=99)
    assert [one.conversations[0].turns[0].answer for one in examples] == [scene.caption for scene in scenes]
    for scene, example in zip(scenes, examples, strict=True):
        assert [frame.index for frame in example.images] == [0, 4, 8, 12]
        found = list(decode(read_clip(example.images[0].path, Sampling()).frames))
        worst = max(np.abs(a.astype(int) - b.astype(int)).mean() for a, b in zip(found, scene.frames(), strict=True))
        assert worst < 12  # what the codec changes
    ways = {scene.direction for scene in scenes}
    assert len(ways) > 1
    one = moving.Scene("red", "square", "left", 16.0, 0.0)
    back = moving.Scene("red", "square", "right", 16.0, 0.0)
    assert all((a == b).all() for a, b in zip(one.frames(), reversed(back.frames()), strict=True))


def test_all_of_it_at_a_small_size(tmp_path: Path) -> None:
    said: list[str] = []
    small = video.Sizes(base_steps=2, train_clips=4, test_clips=3, tune_steps=2)
    record = video.run(tmp_path / "demo", sizes=small, say=said.append)
    assert set(record["scores"]) == {"base", "tuned", "shuffled"}
    assert json.loads((tmp_path / "demo/demo.json").read_text())["sizes"]["train_clips"] == 4
    config = json.loads((tmp_path / "demo/base/config.json").read_text())
    assert config["architectures"] == ["CogVLMVideoForCausalLM"]
    assert (tmp_path / "demo/run/adapter").is_dir()
    assert any("guessing gives 25%" in line for line in said)
    assert video.run(tmp_path / "demo", sizes=small, say=said.append)["scores"] == record["scores"]
