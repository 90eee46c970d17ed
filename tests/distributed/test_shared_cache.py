"""Two ranks fill one feature cache, each its share, and train from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tests.support.launching import run_ranks
from tests.support.shared_filling import run
from tests.support.training import write_data


@pytest.fixture(scope="module")
def output(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shared")
    data = write_data(folder / "pictures", 8, text_only=5)
    for number in range(8):  # so that no two are the same
        Image.new("RGB", (12, 10), (number * 30, 90, 200)).save(data / "images" / f"{number:03}.png")
    words = [str(word) for word in (tiny_checkpoint, data, folder)]
    launched = run_ranks("tests.support.shared_filling", *words)
    assert launched.code == 0, launched.output
    run(tiny_checkpoint, data, folder, "alone", "on", train__batch_size=4)
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "last" / "adapter_model.safetensors")


def outcome(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "outcome.json").read_text())
    return found


def test_every_picture_is_computed_once_and_the_work_is_split(output: Path) -> None:
    assert outcome(output)["seen"] == [4, 4]
    assert len(list(output.glob("cache-cached/*/??/*"))) == 8


def test_two_ranks_from_the_cache_train_as_two_with_the_tower_and_as_one_alone(output: Path) -> None:
    """Batches of two pictures round otherwise in the live tower than single ones while filling; and two ranks sum in
    another order than one."""
    cached, live, alone = (weights(output / name) for name in ("cached", "live", "alone"))
    for name, value in cached.items():
        assert torch.allclose(value, live[name], rtol=0, atol=1e-6)
        assert torch.allclose(value, alone[name], rtol=0, atol=1e-6)


def test_a_full_disk_on_one_rank_ends_both_and_loses_nothing(output: Path) -> None:
    said = outcome(output)["full"]
    assert all(text.startswith("disk-full: no space left while filling the feature cache") for text in said)
    again = weights(output / "full")
    assert all(torch.equal(value, again[name]) for name, value in weights(output / "cached").items())
