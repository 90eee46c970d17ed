"""A run on quantised weights, with 8-bit moments: it learns, it continues to the bit, its adapter answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cogtune.cli.main import main
from cogtune.errors import ConfigError, OutputFolderError
from cogtune.evaluate.run_folder import read_metrics
from cogtune.train import engines
from cogtune.train.run import train
from tests.support.packed import int4_folder
from tests.support.training import make_config, write_data

pytest.importorskip("bitsandbytes")

QLORA = {
    "quant__experts": "nf4",
    "quant__tower": "int8",
    "quant__embedding": "host",
    "lora__rank": 64,  # large enough that moments are kept in 8 bits
    "train__optimizer": "adamw8bit",
    "train__gradient_checkpointing": "all",
    "train__max_steps": 4,
    "train__save_steps": 2,
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data") / "pictures", 8)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "optimizer.safetensors")


def equal(first: dict[str, Any], second: dict[str, Any]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_a_continued_run_is_the_uninterrupted_one(tiny_checkpoint: Path, data: Path, tmp_path: Path) -> None:
    train(make_config(tiny_checkpoint, data, tmp_path / "whole", **QLORA))
    resumed = make_config(
        tiny_checkpoint, data, tmp_path / "resumed", **QLORA, train__resume=tmp_path / "whole" / "checkpoint-2"
    )
    train(resumed)
    whole, again = tensors(tmp_path / "whole" / "checkpoint-4"), tensors(tmp_path / "resumed" / "checkpoint-4")
    assert equal(whole, again)
    kinds = {name.partition("/")[0]: value.dtype for name, value in whole.items() if value.numel() >= 4096}
    assert kinds["state1"] == torch.uint8
    assert any(name.startswith("absmax1/") for name in whole)
    losses = [line["loss"] for line in read_metrics(tmp_path / "whole") if line["kind"] == "train"]
    assert losses[-1] < losses[0]


def test_another_optimiser_does_not_take_its_moments(tiny_checkpoint: Path, data: Path, tmp_path: Path) -> None:
    values = {**QLORA, "train__max_steps": 1}
    train(make_config(tiny_checkpoint, data, tmp_path / "first", **values))
    values |= {"train__optimizer": "adamw", "train__max_steps": 2}
    with pytest.raises(OutputFolderError, match=r"train\.optimizer: adamw8bit there, adamw now"):
        train(
            make_config(
                tiny_checkpoint, data, tmp_path / "second", **values, train__resume=tmp_path / "first" / "checkpoint-1"
            )
        )


def test_what_was_trained_on_four_bits_answers_from_four_bits(
    tiny_checkpoint: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cached = {"data__cache_features": "on", "data__cache_dir": tmp_path / "cache"}
    train(make_config(tiny_checkpoint, data, tmp_path / "run", **QLORA, **cached))
    answers = tmp_path / "answers.jsonl"
    command = ["predict", "--adapter", str(tmp_path / "run"), "--data", str(data), "--output", str(answers)]
    quant = ["--quant.experts", "nf4", "--quant.tower", "int8", "--quant.embedding", "host"]
    assert main([*command, *quant, "--max-new-tokens", "3"]) == 0
    assert len(answers.read_text().splitlines()) == 15
    capsys.readouterr()
    assert main([*command, "--max-new-tokens", "3"]) == 0, "the training's formats are these"
    assert main([*command, "--quant.experts", "none", "--max-new-tokens", "3"]) == 2, (
        "answers of other weights must not be mixed in"
    )
    assert "quant.experts" in capsys.readouterr().err


def test_the_published_4_bit_folder_from_download_to_merge(
    tiny_checkpoint: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tmp_path / "int4"
    int4_folder(tiny_checkpoint, base)
    words = ("--model", str(base), "--data", str(data), "--data.cache_dir", str(tmp_path / "cache"))
    run = ("train", *words, "--output", str(tmp_path / "run"), "--data.workers", "0", "--lora.rank", "4")
    assert main([*run, "--train.max_steps", "3", "--data.cache_features", "on"]) == 0
    written = json.loads((tmp_path / "run" / "adapter" / "cogtune.json").read_text())
    assert (written["settings"]["quant.experts"], written["settings"]["quant.tower"]) == ("fp4", "fp4")
    assert main([*run, "--quant.experts", "nf4"]) == 2
    assert "are stored in fp4 and stay so" in capsys.readouterr().err
    answers = []
    for name, model in (("unmerged", ("--adapter", str(tmp_path / "run"))), ("merged", ("--model", "MERGED"))):
        if name == "merged":
            assert main(["merge", "--adapter", str(tmp_path / "run"), "--output", str(tmp_path / "merged")]) == 0
            model = ("--model", str(tmp_path / "merged"))
        file = tmp_path / f"{name}.jsonl"
        assert main(["predict", *model, "--data", str(data), "--output", str(file), "--max-new-tokens", "3"]) == 0
        answers.append(len(file.read_text().splitlines()))
    assert answers == [15, 15]
    assert "quant.experts" not in capsys.readouterr().err.split("merged:")[-1], "the merged model is plain"


@pytest.mark.parametrize(
    ("engine", "values"),
    [
        ("fsdp2", {"quant__experts": "int8"}),
        ("zero3", {"quant__tower": "nf4"}),
        ("zero2", {"train__optimizer": "adamw8bit"}),
    ],
)
def test_what_an_engine_cannot_divide_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: str, values: dict[str, str]
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    config = make_config(tmp_path, tmp_path, tmp_path / "out", parallel__engine=engine, **values)
    with pytest.raises(ConfigError, match=f"does not go with the engine {engine}") as refused:
        engines.choose(config)
    assert refused.value.code == "config-combination"
