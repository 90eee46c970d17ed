"""Folders of the video model: one expert, published names, adapters and merging."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cogtune import CogVLM2Config, CogVLM2ForCausalLM
from cogtune.adapters.merge import merge
from cogtune.adapters.targets import resolve_targets
from cogtune.checkpoint.load import load_model, load_tower
from cogtune.checkpoint.random import make_tiny, published_video_config, tiny_config, tiny_video_config
from cogtune.errors import AdapterError, CheckpointError


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make_tiny(
        tmp_path_factory.mktemp("video") / "base", dtype=torch.float32, vision_experts=False, eos_token_id=257
    )


def _names(config: CogVLM2Config) -> set[str]:
    with torch.device("meta"):
        return set(CogVLM2ForCausalLM(config).state_dict())


def test_only_the_vision_experts_are_absent() -> None:
    pictures, frames = _names(CogVLM2Config()), _names(published_video_config())
    assert frames < pictures
    assert len(frames) == 1029
    absent = pictures - frames
    assert len(absent) == 192
    assert all("vision_expert" in name or "vision_mlp" in name for name in absent)


def test_a_published_folder_of_the_other_kind_does_not_load(folder, tmp_path) -> None:
    pictures = make_tiny(tmp_path / "pictures")
    for source, other, said in (
        (folder, "CogVLMForCausalLM", "12 missing"),
        (pictures, "CogVLMVideoForCausalLM", "12 left"),
    ):
        config = json.loads((source / "config.json").read_text())
        copy = tmp_path / f"as-{other}"
        copy.mkdir()
        for file in source.iterdir():
            (copy / file.name).symlink_to(file)
        (copy / "config.json").unlink()
        (copy / "config.json").write_text(json.dumps(config | {"architectures": [other]}))
        with pytest.raises(CheckpointError) as caught:
            load_model(copy)
        assert caught.value.code == "checkpoint-tensors"
        assert said in caught.value.message


def test_saved_and_loaded_again(folder, tmp_path) -> None:
    model = load_model(folder)
    model.save_pretrained(tmp_path / "saved")
    stored = load_file(tmp_path / "saved" / "model.safetensors")
    assert stored.keys() == model.state_dict().keys()
    again = load_model(tmp_path / "saved")
    assert not again.config.vision_experts
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value)
    assert torch.equal(
        load_tower(folder, dtype=torch.float32, device="cpu").conv.weight, model.model.vision.conv.weight
    )


@pytest.mark.parametrize("name", ["experts", "language-experts", "experts-attention", "experts-mlp"])
def test_target_sets_hit_the_one_expert(name: str) -> None:
    with torch.device("meta"):
        model = CogVLM2ForCausalLM(tiny_video_config())
    found = resolve_targets(model, [name])
    assert found
    assert all(suffix.startswith("language_") for suffix in found)


def test_vision_experts_are_refused_with_the_name_to_use() -> None:
    with torch.device("meta"):
        model = CogVLM2ForCausalLM(tiny_video_config())
    with pytest.raises(AdapterError, match="one expert for all tokens") as caught:
        resolve_targets(model, ["vision-experts-mlp"])
    assert "--lora.targets experts-mlp" in (caught.value.hint or "")
    with torch.device("meta"):
        assert len(resolve_targets(CogVLM2ForCausalLM(tiny_config()), ["experts"])) == 10


def test_merged(folder, tmp_path) -> None:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    adapted = get_peft_model(
        load_model(folder),
        LoraConfig(r=2, init_lora_weights=False, target_modules=["language_expert_query_key_value", "down_proj"]),
    )
    ids = torch.tensor([[256, 258, 258, 258, 258, 258, 258, 48, 5, 6]])
    inputs = {"input_ids": ids, "token_type_ids": (ids == 258).long(), "pixel_values": torch.randn(1, 3, 8, 8)}
    expected = adapted(**inputs).logits
    adapted.save_pretrained(tmp_path / "adapter")
    merge(tmp_path / "adapter", tmp_path / "merged", folder)
    assert json.loads((tmp_path / "merged/config.json").read_text())["architectures"] == ["CogVLMVideoForCausalLM"]
    torch.testing.assert_close(load_model(tmp_path / "merged")(**inputs).logits, expected, rtol=1e-4, atol=1e-4)
