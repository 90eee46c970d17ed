"""The random checkpoint has the published layout, to the byte, and a tiny one of it loads and answers."""

from __future__ import annotations

import json
import math
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cogtune.bench.checkpoint import make_checkpoint, plan_shards
from cogtune.checkpoint.load import load_model
from cogtune.checkpoint.model_files import INDEX_NAME, load_model_config
from cogtune.checkpoint.random import (
    published_config,
    published_first_config,
    published_video_config,
    write_published_config,
)
from cogtune.errors import DiskFullError, OutputFolderError
from cogtune.processing.processor import CogVLM2Processor
from tests.support.batches import picture_batch

PUBLISHED = [  # payload bytes and tensors of the published checkpoint's eight files
    (4_943_114_880, 65), (4_999_783_168, 82), (4_949_422_720, 75), (4_999_783_168, 82),
    (4_999_783_168, 82), (4_953_000_960, 148), (4_945_809_408, 434), (4_215_517_184, 253),
]  # fmt: skip


def test_the_full_size_has_the_published_shards() -> None:
    shards = plan_shards(published_config())
    assert [(sum(2 * math.prod(s) for s in shard.values()), len(shard)) for shard in shards] == PUBLISHED
    assert sum(size for size, _ in PUBLISHED) == 39_006_214_656
    held = [set(shard) for shard in shards]
    assert "model.layers.4.mlp.language_mlp.up_proj.weight" in held[0]
    assert "model.layers.4.mlp.language_mlp.down_proj.weight" in held[1]
    assert "model.vision.transformer.layers.6.attention.dense.weight" in held[5]
    assert "model.vision.transformer.layers.42.mlp.fc1.weight" in held[6]
    assert "model.vision.transformer.layers.42.mlp.fc2.weight" in held[7]
    assert {"lm_head.weight", "model.vision.conv.weight"} <= held[7]


def test_the_video_preset_has_the_published_shards() -> None:
    shards = plan_shards(published_video_config())
    assert [len(shard) for shard in shards] == [74, 91, 89, 438, 336, 1]
    assert sum(2 * math.prod(shape) for shard in shards for shape in shard.values()) == 25_015_065_088
    # the published files' sizes, with the headers that transformers writes
    files = [4_976_699_712, 4_999_803_504, 4_915_917_160, 4_956_242_104, 4_115_863_248, 1_050_673_280]
    for shard, size in zip(shards, files, strict=True):
        assert 0 <= size - sum(2 * math.prod(shape) for shape in shard.values()) < 150 * (len(shard) + 1)


def test_the_first_preset_has_the_published_size() -> None:
    shards = plan_shards(published_first_config())
    total = sum(2 * math.prod(shape) for shard in shards for shape in shard.values())
    assert total == 2 * 17_639_685_376 + 32 * 128  # and the layers' copies of the rotary table
    assert len(shards) == 8


def test_its_configuration_lacks_the_keys_that_the_published_one_lacks(tmp_path: Path) -> None:
    write_published_config(tmp_path, published_config())
    raw = json.loads((tmp_path / "config.json").read_text())
    assert not {"num_multi_query_heads", "tie_word_embeddings", "model_type", "torch_dtype"} & set(raw)
    assert set(raw) == {
        "architectures", "auto_map", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "max_position_embeddings", "rms_norm_eps", "hidden_act", "initializer_range", "template_version",
        "bos_token_id", "eos_token_id", "pad_token_id", "vocab_size", "use_cache", "vision_config",
    }  # fmt: skip
    config = load_model_config(tmp_path)
    assert (config.num_multi_query_heads, config.eos_token_ids, config.num_image_tokens) == (8, [128001, 128009], 2306)


def test_a_tiny_one_loads_and_answers(tmp_path: Path) -> None:
    lines: list[str] = []
    made = make_checkpoint(tmp_path / "m", preset="tiny", device=torch.device("cpu"), seed=3, progress=lines.append)
    assert made.shards == len(lines) == len(list((tmp_path / "m").glob("*.safetensors"))) > 1
    index = json.loads((tmp_path / "m" / INDEX_NAME).read_text())
    assert index["metadata"]["total_size"] == made.bytes
    stored = {n: t for file in (tmp_path / "m").glob("*.safetensors") for n, t in load_file(file).items()}
    assert sorted(stored) == list(index["weight_map"])
    assert {value.dtype for value in stored.values()} == {torch.bfloat16}
    assert float(stored["lm_head.weight"].float().std()) == pytest.approx(0.02, rel=0.05)
    assert torch.equal(stored["model.norm.weight"], torch.ones(64, dtype=torch.bfloat16))
    model = load_model(tmp_path / "m", dtype=torch.bfloat16)
    assert torch.isfinite(model(**picture_batch()).logits).all()
    CogVLM2Processor.from_pretrained(tmp_path / "m")
    again = make_checkpoint(tmp_path / "again", preset="tiny", device=torch.device("cpu"), seed=3)
    assert again.bytes == made.bytes
    for file in (tmp_path / "m").iterdir():
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()


def test_too_little_space_and_a_folder_in_use_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda path: usage(10**11, 9 * 10**10, 10**10))
        with pytest.raises(DiskFullError, match=r"10.0 GB free; the checkpoint takes 39.0 GB"):
            make_checkpoint(tmp_path / "full", device=torch.device("cpu"))
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").touch()
    with pytest.raises(OutputFolderError, match="not an empty folder"):
        make_checkpoint(tmp_path / "used", preset="tiny", device=torch.device("cpu"))
