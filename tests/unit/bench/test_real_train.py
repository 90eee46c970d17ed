"""The data and the base of the measurement of a real train are what it says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import real_train
from cogtune.bench.checkpoint import make_checkpoint, make_outline
from cogtune.bench.rows import preset, synthetic_rows
from cogtune.checkpoint.model_files import load_model_config, stored_tensors
from cogtune.data.training_rows import load_rows
from cogtune.train import engines
from cogtune.train.model_setup import load_base


def test_an_outline_is_a_checkpoint_with_holes_in_place_of_weights(tmp_path: Path) -> None:
    base = make_outline(tmp_path / "base", preset="tiny")
    whole = make_checkpoint(tmp_path / "whole", preset="tiny", device=torch.device("cpu"))
    own, real = (stored_tensors(folder) for folder in (base, whole.folder))
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in own.items()} == {
        name: (tensor.shape, tensor.dtype) for name, tensor in real.items()
    }
    sizes = [file.stat() for file in base.glob("*.safetensors")]
    assert sum(size.st_blocks * 512 for size in sizes) < sum(size.st_size for size in sizes) / 2


def test_rows_are_as_long_as_the_benchs_in_the_mean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(real_train, "SIZES", ((40, 30), (50, 64)))
    base = make_outline(tmp_path / "base", preset="tiny")
    data = real_train.write_data(tmp_path / "data", 8)
    config = real_train.run_config(base, data, tmp_path / "output")
    rows = load_rows(config)
    fixed = synthetic_rows(preset(f"text={real_train.TEXT}"), 1, load_model_config(base), tmp_path / "fixed", side=8)
    assert sum(rows.lengths) == 8 * fixed.lengths[0]
    assert len(set(rows.lengths)) > 4
    assert {path.suffix for path in (data / "images").iterdir()} == {".jpg", ".png"}


def test_weights_are_made_where_a_folder_has_holes(tmp_path: Path) -> None:
    base = make_outline(tmp_path / "base", preset="tiny")
    config = real_train.run_config(base, tmp_path, tmp_path / "output")
    with real_train.random_base():
        model = load_base(config, engines.start(config), torch.float32, cached=True)
    assert model.lm_head.weight.std() > 0.01
    assert not model.model.vision.has_tower
