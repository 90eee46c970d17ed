"""A folder of another architecture is named as what it is, wherever a model is read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from cogtune import CogVLM2Config, CogVLM2Processor
from cogtune.checkpoint.model_files import load_model_config
from cogtune.checkpoint.random import make_tiny, published_first_config, write_published_config
from cogtune.errors import CheckpointError
from cogtune.plan.sizes import ModelSizes
from cogtune.processing.token_file import find_token_file

READERS: list[Callable[[Path], object]] = [
    load_model_config,
    CogVLM2Processor.from_pretrained,
    ModelSizes.from_folder,
    lambda folder: find_token_file(str(folder)),
]


def _named(folder: Path, architecture: str) -> Path:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": [architecture]}))
    return folder


@pytest.mark.parametrize("read", READERS, ids=["checkpoint", "processor", "plan", "data check"])
@pytest.mark.parametrize(
    ("architecture", "said", "instead"),
    [
        ("CogAgentForCausalLM", "CogAgent", "finetune_demo"),
        ("ChatGLMForConditionalGeneration", "GLM-4V-9B", "ms-swift"),
        ("Glm4vForConditionalGeneration", "GLM-4.1V", "transformers has this model itself"),
        ("Qwen2VLForConditionalGeneration", "another model", "ms-swift"),
    ],
)
def test_foreign_folders(tmp_path, read, architecture: str, said: str, instead: str) -> None:
    folder = _named(make_tiny(tmp_path / "tiny"), architecture)
    with pytest.raises(CheckpointError) as caught:
        read(folder)
    assert caught.value.code == "checkpoint-architecture"
    assert architecture in caught.value.message
    assert said in caught.value.message
    assert instead in caught.value.hint


def test_a_foreign_config_that_this_model_could_not_even_hold(tmp_path) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["ChatGLMForConditionalGeneration"], "vision_config": 3}')
    with pytest.raises(CheckpointError) as caught:
        load_model_config(tmp_path)
    assert caught.value.code == "checkpoint-architecture"


def test_a_video_folder(tmp_path) -> None:
    folder = make_tiny(tmp_path / "tiny", vision_experts=False, eos_token_id=257, template_version="base")
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["CogVLMVideoForCausalLM"]
    config = load_model_config(folder)
    assert (config.vision_experts, config.numbered_images, config.eos_token_ids) == (False, True, [257])
    assert config.template_version == "base"  # as published; but every published script asks in "chat"
    processor = CogVLM2Processor.from_pretrained(folder)
    assert processor.encoder.template == "chat"
    tokens = find_token_file(str(folder))
    own, quick = processor.encoder, tokens.encoder()
    assert own.encode("What?", images=3).input_ids == quick.encode("What?", images=3).input_ids
    assert find_token_file(str(folder), "base").encoder().template == "base"
    config.save_pretrained(tmp_path / "saved")
    assert CogVLM2Config.from_pretrained(tmp_path / "saved").vision_experts is False


def test_a_picture_folder_stays_one(tmp_path) -> None:
    config = load_model_config(make_tiny(tmp_path / "tiny"))
    assert (config.vision_experts, config.numbered_images, config.max_images) == (True, False, 1)
    config.save_pretrained(tmp_path / "saved")
    assert CogVLM2Config.from_pretrained(tmp_path / "saved").vision_experts is True


def _first(folder: Path, **changes: object) -> Path:
    """A first-generation folder's ``config.json`` as published, with keys changed, or removed where None."""
    folder.mkdir()
    write_published_config(folder, published_first_config())
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    return folder


def test_a_first_generation_folder(tmp_path) -> None:
    config = load_model_config(_first(tmp_path / "first"))
    assert (config.generation, config.num_multi_query_heads, config.rope_theta) == (1, 32, 10000)
    assert (config.num_image_tokens, config.most_tokens, config.max_images) == (1227, 2048, 1)
    assert (config.bos_token_id, config.eos_token_ids, config.pad_token_id) == (1, [2], 0)
    tokens = find_token_file(str(tmp_path / "first"))
    assert (tokens.num_image_tokens, tokens.image_size, tokens.bos_id, tokens.eos_id) == (1227, 490, 1, 2)
    config.save_pretrained(tmp_path / "saved")
    again = CogVLM2Config.from_pretrained(tmp_path / "saved")
    assert (again.generation, again.num_multi_query_heads, again.intermediate_size) == (1, 32, 11008)


def test_keys_that_a_first_generation_file_lacks_have_its_values(tmp_path) -> None:
    keys = ("vocab_size", "intermediate_size", "max_position_embeddings", "num_attention_heads", "pad_token_id")
    few = load_model_config(_first(tmp_path / "few", vision_config=None, **dict.fromkeys(keys)))
    whole = load_model_config(_first(tmp_path / "whole"))
    for key in (*keys, "num_multi_query_heads", "generation", "image_size", "num_image_tokens"):
        assert getattr(few, key) == getattr(whole, key)


@pytest.mark.parametrize(
    "changes",
    [{"bos_token_id": 128000}, {"num_multi_query_heads": 8}, {"architectures": ["CogVLMVideoForCausalLM"]}],
    ids=["ids", "grouped", "video"],
)
def test_what_is_no_first_generation_file(tmp_path, changes: dict[str, object]) -> None:
    assert load_model_config(_first(tmp_path / "other", vocab_size=128256, **changes)).generation == 2


def test_a_saved_folder_of_an_odd_size_keeps_it(tmp_path) -> None:
    config = published_first_config()
    config.num_multi_query_heads, config.intermediate_size = 8, 14336  # as the second generation's defaults
    config.save_pretrained(tmp_path)
    again = load_model_config(tmp_path)
    assert (again.generation, again.num_multi_query_heads, again.intermediate_size) == (1, 8, 14336)


def test_a_generation_that_is_none(tmp_path) -> None:
    with pytest.raises(CheckpointError, match="1 or 2"):
        load_model_config(_first(tmp_path / "third", generation=3))
