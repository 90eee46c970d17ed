"""A run with streamed layers, or with saved inputs in host memory, is the run without: the same losses and weights, and
either continues the other."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cogtune.checkpoint.random import make_tiny
from cogtune.evaluate.run_folder import read_metrics
from cogtune.train.run import train
from tests.support.training import make_config, write_data

pytest.importorskip("bitsandbytes")

SETTINGS = {
    "quant__experts": "nf4",
    "quant__embedding": "host",
    "train__gradient_checkpointing": 2,
    "train__max_steps": 4,
    "train__save_steps": 2,
    "eval__generate": 2,
    "data__validation_share": 0.3,
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five layers: more than the two that are on the device at a time."""
    return make_tiny(
        tmp_path_factory.mktemp("base"), seed=0, num_hidden_layers=5, vision_config={"num_hidden_layers": 3}
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data") / "pictures", 8)


def _metrics(folder: Path) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in read_metrics(folder) if "loss" in line]


def _same(one: Path, two: Path) -> bool:
    first, second = load_file(one), load_file(two)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_a_streamed_run_is_the_resident_one_and_continues_it(base: Path, data: Path, tmp_path: Path) -> None:
    live = {**SETTINGS, "data__cache_features": "off"}
    train(make_config(base, data, tmp_path / "resident", **live))
    train(make_config(base, data, tmp_path / "streamed", **live, quant__stream=0))
    again = {"train__resume": tmp_path / "resident" / "checkpoint-2", "quant__stream": 2}
    again["train__activation_offloading"] = True
    train(make_config(base, data, tmp_path / "continued", **live, **again))
    state, adapter = Path("checkpoint-4") / "optimizer.safetensors", Path("adapter") / "adapter_model.safetensors"
    for other in ("streamed", "continued"):
        assert _same(tmp_path / "resident" / state, tmp_path / other / state)
        assert _same(tmp_path / "resident" / adapter, tmp_path / other / adapter)
    assert _metrics(tmp_path / "resident") == _metrics(tmp_path / "streamed")
    log = (tmp_path / "streamed" / "run.log").read_text()
    assert "8 layers are streamed from" in log
    assert "streamed from" not in (tmp_path / "resident" / "run.log").read_text()


def test_a_streamed_tower_fills_the_cache_with_the_same_features(base: Path, data: Path, tmp_path: Path) -> None:
    for name, stream in (("resident", "off"), ("streamed", 0)):
        cached = {"data__cache_features": "on", "data__cache_dir": tmp_path / f"{name}-cache"}
        train(make_config(base, data, tmp_path / name, **SETTINGS, **cached, quant__stream=stream))
    files = {path.name: path for path in (tmp_path / "resident-cache").rglob("*.safetensors")}
    streamed = {path.name: path for path in (tmp_path / "streamed-cache").rglob("*.safetensors")}
    assert files.keys() == streamed.keys()
    assert files
    for name, path in files.items():
        assert _same(path, streamed[name])
    assert _metrics(tmp_path / "resident") == _metrics(tmp_path / "streamed")
    assert "features: 3 layers are streamed from" in (tmp_path / "streamed" / "run.log").read_text()
