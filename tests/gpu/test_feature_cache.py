"""Filling on a GPU, where copies and the disk run beside the tower, and training from what was filled."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from cogtune.checkpoint.random import random_model, tiny_config
from cogtune.evaluate.run_folder import read_metrics
from cogtune.train.feature_cache import fill_cache
from cogtune.train.run import train
from tests.support.training import make_config, write_data

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_data(tmp_path_factory.mktemp("data") / "pictures", 13)
    for number in range(13):
        Image.new("RGB", (12, 10), (number * 19, 90, 200)).save(folder / "images" / f"{number:03}.png")
    return folder


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(("dtype", "loss", "moved"), [("float32", 1e-5, 1e-3), ("bfloat16", 2e-2, 0.3)])
def test_cached_training_is_live_training(
    tiny_checkpoint: Path, data: Path, tmp_path: Path, dtype: str, loss: float, moved: float, compiled: bool
) -> None:
    """To the rounding of one number format under other shapes of batch; in bfloat16 AdamW's sign-like first steps turn
    rounding into steps, so there only the losses say much."""
    values = {"model__dtype": dtype, "train__max_steps": 6, "train__batch_size": 2, "train__compile": compiled}
    cache = {"data__cache_dir": tmp_path / "cache", "data__cache_batch": 3}
    report = fill_cache(make_config(tiny_checkpoint, data, tmp_path / "unused", **values, **cache))
    assert report.computed == 13
    assert report.peak_bytes > 0
    outputs = {}
    for name, asked in (("live", "off"), ("cached", "on")):
        outputs[name] = tmp_path / name
        train(make_config(tiny_checkpoint, data, outputs[name], **values, **cache, data__cache_features=asked))
    losses = {
        name: [line["loss"] for line in read_metrics(folder) if line["kind"] == "train"]
        for name, folder in outputs.items()
    }
    assert losses["cached"] == pytest.approx(losses["live"], rel=loss)
    weights = {name: load_file(folder / "adapter" / "adapter_model.safetensors") for name, folder in outputs.items()}
    apart = sum(float((weights["cached"][n] - value).norm()) ** 2 for n, value in weights["live"].items()) ** 0.5
    whole = sum(float(value.norm()) ** 2 for n, value in weights["live"].items() if "lora_B" in n) ** 0.5
    assert apart <= moved * whole


def test_features_do_not_depend_on_the_pictures_beside() -> None:
    """In float32, to its rounding: cuDNN's TF32, which it takes for some batch sizes, is off by 3e-4."""
    model = random_model(tiny_config(), seed=0).cuda()
    pixels = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0)).cuda()
    with torch.no_grad():
        whole = model.model.encode_images(pixels)
        for size in (1, 2, 3):
            parts = torch.cat([model.model.encode_images(part) for part in pixels.split(size)])
            assert float((parts - whole).norm() / whole.norm()) < 2e-6


def test_the_towers_memory_is_given_back(tiny_checkpoint: Path, data: Path, tmp_path: Path) -> None:
    """The first filling also leaves the libraries' own workspaces behind; a second one leaves nothing more."""
    taken = []
    for name in ("first", "second"):
        fill_cache(make_config(tiny_checkpoint, data, tmp_path / "unused", data__cache_dir=tmp_path / name))
        taken.append(torch.cuda.memory_allocated())
    assert taken[1] <= taken[0]
