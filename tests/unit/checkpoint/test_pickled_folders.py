"""Folders of ``.bin`` files, and the published 4-bit folders: they do what a folder of safetensors files does."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from cogtune.adapters.attach import attach, load_adapter, save_adapter
from cogtune.adapters.merge import merge
from cogtune.checkpoint.fingerprint import model_fingerprint, tower_fingerprint
from cogtune.checkpoint.load import load_model, load_tower
from cogtune.checkpoint.model_files import INDEX_NAME, PICKLED_INDEX_NAME, PICKLED_NAME, stored_tensors
from cogtune.configuration.answer_config import AnswerConfig
from cogtune.configuration.quantization import QuantSection
from cogtune.configuration.resolve import as_stored
from cogtune.configuration.run_config import LoraSection
from cogtune.errors import CheckpointError, ConfigError
from tests.support.adapters import write_adapter
from tests.support.batches import picture_batch
from tests.support.four_bit import four_bit_values
from tests.support.packed import int4_folder, packed_shards, pickled_folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shards", [0, 3])
def test_a_folder_of_bin_files_is_the_same_model(
    tiny_checkpoint: Path, tmp_path: Path, dtype: torch.dtype, shards: int
) -> None:
    folder = pickled_folder(tiny_checkpoint, tmp_path / "bin", dtype, shards=shards)
    found, expected = load_model(folder).state_dict(), load_model(tiny_checkpoint).state_dict()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value.to(dtype).float()), name
    assert load_tower(folder, dtype=torch.float32, device="cpu")
    assert model_fingerprint(folder) != model_fingerprint(tiny_checkpoint)
    same = shutil.copytree(folder, tmp_path / "same")
    assert (model_fingerprint(same), tower_fingerprint(same)) == (model_fingerprint(folder), tower_fingerprint(folder))


def test_a_merge_into_bin_files_is_the_merge_into_safetensors_files(tiny_checkpoint: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tiny_checkpoint, tmp_path / "adapter", targets=["experts", "vision-tower"])
    merge(adapter, tmp_path / "merged", tiny_checkpoint)
    expected = {name: tensor.shape for name, tensor in stored_tensors(tmp_path / "merged").items()}
    for shards in (0, 2):
        folder = pickled_folder(tiny_checkpoint, tmp_path / f"bin{shards}", torch.bfloat16, shards=shards)
        report = merge(adapter, tmp_path / f"merged{shards}", folder)
        assert {name: t.shape for name, t in stored_tensors(tmp_path / f"merged{shards}").items()} == expected
        names = {path.name for path in (tmp_path / f"merged{shards}").iterdir()}
        assert not [name for name in names if "pytorch_model" in name]
        assert (INDEX_NAME in names) == (shards > 1)
        size = sum(path.stat().st_size for path in (tmp_path / f"merged{shards}").iterdir())
        assert size == pytest.approx(report.bytes, rel=0.05)
        with torch.no_grad():
            one, two = (load_model(tmp_path / n)(**picture_batch()).logits for n in ("merged", f"merged{shards}"))
        assert torch.equal(one, two)


def test_the_published_4_bit_folder_stays_in_4_bits(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Logits and LoRA gradients are those of the dequantised weights: float32, only the order of sums differs."""
    pytest.importorskip("bitsandbytes")
    meant = int4_folder(tiny_checkpoint, tmp_path / "int4")
    model, plain = load_model(tmp_path / "int4"), load_model(tmp_path / "int4")
    for name, value in meant.items():
        layer = model.get_submodule(name.removesuffix(".weight"))
        assert (layer.quant_state.quant_type, layer.quant_state.nested) == ("fp4", False)
        assert torch.equal(four_bit_values(layer.weight.data, layer.quant_state).float(), value.float())
        linear = torch.nn.Linear(*reversed(value.shape), bias=layer.bias is not None)
        linear.weight.data, linear.bias = value.float(), layer.bias
        plain.set_submodule(name.removesuffix(".weight"), linear.requires_grad_(False))
    held = {n for n, m in model.named_modules() if type(m) is torch.nn.Linear}
    assert held == {"lm_head"}, "every linear layer but the head is in 4 bits"
    with torch.no_grad():
        found, expected = (one(**picture_batch()).logits for one in (model, plain))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    losses, grads = [], []
    for base in (model, plain):
        torch.manual_seed(0)
        wrapped = attach(base, LoraSection(targets=("experts", "vision-tower", "glu-adapter"), rank=4)).train()
        generator = torch.Generator().manual_seed(1)
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
        loss = wrapped(**picture_batch(labels=True)).loss
        loss.backward()
        losses.append(float(loss.detach()))
        grads.append({name: p.grad for name, p in wrapped.named_parameters() if p.grad is not None})
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert grads[0].keys() == grads[1].keys()
    for name, value in grads[1].items():
        torch.testing.assert_close(grads[0][name], value, rtol=1e-4, atol=2e-5 * float(value.abs().max()), msg=name)


@pytest.mark.parametrize("form", ["one .bin", "shards"])
def test_a_merge_into_4_bits_gives_a_model_of_plain_numbers(tiny_checkpoint: Path, tmp_path: Path, form: str) -> None:
    base = tmp_path / "int4"
    make = int4_folder if form == "one .bin" else packed_shards
    meant = make(tiny_checkpoint, base, "fp4")
    model = attach(load_model(base), LoraSection(targets=("experts", "glu-adapter"), rank=4))
    for name, value in model.named_parameters():
        if "lora_" in name:
            value.data = 0.1 * torch.randn(value.shape, generator=torch.Generator().manual_seed(1))
    save_adapter(model, tmp_path / "adapter")
    report = merge(tmp_path / "adapter", tmp_path / "merged", base)
    assert any("dequantised" in line for line in report.notes)
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    merged, adapted = load_model(tmp_path / "merged"), load_adapter(load_model(base), tmp_path / "adapter")
    untouched = next(name for name in meant if "vision.transformer" in name)
    assert torch.equal(merged.state_dict()[untouched], meant[untouched].float())
    with torch.no_grad():
        one, two = merged(**picture_batch()).logits, adapted(**picture_batch()).logits
    # the sum is rounded once to the stored format, float16 in the .bin
    torch.testing.assert_close(one, two, rtol=0, atol=5e-3 if form == "one .bin" else 1e-4)


def test_the_stored_format_decides_and_another_is_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    int4_folder(tiny_checkpoint, tmp_path / "int4")
    base = str(tmp_path / "int4")
    assert as_stored(AnswerConfig(), base).quant == QuantSection(experts="fp4", tower="fp4")
    assert as_stored(AnswerConfig(), str(tiny_checkpoint)).quant == QuantSection()
    asked = AnswerConfig(quant=QuantSection(tower="int8"))
    with pytest.raises(ConfigError, match=r"quant\.tower int8: the weights in .*int4 are stored in fp4"):
        as_stored(asked, base)
    with pytest.raises(ConfigError, match=r"quant\.experts nf4: .* are stored in fp4 and stay so"):
        load_model(base, quantization=QuantSection(experts="nf4"))


def test_where_both_kinds_lie_the_safetensors_files_are_read(
    tiny_checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    both = pickled_folder(tiny_checkpoint, tmp_path / "both", torch.bfloat16)
    for file in tiny_checkpoint.glob("*.safetensors*"):
        shutil.copy(file, both)
    load_model(both)
    assert "pytorch_model.bin beside it is not" in caplog.text
    next(both.glob("*.safetensors")).unlink()
    with pytest.raises(CheckpointError, match="shards are missing") as caught:
        load_model(both)
    assert f"move {INDEX_NAME} away, and {PICKLED_NAME} is read instead" in str(caught.value.hint)
    (both / INDEX_NAME).unlink()
    assert load_model(both)


def test_faults_of_bin_folders_are_named(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = pickled_folder(tiny_checkpoint, tmp_path / "bin", shards=2)
    second = "pytorch_model-00002-of-00002.bin"
    index = json.loads((folder / PICKLED_INDEX_NAME).read_text())
    (folder / PICKLED_INDEX_NAME).rename(folder / "away")
    with pytest.raises(CheckpointError, match=f"2 weight files .* without the index .* {PICKLED_INDEX_NAME}"):
        load_model(folder)
    (folder / PICKLED_INDEX_NAME).write_text(json.dumps(index))
    (folder / second).rename(folder / "gone")
    with pytest.raises(CheckpointError, match=f"1 of 2 shards are missing: {second}"):
        load_model(folder)
    torch.save({"model.stranger.weight": torch.zeros(2)}, folder / second)
    with pytest.raises(CheckpointError, match=rf"{second}: the index places .* here"):
        load_model(folder)
    weights = torch.load(folder / "gone", weights_only=True)
    torch.save(weights | {"model.stranger.weight": torch.zeros(2)}, folder / second)
    with pytest.raises(CheckpointError, match=r"1 left over: model\.stranger\.weight"):
        load_model(folder)


OTHERS = {
    "GPTQ": {"quant_method": "gptq", "bits": 4},
    "AWQ": {"quant_method": "awq", "bits": 4},
    "bitsandbytes in 8 bits": {"quant_method": "bitsandbytes", "load_in_8bit": True},
    "mxfp9": {"quant_method": "mxfp9"},
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_quantisation_is_named_with_what_to_use_instead(
    tiny_checkpoint: Path, tmp_path: Path, name: str
) -> None:
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": OTHERS[name]}))
    with pytest.raises(CheckpointError, match=f"stored quantised by {name}") as caught:
        load_model(folder)
    assert caught.value.code == "checkpoint-quantised"
    assert "--quant.experts nf4" in str(caught.value.hint)
