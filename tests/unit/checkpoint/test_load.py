"""Loading is exact and strict; every mistake in a folder has a name; saving writes what was loaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from cogtune import CogVLM2Config, CogVLM2ForCausalLM
from cogtune.checkpoint.load import load_model
from cogtune.checkpoint.model_files import INDEX_NAME, load_model_config
from cogtune.errors import CheckpointError

ONE = "model.layers.1.mlp.vision_mlp.up_proj.weight"
ROTARY = "model.layers.1.self_attn.rotary_emb.inv_freq"


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


@pytest.fixture
def copy(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "copy"))


def _edit(folder: Path, name: str, change: torch.Tensor | None) -> None:
    """Replace, or with None remove, one tensor where it is stored."""
    index = json.loads((folder / INDEX_NAME).read_text())
    file = folder / index["weight_map"][name]
    tensors = load_file(file)
    del tensors[name]
    if change is None:
        del index["weight_map"][name]
        (folder / INDEX_NAME).write_text(json.dumps(index))
    else:
        tensors[name] = change
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_tensor_is_exactly_the_stored_one(tiny_checkpoint: Path, dtype: torch.dtype) -> None:
    stored = _tensors(tiny_checkpoint)
    model = CogVLM2ForCausalLM.from_pretrained(tiny_checkpoint, dtype=dtype)
    state = model.state_dict()
    assert set(state) == set(stored)
    for name, tensor in stored.items():
        assert state[name].dtype == dtype
        assert torch.equal(state[name], tensor.to(dtype)), name
    assert torch.equal(model.model.rotary_frequencies, stored[ROTARY].to(dtype))


def test_the_published_config_style(tiny_checkpoint: Path) -> None:
    raw = json.loads((tiny_checkpoint / "config.json").read_text())
    assert "model_type" not in raw
    assert "auto_map" in raw
    config = load_model_config(tiny_checkpoint)
    assert config.eos_token_ids == [257, 259]
    assert config.num_image_tokens == 6
    bare = CogVLM2Config(**{key: value for key, value in raw.items() if key != "num_multi_query_heads"} | {
        "num_attention_heads": 8, "vision_config": {}, "eos_token_id": 5,
    })  # fmt: skip
    assert bare.num_multi_query_heads == 8
    assert bare.eos_token_ids == [5]
    assert bare.vision_config.num_hidden_layers == 63


def test_saving_writes_the_same_names_and_values(tiny_checkpoint: Path, tmp_path: Path) -> None:
    model = load_model(tiny_checkpoint, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "saved", max_shard_size="150KB")
    saved, stored = _tensors(tmp_path / "saved"), _tensors(tiny_checkpoint)
    assert {n: (t.dtype, t.shape) for n, t in saved.items()} == {n: (t.dtype, t.shape) for n, t in stored.items()}
    assert all(torch.equal(saved[name], stored[name]) for name in stored)
    index = json.loads((tmp_path / "saved" / INDEX_NAME).read_text())
    assert sorted(index["weight_map"]) == sorted(stored)
    again = load_model(tmp_path / "saved", dtype=torch.bfloat16)
    ids = torch.tensor([[256, 65, 66]])
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_auto_classes_load_what_we_saved(tiny_checkpoint: Path, tmp_path: Path) -> None:
    load_model(tiny_checkpoint).save_pretrained(tmp_path)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), CogVLM2Config)
    assert isinstance(AutoModelForCausalLM.from_pretrained(tmp_path), CogVLM2ForCausalLM)


def test_a_missing_tensor_is_named(copy: Path) -> None:
    _edit(copy, ONE, None)
    with pytest.raises(CheckpointError, match=f"missing.*{ONE}"):
        CogVLM2ForCausalLM.from_pretrained(copy)


def test_a_leftover_tensor_is_named(copy: Path) -> None:
    file = copy / "extra.safetensors"
    save_file({"model.layers.7.input_layernorm.weight": torch.ones(4)}, file, metadata={"format": "pt"})
    index = json.loads((copy / INDEX_NAME).read_text())
    index["weight_map"]["model.layers.7.input_layernorm.weight"] = file.name
    (copy / INDEX_NAME).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"left over.*model\.layers\.7\.input_layernorm\.weight"):
        CogVLM2ForCausalLM.from_pretrained(copy)


def test_a_wrong_shape_is_named_with_both_shapes(copy: Path) -> None:
    _edit(copy, ONE, torch.zeros(96, 32, dtype=torch.bfloat16))
    with pytest.raises(CheckpointError, match=rf"{ONE} has shape \[96, 32\], expected \[96, 64\]"):
        load_model(copy)


def test_unequal_rotary_copies_are_refused(copy: Path) -> None:
    _edit(copy, ROTARY, torch.full((8,), 0.5, dtype=torch.bfloat16))
    with pytest.raises(CheckpointError, match="inv_freq differs"):
        load_model(copy)


def test_the_stored_rotary_table_is_used_not_recomputed(copy: Path) -> None:
    table = torch.linspace(0.9, 0.1, 8).bfloat16()
    for layer in (0, 1):
        _edit(copy, f"model.layers.{layer}.self_attn.rotary_emb.inv_freq", table)
    model = load_model(copy)
    assert torch.equal(model.model.rotary_frequencies, table.float())
    cos, _ = model.model.rotary(torch.tensor([[3]]), torch.float32)
    torch.testing.assert_close(cos[0, 0, 0], (3 * table.float()).cos())


@pytest.mark.parametrize("said", ["checkpoint", "float32"])
def test_rotary_positions_are_computed_as_the_folder_says_unless_float32_is_asked_for(copy: Path, said: str) -> None:
    raw = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(raw | {"rope_precision": said}))
    found = {asked: load_model(copy, rope_precision=asked).config.rope_precision for asked in ("checkpoint", "float32")}
    assert found == {"checkpoint": said, "float32": "float32"}


def test_folders_that_cannot_be_loaded(copy: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such model folder"):
        load_model(tmp_path / "nowhere")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        load_model(empty)
    shutil.copy(copy / "config.json", empty)
    with pytest.raises(CheckpointError, match="no weights"):
        load_model(empty)
    (empty / "config.json").write_text("{nonsense")
    with pytest.raises(CheckpointError, match=r"config\.json: not valid JSON"):
        load_model(empty)


def test_a_missing_shard_and_a_truncated_one_are_named(copy: Path) -> None:
    first, second = sorted(copy.glob("model-*.safetensors"))[:2]
    content = first.read_bytes()
    first.write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match=f"{first.name}: .* bytes; expected"):
        load_model(copy)
    first.write_bytes(content[:4])
    with pytest.raises(CheckpointError, match=f"{first.name}: 4 bytes"):
        load_model(copy)
    first.write_bytes(content)
    second.unlink()
    with pytest.raises(CheckpointError, match=f"shards are missing: {second.name}"):
        load_model(copy)
