"""From what a user names to what is loaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from cogtune.configuration.load import load_answer_config
from cogtune.errors import AdapterError, ConfigError, InputError, SetupError
from cogtune.generate.decoding import Decoding
from cogtune.generate.devices import choose_devices
from cogtune.generate.last_run import LastRun, read_last_run, state_file, write_last_run
from cogtune.generate.loading import load_generator
from cogtune.generate.resolve import Resolved
from cogtune.generate.resolve import resolve as resolve_config
from tests.support.adapters import write_adapter


def resolve(**keys: Any) -> Resolved:
    return resolve_config(load_answer_config(None, keys))


@pytest.fixture(scope="module")
def run(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training's output folder, as far as its adapter goes."""
    folder = tmp_path_factory.mktemp("run")
    write_adapter(tiny_checkpoint, folder / "adapter", targets=["language_expert_dense"])
    return folder


def test_the_base_follows_from_the_adapter_and_the_adapter_from_the_output_folder(
    run: Path, tiny_checkpoint: Path
) -> None:
    resolved = resolve(adapter=run, device="cpu")
    assert resolved.adapter == run / "adapter"
    assert Path(resolved.model) == tiny_checkpoint
    assert (resolved.dtype, resolved.device) == (torch.float32, torch.device("cpu"))


def test_a_base_that_is_elsewhere_has_to_be_named(run: Path, tmp_path: Path) -> None:
    moved = tmp_path / "adapter"
    shutil.copytree(run / "adapter", moved)
    config = json.loads((moved / "adapter_config.json").read_text())
    (moved / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "/gone/base"}))
    with pytest.raises(AdapterError, match="names /gone/base as its base, which is not here"):
        resolve(adapter=moved)
    (moved / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": None}))
    with pytest.raises(AdapterError, match="does not say what base"):
        resolve(adapter=moved)


@pytest.mark.parametrize(
    ("choice", "error", "message"),
    [
        ({}, ConfigError, "no model given"),
        ({"model": "base", "model.dtype": "int8"}, ConfigError, "--model.dtype: found text 'int8'"),
        ({"model": "base", "model.rope_precision": "f64"}, ConfigError, "--model.rope_precision: found text 'f64'"),
        ({"model": "base", "model.template": "alpaca"}, ConfigError, "--model.template: found text 'alpaca'"),
        ({"model": "base", "device": "gpu"}, ConfigError, "--device gpu: not a device"),
        ({"model": "base", "device": "cuda:99"}, SetupError, "--device cuda:99: "),
        ({"model": "base", "adapter": "/no/adapter"}, AdapterError, "/no/adapter: no such folder"),
    ],
)
def test_wrong_choices_are_said_before_anything_loads(
    choice: dict[str, str], error: type[InputError], message: str
) -> None:
    with pytest.raises(error, match=message):
        resolve(**choice)
    with pytest.raises(error, match=message):
        load_generator(keys=choice)


@pytest.mark.parametrize(("key", "value"), [("quant.tower", "int8"), ("quant.embedding", "host")])
def test_ranks_that_divide_each_layer_hold_no_quantised_part(key: str, value: str) -> None:
    with pytest.raises(ConfigError, match=f"{key} {value} does not go with parallel.tensor 2") as refused:
        resolve(**{"model": "base", "parallel.tensor": "2", key: value})
    assert "leave the other out" in (refused.value.hint or "")


def test_an_adapter_for_another_base_is_refused(run: Path, tmp_path: Path) -> None:
    from cogtune.checkpoint.random import make_tiny

    other = make_tiny(tmp_path / "other", hidden_size=32, num_attention_heads=2, num_multi_query_heads=1)
    with pytest.raises(AdapterError, match="size mismatch"):
        load_generator(other, adapter=run)


def test_the_last_run_is_remembered(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    with pytest.raises(InputError, match="no finished training is remembered"):
        read_last_run()
    monkeypatch.chdir(run)
    assert write_last_run("owner/name", Path("adapter"), Path("."), template="vqa")
    assert read_last_run() == LastRun("owner/name", str(run / "adapter"), str(run), "vqa")
    assert write_last_run(".", Path("gone"), Path("."))
    with pytest.raises(InputError, match="not there any more"):
        read_last_run()
    state_file().write_text("{")
    with pytest.raises(InputError, match="cannot be read"):
        read_last_run()


def test_a_home_that_cannot_be_written_fails_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    assert not write_last_run("base", tmp_path, tmp_path)


@pytest.mark.parametrize("name", ["cuda:0,cuda:0", "cpu,cuda:0", "cpu,cpu", "cuda:0,cpu,cuda:1"])
def test_several_devices_are_different_gpus_and_cpu_last(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ConfigError, match="several devices are different GPUs"):
        choose_devices(name)
    assert [str(device) for device in choose_devices("cuda,cuda:1,cpu")] == ["cuda:0", "cuda:1", "cpu"]
    assert [str(device) for device in choose_devices("all")] == ["cuda:0", "cuda:1"]


def test_a_generator_follows_the_keys_it_is_made_with(run: Path, tmp_path: Path) -> None:
    keys = {"device": "cpu", "temperature": 0.5, "max-new-tokens": 5, "data.exif": "apply", "model.template": "vqa"}
    generator = load_generator(adapter=run, keys=keys)
    assert generator.decoding == Decoding(5, sample=True, temperature=0.5)
    assert (generator.template, generator.device) == ("vqa", torch.device("cpu"))
    image = Image.new("RGB", (24, 16))
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.jpg", exif=exif)
    assert generator._opened(tmp_path / "turned.jpg").size == (16, 24)
    for key, value in (("batch-size", 2), ("seed", 1), ("parallel.tensor", 2), ("data.path", "data")):
        with pytest.raises(ConfigError, match="has no effect on a generator"):
            load_generator(adapter=run, keys={key: value})
    with pytest.raises(ConfigError, match=r"unknown key `quant\.expert`"):
        load_generator(adapter=run, keys={"quant": {"expert": None}})


def test_more_resident_layers_than_there_are_is_said(run: Path) -> None:
    for stream, said in ((99, True), (2, True), (1, False), ("off", False)):
        lines: list[str] = []
        load_generator(adapter=run, keys={"device": "cpu", "quant.stream": stream}, progress=lines.append).close()
        text = f"quant.stream {stream}: the model has 2 decoder layers, so all stay on the device"
        assert any(text in line for line in lines) == said


def test_guesses_need_the_engine(run: Path) -> None:
    """And get there; a model that answers by ``generate()`` refuses them."""
    keys = {"device": "cpu", "generate.prompt_lookup_num_tokens": 3}
    assert load_generator(adapter=run, keys=keys).engine.guesses == 3
    with pytest.raises(ConfigError, match="needs the whole model on one device"):
        resolve(adapter=run, **keys, **{"quant.stream": "all"})
