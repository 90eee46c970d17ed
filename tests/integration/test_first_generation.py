"""A CogVLM from its folder to a merged one, its tokenizer in a second folder: train, resume, answer, merge."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

import cogtune
from cogtune.adapters.provenance import inherit, read_provenance
from cogtune.bench.checkpoint import make_checkpoint
from cogtune.checkpoint.load import load_model
from cogtune.configuration.load import load_answer_config
from cogtune.errors import CheckpointError, OutputFolderError
from cogtune.processing.tokenizer import write_byte_tokenizer
from tests.support.data_folders import write_lines
from tests.support.training import make_config, write_data


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``base`` without a tokenizer, ``vicuna`` with one, ``data``, and ``run``: two steps from features."""
    made = tmp_path_factory.mktemp("first")
    make_checkpoint(made / "base", preset="tiny-first", device=torch.device("cpu"))
    for file in (made / "base").glob("*token*"):
        file.unlink()
    write_byte_tokenizer(made / "vicuna", vocab_size=296, bos=1, eos=2, eot=2, pad=0)
    write_data(made / "data")
    cogtune.train(_config(made))
    return made


def _config(made: Path, **values: object) -> cogtune.RunConfig:
    keys = {
        "model__tokenizer": str(made / "vicuna"), "lora__targets": ["experts"], "train__max_steps": 2,
        "data__cache_features": "on", "data__cache_dir": str(made / "cache"), "train__lr": 0.01,
    }  # fmt: skip
    keys |= values
    given = {key: value for key, value in keys.items() if value is not None}
    return make_config(made / "base", made / "data", made / "run", **given)


def test_without_its_tokenizer_no_run_begins(folder: Path) -> None:
    with pytest.raises(CheckpointError, match="published without one"):
        cogtune.train(_config(folder, model__tokenizer=None, train__output=str(folder / "none")))
    assert not (folder / "none" / "adapter").exists()


def test_a_run_goes_on_with_the_same_tokenizer_only(folder: Path, tmp_path: Path) -> None:
    write_byte_tokenizer(tmp_path / "other", vocab_size=295, bos=1, eos=2, eot=2, pad=0)
    with pytest.raises(OutputFolderError, match=r"model\.tokenizer"):
        cogtune.train(_config(folder, model__tokenizer=str(tmp_path / "other"), train__max_steps=3))
    write_byte_tokenizer(tmp_path / "moved", vocab_size=296, bos=1, eos=2, eot=2, pad=0)
    assert cogtune.train(_config(folder, model__tokenizer=str(tmp_path / "moved"), train__max_steps=3)).steps == 3


def test_the_adapter_knows_its_tokenizer_and_the_merged_folder_has_it(folder: Path, tmp_path: Path) -> None:
    adapter = folder / "run" / "adapter"
    tuned = cogtune.load_generator(adapter=adapter)  # names base and tokenizer itself
    report = cogtune.merge(adapter, tmp_path / "merged", rounding="stochastic")
    assert report.changed == 20
    assert json.loads((tmp_path / "merged/config.json").read_text())["architectures"] == ["CogVLMForCausalLM"]
    provenance = read_provenance(tmp_path / "merged")
    assert provenance is not None
    assert "model.tokenizer" not in provenance.settings
    merged = cogtune.load_generator(tmp_path / "merged")
    picture = folder / "data/images/000.png"
    prompt = tuned.processor(picture, "What colour?")
    assert torch.equal(prompt["input_ids"], merged.processor(picture, "What colour?")["input_ids"])
    with torch.no_grad():
        found, wanted = (one.model(**prompt).logits for one in (merged, tuned))
    # the merged weights are bfloat16: 2^-9 of values around 3, through two layers
    torch.testing.assert_close(found, wanted, rtol=0.05, atol=0.1)


def test_merged_for_transformers(folder: Path, tmp_path: Path) -> None:
    cogtune.merge(folder / "run", tmp_path / "merged", layout="transformers")
    model, processor = load_model(tmp_path / "merged"), cogtune.CogVLM2Processor.from_pretrained(tmp_path / "merged")
    assert model.config.generation == 1
    assert json.loads((tmp_path / "merged/config.json").read_text())["model_type"] == "cogvlm2"
    inputs = processor(folder / "data/images/001.png", "What colour?")
    assert torch.isfinite(model(**inputs).logits).all()


def test_a_strangers_tokenizer_is_not_fetched(folder: Path, tmp_path: Path) -> None:
    name = tmp_path / "adapter"
    name.mkdir()
    written = json.loads((folder / "run/adapter/cogtune.json").read_text())
    for tokenizer, taken in (("someone/else", None), ("lmsys/vicuna-7b-v1.5", "lmsys/vicuna-7b-v1.5")):
        written["settings"]["model.tokenizer"] = tokenizer
        (name / "cogtune.json").write_text(json.dumps(written))
        config, said = inherit(load_answer_config(None, {}), name)
        assert config.model.tokenizer == taken
        assert any("someone/else" in line for line in said) == (taken is None)


def test_boxes_are_evaluated_in_the_picture_that_training_saw(folder: Path, tmp_path: Path) -> None:
    """The adapter was trained on pictures turned upright, and the evaluation names nothing."""
    shutil.copytree(folder / "run/adapter", tmp_path / "adapter")
    written = json.loads((tmp_path / "adapter/cogtune.json").read_text())
    written["settings"]["data.exif"] = "apply"
    (tmp_path / "adapter/cogtune.json").write_text(json.dumps(written))
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 20), "white").save(tmp_path / "0.png", exif=exif)
    record = {"image": "0.png", "expression": "it", "bbox": [0, 0, 10, 10], "width": 40, "height": 20}
    write_lines(tmp_path / "refs.jsonl", [record])
    keys = {"data.boxes": "pixels", "data.box_form": "corners", "max-new-tokens": 2}
    found = cogtune.evaluate(tmp_path / "refs.jsonl", adapter=tmp_path / "adapter", output=tmp_path / "eval", keys=keys)
    (line,) = (tmp_path / "eval/records.jsonl").read_text().splitlines()
    assert json.loads(line)["references"] == ["[[500,000,999,250]]"]  # the stored picture's corner, turned to the right
    assert found.to_dict()["data"]["exif"] == "apply"
    assert found.value("box_accuracy") == 0
