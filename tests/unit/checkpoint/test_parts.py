"""The loader reads what is asked for and nothing else, in pieces of any size, and hands complete units on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from cogtune import CogVLM2ForCausalLM
from cogtune.checkpoint import stream as streaming
from cogtune.checkpoint.load import load_model, load_tower
from cogtune.checkpoint.model_files import INDEX_NAME, stored_tensors
from cogtune.errors import CheckpointError
from tests.support.batches import picture_batch

TOWER = ("model.vision.patch_embedding.", "model.vision.transformer.", "model.vision.conv.")


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the tensors that are read from now on."""
    found: list[str] = []

    def spy(tensors: Any, device_for: Any) -> Any:
        for tensor, value in streaming.stream(tensors, device_for):
            found.append(tensor.name)
            yield tensor, value

    monkeypatch.setattr("cogtune.checkpoint.load.stream", spy)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_what_transformers_loads(tiny_checkpoint: Path, dtype: torch.dtype) -> None:
    ours = load_model(tiny_checkpoint, dtype=dtype)
    theirs = CogVLM2ForCausalLM.from_pretrained(tiny_checkpoint, dtype=dtype).eval()
    expected = theirs.state_dict()
    assert list(ours.state_dict()) == list(expected)
    for name, value in ours.state_dict().items():
        assert value.dtype == expected[name].dtype
        assert torch.equal(value, expected[name]), name
    assert [p.requires_grad for p in ours.parameters()] == [p.requires_grad for p in theirs.parameters()]
    assert ours.generation_config.to_dict() == theirs.generation_config.to_dict()
    assert ours.config.to_dict() == theirs.config.to_dict()
    assert ours.name_or_path == theirs.name_or_path
    assert torch.equal(ours.model.rotary_frequencies, theirs.model.rotary_frequencies)
    assert not any(module.training for module in ours.modules())


@pytest.mark.parametrize("piece", [7, 1000])
def test_tensors_are_put_together_from_pieces(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, piece: int
) -> None:
    whole = load_model(tiny_checkpoint).state_dict()
    monkeypatch.setattr(streaming, "PIECE", piece)
    stored = [t for t in stored_tensors(tiny_checkpoint).values() if t.stop - t.start < 5000]
    cpu = torch.device("cpu")
    for tensor, value in streaming.stream(stored, lambda name: cpu):
        assert torch.equal(value.float(), whole[tensor.name]), tensor.name


def test_without_its_tower_a_model_reads_none_and_takes_features(tiny_checkpoint: Path, reads: list[str]) -> None:
    model = load_model(tiny_checkpoint, vision_tower=False)
    assert reads
    assert not [name for name in reads if name.startswith(TOWER)]
    assert not [name for name, _ in model.named_parameters() if name.startswith(TOWER)]
    whole = load_model(tiny_checkpoint)
    inputs = picture_batch()
    expected = whole(**inputs).logits
    features = whole.model.encode_images(inputs["pixel_values"])
    found = model(**{k: v for k, v in inputs.items() if k != "pixel_values"}, image_features=features).logits
    assert torch.equal(found, expected)
    with pytest.raises(ValueError, match="without its vision tower: give image_features"):
        model(**inputs)


def test_a_tower_alone_reads_only_itself_and_computes_the_same(tiny_checkpoint: Path, reads: list[str]) -> None:
    tower = load_tower(tiny_checkpoint, dtype=torch.float32, device="cpu")
    assert reads
    assert all(name.startswith(TOWER) for name in reads)
    whole = load_model(tiny_checkpoint)
    pixels = picture_batch()["pixel_values"]
    assert torch.equal(tower.features(pixels), whole.model.encode_images(pixels))


def test_left_out_parts_need_not_be_there(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Neither missing where they are not read, nor left over where they are."""
    copy = Path(shutil.copytree(tiny_checkpoint, tmp_path / "copy"))
    index = json.loads((copy / INDEX_NAME).read_text())
    from safetensors.torch import load_file, save_file

    for file in copy.glob("*.safetensors"):
        kept = {name: value for name, value in load_file(file).items() if not name.startswith(TOWER)}
        save_file(kept, file, metadata={"format": "pt"})
    index["weight_map"] = {n: f for n, f in index["weight_map"].items() if not n.startswith(TOWER)}
    (copy / INDEX_NAME).write_text(json.dumps(index))
    load_model(copy, vision_tower=False)
    with pytest.raises(CheckpointError, match="missing"):
        load_model(copy)
    with pytest.raises(CheckpointError, match="missing"):
        load_tower(copy, dtype=torch.float32, device="cpu")


class Recorder:
    """A placement that looks at what it is given."""

    def __init__(self) -> None:
        self.finished: dict[str, nn.Module] = {}
        self.asked: set[str] = set()

    def device_for(self, name: str) -> torch.device:
        self.asked.add(name)
        return torch.device("cpu")

    def finish(self, unit_name: str, module: nn.Module) -> None:
        assert not [name for name, value in module.state_dict().items() if value.is_meta]
        assert unit_name not in self.finished
        self.finished[unit_name] = module


def test_units_are_handed_on_whole_and_once(tiny_checkpoint: Path) -> None:
    placement = Recorder()
    model = load_model(tiny_checkpoint, placement=placement)
    assert set(placement.finished) == {
        "model.embed_tokens", "lm_head", "model.layers.0", "model.layers.1", "model.vision.patch_embedding",
        "model.vision.transformer.layers.0", "model.vision.transformer.layers.1", "model.vision.linear_proj",
    }  # fmt: skip
    assert all(model.get_submodule(name) is module for name, module in placement.finished.items())
    assert placement.asked == set(model.state_dict())


def test_a_file_cut_short_while_it_is_read_is_an_error(tiny_checkpoint: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(tiny_checkpoint, tmp_path / "copy"))
    stored = stored_tensors(copy)
    last = list(stored.values())[-1]
    last.file.write_bytes(last.file.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match="ends too early"):
        list(streaming.stream([last], lambda name: torch.device("cpu")))
