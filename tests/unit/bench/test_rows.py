"""Synthetic rows have exactly the lengths their presets say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from cogtune.bench.rows import PRESETS, answers_of, preset, synthetic_batches, text_ids
from cogtune.checkpoint.random import published_config, published_first_config, tiny_config
from cogtune.errors import ConfigError

IMAGE = 6


def _batch(folder: Path, name: str, **options: Any) -> dict[str, Any]:
    settings = {"batch_size": 1, "count": 1, "cached": False, "dtype": torch.float32, "device": torch.device("cpu")}
    return synthetic_batches(preset(name), tiny_config(), folder, **(settings | options))[0]


@pytest.mark.parametrize(
    ("name", "tokens", "labels", "answers"),
    [
        ("s400", 1 + IMAGE + 400, 200, 1),
        ("text-only", 1 + 400, 200, 1),
        ("caption", 1 + IMAGE + 320, 300, 1),
        ("512+512", 1 + IMAGE + 1024, 512, 1),
        ("text=90", 1 + IMAGE + 90, 45, 1),
        ("vqa1", 1 + IMAGE + 30, 10, 1),
    ],
)
def test_single_answers(tmp_path: Path, name: str, tokens: int, labels: int, answers: int) -> None:
    batch = _batch(tmp_path, name)
    assert batch["input_ids"].shape == (1, tokens)
    assert (batch["num_labels"], answers_of(batch)) == (labels, answers)
    assert ("pixel_values" in batch) == (name != "text-only")


def test_trees_share_the_picture(tmp_path: Path) -> None:
    ten, one = _batch(tmp_path / "ten", "vqa10"), _batch(tmp_path / "one", "vqa1")
    assert (ten["num_labels"], answers_of(ten)) == (100, 10)
    assert ten["token_type_ids"].sum() == one["token_type_ids"].sum() == IMAGE
    rounds = _batch(tmp_path / "rounds", "sft311k-multi")
    assert (rounds["num_labels"], answers_of(rounds)) == (240, 3)


def test_cached_batches_carry_features_instead_of_pixels(tmp_path: Path) -> None:
    batch = _batch(tmp_path, "text=40", cached=True, batch_size=3, dtype=torch.bfloat16)
    assert "pixel_values" not in batch
    assert batch["image_features"].shape == (3, 4, 32)
    assert batch["image_features"].dtype == torch.bfloat16
    assert len({tuple(row) for row in batch["input_ids"].tolist()}) == 3  # different text in every row


@pytest.mark.parametrize("name", ["nothing", "text=", "text=four", "colour=3"])
def test_unknown_shapes(name: str) -> None:
    assert name not in PRESETS
    with pytest.raises(ConfigError, match="no preset"):
        preset(name)


def test_a_question_too_short_for_the_template(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="template"):
        _batch(tmp_path, "text=20")


def test_text_has_no_special_token() -> None:
    assert text_ids(published_config()) == range(128000)
    assert text_ids(published_first_config()) == range(3, 32000)
