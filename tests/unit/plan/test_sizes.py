"""Sizes without the model are the model's sizes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from cogtune import CogVLM2Config, CogVLM2ForCausalLM
from cogtune.adapters.targets import TARGET_SETS, is_match, resolve_targets
from cogtune.checkpoint.model_files import stored_tensors
from cogtune.checkpoint.random import (
    TINY,
    TINY_VISION,
    make_tiny,
    published_first_config,
    published_video_config,
    tiny_config,
    tiny_first_config,
    tiny_video_config,
    write_published_config,
)
from cogtune.errors import AdapterError
from cogtune.plan.memory import weights
from cogtune.plan.setting import LoraShape, Setting, adapted_names
from cogtune.plan.sizes import VIDEO, ModelSizes
from cogtune.processing.token_file import find_token_file
from tests.support.packed import int4_folder


def meta_model(config: CogVLM2Config) -> CogVLM2ForCausalLM:
    with torch.device("meta"):
        return CogVLM2ForCausalLM(config)


@pytest.mark.parametrize(
    ("config", "sizes"),
    [
        (CogVLM2Config(), ModelSizes()),
        (tiny_config(), ModelSizes.from_config({**TINY, "vision_config": TINY_VISION})),
        (published_video_config(), VIDEO),
        (tiny_video_config(), ModelSizes.from_config(tiny_video_config().to_dict())),
        (published_first_config(), ModelSizes.from_folder("THUDM/cogvlm-chat-hf")),
        (tiny_first_config(), ModelSizes.from_config(tiny_first_config().to_dict())),
    ],
    ids=["full", "tiny", "video", "tiny-video", "first", "tiny-first"],
)
def test_linears_and_parameters_are_the_models(config: CogVLM2Config, sizes: ModelSizes) -> None:
    model = meta_model(config)
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    found = {x.name: (x.inputs, x.outputs, x.bias) for x in sizes.linears}
    assert found == {n: (m.in_features, m.out_features, m.bias is not None) for n, m in linears.items()}
    assert sizes.parameters() == sum(p.numel() for p in model.parameters())
    parts = {"embedding": model.model.embed_tokens, "head": model.lm_head, "conv": model.model.vision.conv}
    for part, module in parts.items():
        assert sizes.parameters(part) == sum(p.numel() for p in (module.parameters() if module is not None else ()))
    tower = [model.model.vision.transformer, model.model.vision.patch_embedding]
    counted = sum(p.numel() for module in tower for p in module.parameters())
    assert sizes.parameters("tower") + sizes.parameters("tower_other") == counted
    assert sizes.image_tokens == config.num_image_tokens
    assert sizes.head_dim == config.head_dim


def test_a_folders_config_is_read_and_a_hub_name_has_the_published_sizes(tmp_path) -> None:
    assert ModelSizes.from_folder(make_tiny(tmp_path / "tiny")).hidden_size == TINY["hidden_size"]
    assert ModelSizes.from_folder("THUDM/cogvlm2-llama3-chat-19B") == ModelSizes()
    assert ModelSizes().parameters() == 19_503_105_280


def test_a_video_model_is_planned_as_one_by_folder_and_by_hub_name(tmp_path) -> None:
    folder = make_tiny(tmp_path / "tiny", vision_experts=False)
    assert not ModelSizes.from_folder(folder).vision_experts
    for name in ("THUDM/cogvlm2-llama3-caption", "zai-org/VisionReward-Video"):
        assert ModelSizes.from_folder(name) == VIDEO
    assert VIDEO.parameters() == 12_507_530_496
    assert VIDEO.image_tokens == 66
    # LoRA per unit of rank on all layers of the one expert (family: 327,680 + 262,144 + 3 x 589,824)
    adapter = LoraShape(adapted_names(VIDEO, ["experts"]), 1)
    assert Setting(sizes=VIDEO, adapter=adapter).adapter_parameters() == 327_680 + 262_144 + 3 * 589_824


def test_a_first_generation_model_is_planned_as_one_by_folder_and_by_hub_name(tmp_path) -> None:
    model = meta_model(published_first_config())
    write_published_config(tmp_path, model.config)
    assert "generation" not in (tmp_path / "config.json").read_text()  # the published file has no such key
    first, small = ModelSizes.from_folder(tmp_path), ModelSizes.from_folder("THUDM/cogvlm-base-224-hf")
    for name in ("THUDM/cogvlm-chat-hf", "cogvlm-grounding-base-hf", "ZhipuAI/cogvlm-base-490-hf"):
        assert ModelSizes.from_folder(name) == first
    # the published totals
    assert (first.parameters(), small.parameters()) == (17_639_685_376, 17_637_948_928)
    assert (first.image_tokens, small.image_tokens, first.qkv_width) == (1227, 258, 12288)


def test_rows_are_planned_by_a_hub_name_alone() -> None:
    for name, tokens, side, template in (
        ("THUDM/cogvlm-chat-hf", 1227, 490, "chat"), ("THUDM/cogvlm-base-224-hf", 258, 224, "base"),
        ("THUDM/cogvlm2-llama3-caption", 66, 224, "chat"), ("THUDM/cogvlm2-llama3-chat-19B", 2306, 1344, "chat"),
    ):  # fmt: skip
        found = find_token_file(name)
        assert (found.num_image_tokens, found.image_size, found.template) == (tokens, side, template)
        assert found.reads_clips == (tokens == 66)


def test_a_4_bit_folder_is_counted_as_it_is_stored(tmp_path) -> None:
    """The published file has 12.5 GB: every linear layer but the head with a float32 scale per 64 weights, the rest in
    16 bits (family specification: 12.528 GB)."""
    published = ModelSizes.from_folder("zai-org/cogvlm2-llama3-chinese-chat-19B-int4")
    held = weights(Setting(sizes=published, dtype="float16"))
    assert sum(held.values()) == pytest.approx(12.528e9, rel=2e-4)
    assert ModelSizes.from_folder("zai-org/cogvlm2-llama3-chat-19B").stored is None
    pytest.importorskip("bitsandbytes")
    base = make_tiny(tmp_path / "tiny")
    for kind, nested in (("fp4", False), ("nf4", True)):
        int4_folder(base, tmp_path / kind, kind, nested=nested)
        found = ModelSizes.from_folder(tmp_path / kind)
        stored = stored_tensors(tmp_path / kind)
        state = sum(".quant_state." in name for name in stored)
        assert state == sum(linear.stored is not None for linear in found.linears)
        held = [t for name, t in stored.items() if ".quant_state." not in name and "inv_freq" not in name]
        size = sum(tensor.stop - tensor.start for tensor in held)
        # nested: the offset of the scales is in the JSON of the state, and counts as a float32
        offsets = 4 * state if nested else 0
        assert sum(weights(Setting(sizes=found, dtype="float16")).values()) == size + offsets


@pytest.mark.parametrize(
    "targets", [*([name] for name in TARGET_SETS), ["vision_expert_query_key_value", r".*layers\.(0|1)\.mlp\..*"]]
)
def test_targets_hit_what_attaching_hits(targets: list[str]) -> None:
    sizes, model = ModelSizes.from_config({**TINY, "vision_config": TINY_VISION}), meta_model(tiny_config())
    suffixes = resolve_targets(model, targets)
    linears = {n for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    assert adapted_names(sizes, targets) == {n for n in linears if any(is_match(n, s) for s in suffixes)}


def test_a_wrong_target_is_refused_as_attaching_does() -> None:
    with pytest.raises(AdapterError, match="matches none"):
        adapted_names(ModelSizes(), ["vision_expert_qkv"])
    with pytest.raises(AdapterError, match="LoRA adapts linear layers only"):
        adapted_names(ModelSizes(), ["vision_mlp"])
    only = adapted_names(ModelSizes(), ["experts"], {"layers_to_transform": [3]})
    assert len(only) == 10
    assert all(".layers.3." in name for name in only)
