"""A merge into NF4, int8 or fp8: what it stores is what loading would make of the exact sum."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from cogtune.adapters.merge import merge
from cogtune.checkpoint.load import load_model
from cogtune.checkpoint.model_files import check_folder
from cogtune.cli.main import main
from cogtune.configuration.quantization import QuantSection
from cogtune.errors import CheckpointError, CogtuneError, ConfigError
from cogtune.model.modeling import CogVLM2ForCausalLM
from cogtune.plan.sizes import ModelSizes
from tests.support.adapters import write_adapter
from tests.support.golden import golden_images

FORMATS = ["nf4", "int8", "fp8"]


@pytest.fixture(scope="module")
def adapter(tiny_checkpoint, tmp_path_factory):
    torch.manual_seed(0)  # of the adapter's initial weights
    return write_adapter(tiny_checkpoint, tmp_path_factory.mktemp("adapter"), targets=("experts",))


@pytest.fixture(scope="module")
def still(tiny_checkpoint, tmp_path_factory):
    """An adapter that changes nothing."""
    folder = write_adapter(tiny_checkpoint, tmp_path_factory.mktemp("still"), targets=("experts",))
    weights = load_file(folder / "adapter_model.safetensors")
    save_file({name: 0 * value for name, value in weights.items()}, folder / "adapter_model.safetensors")
    return folder


def logits(model: CogVLM2ForCausalLM) -> torch.Tensor:
    ids = torch.tensor([[256, *[258] * 6, 70, 71, 72]])
    types = torch.zeros_like(ids)
    types[0, 1:7] = 1
    with torch.no_grad():
        return model(input_ids=ids, token_type_ids=types, pixel_values=golden_images(1)).logits


def quantised(form: str) -> QuantSection:
    return QuantSection.model_validate({"experts": form, "tower": form})


@pytest.mark.parametrize("form", FORMATS)
def test_an_adapter_of_zeros_gives_the_base_as_loading_quantises_it(tiny_checkpoint, still, tmp_path, form):
    merge(still, tmp_path / "merged", tiny_checkpoint, quant=form)
    there = load_model(tmp_path / "merged")
    here = load_model(tiny_checkpoint, quantization=quantised(form))
    assert torch.equal(logits(there), logits(here))


@pytest.mark.parametrize("form", FORMATS)
def test_the_update_is_in_the_stored_weights(tiny_checkpoint, adapter, tmp_path, form):
    """As far as the format's own rounding allows: the plain merge, quantised while it loads, is as far from it. The two
    quantise sums that differ by bfloat16's rounding, which moves results by less than the format's rounding does."""
    merge(adapter, tmp_path / "plain", tiny_checkpoint)
    report = merge(adapter, tmp_path / "packed", tiny_checkpoint, quant=form)
    whole, base = load_model(tmp_path / "plain"), load_model(tiny_checkpoint)
    exact, other = logits(whole), logits(base)
    packed = logits(load_model(tmp_path / "packed"))
    loaded = logits(load_model(tmp_path / "plain", quantization=quantised(form)))
    assert float((packed - loaded).norm()) < float((loaded - exact).norm())
    assert float((packed - exact).norm()) < float((packed - other).norm())
    assert report.changed == 2 * 2 * 5  # layers, experts, linear layers of each
    assert form in report.notes[0]


def test_the_folder_is_small_whole_and_says_what_it_is(tiny_checkpoint, adapter, tmp_path):
    sizes = {}
    for form in ("none", *FORMATS):
        folder = tmp_path / form
        merge(adapter, folder, tiny_checkpoint, quant=form)
        check_folder(folder)
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        held = {}
        for shard in sorted(folder.glob("*.safetensors")):
            with safe_open(shard, "pt") as opened:
                held |= dict.fromkeys(opened.keys(), shard.name)
        assert index["weight_map"] == held
        sizes[form] = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    assert sizes["nf4"] < sizes["int8"] < sizes["none"]
    config = json.loads((tmp_path / "fp8" / "config.json").read_text())
    assert config["quantization_config"] == {"quant_method": "cogtune", "format": "fp8"}
    assert ModelSizes.from_config(config).stored.kind == "fp8"


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


@pytest.mark.parametrize("form", FORMATS)
def test_what_another_merge_dequantises_errs_by_the_formats_own_rounding(tiny_checkpoint, still, tmp_path, form):
    """Weight by weight against those that were quantised; a whole model's results would hide a scale 1 % off."""
    merge(still, tmp_path / "packed", tiny_checkpoint, quant=form)
    merge(still, tmp_path / "plain", tmp_path / "packed")
    exact, found, parts = weights(tiny_checkpoint), weights(tmp_path / "plain"), set(weights(tmp_path / "packed"))
    packed = {name.partition(".weight.")[0] + ".weight" for name in parts if ".weight." in name}
    assert len(packed) > 20
    for name in packed:
        wanted, off = exact[name].double(), (found[name].double() - exact[name].double()).abs()
        # what is dequantised is stored in bfloat16
        largest, rounding = wanted.abs().amax(1, keepdim=True), wanted.abs() / 256
        if form == "int8":  # half of a step: 127 of them are the row's largest weight
            assert (off <= largest / 254 + rounding).all(), name
        elif form == "fp8":  # half of a unit of three bits, or of the smallest number
            assert (off <= torch.maximum(wanted.abs() / 16, largest / 448 * 2**-10) + rounding).all(), name
        else:  # 16 values for a normal distribution
            assert float(off.norm() / wanted.norm()) < 0.1, name
        scale = float((found[name].double() * wanted).sum() / wanted.square().sum())
        assert scale == pytest.approx(1, abs=0.02 if form == "nf4" else 5e-3), name


@pytest.mark.parametrize("form", FORMATS)
def test_a_merged_folder_is_a_base_like_any_other(tiny_checkpoint, adapter, still, tmp_path, form):
    """Another merge dequantises it, and asking for another format is refused."""
    merge(adapter, tmp_path / "packed", tiny_checkpoint, quant=form)
    merge(still, tmp_path / "plain", tmp_path / "packed")
    again, packed = load_model(tmp_path / "plain"), load_model(tmp_path / "packed")
    # bfloat16 rounds what a code stands for
    assert float((logits(again) - logits(packed)).norm()) < 0.1 * float(logits(packed).norm())
    other = "int8" if form != "int8" else "nf4"
    with pytest.raises(ConfigError, match=f"are stored in {form}"):
        load_model(tmp_path / "packed", quantization=quantised(other))


def test_chat_takes_the_format_of_the_folder(tiny_checkpoint, adapter, tmp_path, capsys):
    merge(adapter, tmp_path / "packed", tiny_checkpoint, quant="int8")
    words = ["chat", "--model", str(tmp_path / "packed"), "--query", "hello", "--max-new-tokens", "3"]
    assert main(words) == 0


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"quant": "int4"}, "int4"),
        ({"quant": "nf4", "rounding": "stochastic"}, "rounding stochastic"),
        ({"quant": "int8", "layout": "transformers"}, "layout transformers"),
    ],
)
def test_what_makes_no_sense_is_refused(tiny_checkpoint, adapter, tmp_path, changes, said):
    with pytest.raises(ConfigError, match=said):
        merge(adapter, tmp_path / "merged", tiny_checkpoint, **changes)
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("damage", ["scale of another length", "another format", "no scale"])
def test_a_damaged_folder_is_named(tiny_checkpoint, still, tmp_path, damage):
    merge(still, tmp_path / "merged", tiny_checkpoint, quant="fp8")
    config = tmp_path / "merged" / "config.json"
    if damage == "another format":
        changed = json.loads(config.read_text()) | {"quantization_config": {"quant_method": "cogtune", "format": "x"}}
        config.write_text(json.dumps(changed))
    else:
        index = json.loads((tmp_path / "merged" / "model.safetensors.index.json").read_text())
        name, place = next(pair for pair in index["weight_map"].items() if pair[0].endswith(".scale.fp8"))
        shard = tmp_path / "merged" / place
        weights = load_file(shard)
        weights[name] = weights[name][:-1].clone()
        if damage == "no scale":
            del weights[name]
        save_file(weights, shard, metadata={"format": "pt"})
    with pytest.raises(CheckpointError) as raised:
        load_model(tmp_path / "merged")
    assert isinstance(raised.value, CogtuneError)
