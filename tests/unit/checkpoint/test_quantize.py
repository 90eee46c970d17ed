"""Quantised while loading: the layers asked for, the bytes expected, the numbers of a slow dequantised reference."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from cogtune import CogVLM2ForCausalLM
from cogtune.adapters.attach import attach, load_adapter, save_adapter
from cogtune.checkpoint.load import load_model, load_tower
from cogtune.configuration.quantization import QuantSection
from cogtune.configuration.run_config import LoraSection
from cogtune.errors import CheckpointError, SetupError
from cogtune.model.quantized.host_embedding import HostEmbedding
from tests.support.batches import picture_batch
from tests.support.four_bit import four_bit_values
from tests.support.packed import packed_shards

bnb = pytest.importorskip("bitsandbytes")

EVERYTHING = QuantSection(experts="nf4", tower="int8", embedding="host")


def held_bytes(module: nn.Module) -> int:
    """Of a linear layer's weight: numbers, scales and, where scales are quantised too, their own."""
    if isinstance(module, bnb.nn.Linear4bit):
        state = module.quant_state
        parts = [module.weight, state.absmax, state.state2.absmax]
    elif isinstance(module, bnb.nn.Linear8bitLt):
        parts = [module.weight, module.state.SCB]
    else:
        parts = [module.weight]
    return sum(part.numel() * part.element_size() for part in parts)


def dequantised(layer: nn.Module) -> torch.Tensor:
    """By other ways than the layers' forward."""
    if isinstance(layer, bnb.nn.Linear4bit):
        return four_bit_values(layer.weight.data, layer.quant_state)
    return bnb.functional.int8_vectorwise_dequant(layer.weight.data, layer.state.SCB)


def reference_of(base: Path, quantised: CogVLM2ForCausalLM) -> CogVLM2ForCausalLM:
    """A plain model whose weights are those that the quantised one stands for."""
    plain = load_model(base)
    for name, layer in quantised.named_modules():
        if isinstance(layer, bnb.nn.Linear4bit | bnb.nn.Linear8bitLt):
            plain.get_submodule(name).weight.data = dequantised(layer).float()
    return plain


@pytest.fixture(scope="module")
def quantised(tiny_checkpoint: Path) -> CogVLM2ForCausalLM:
    return load_model(tiny_checkpoint, quantization=EVERYTHING)


def test_each_part_has_its_format_and_its_bytes(quantised: CogVLM2ForCausalLM) -> None:
    plain_kinds = {}
    layer = "model.layers.1.mlp.vision_mlp.up_proj"  # 96 x 64: half a byte each, a byte a block of 64, one float32
    plain_kinds[layer] = (bnb.nn.Linear4bit, 96 * 64 // 2 + 96 + 4)
    plain_kinds["model.layers.0.self_attn.language_expert_query_key_value"] = (bnb.nn.Linear4bit, 128 * 32 + 128 + 4)
    plain_kinds["model.vision.transformer.layers.1.mlp.fc1"] = (bnb.nn.Linear8bitLt, 48 * 32 + 48 * 4)
    for name, (kind, size) in plain_kinds.items():
        module = quantised.get_submodule(name)
        assert isinstance(module, kind), name
        assert held_bytes(module) == size, name
    linears = {n: m for n, m in quantised.named_modules() if isinstance(m, nn.Linear)}
    plain = {n.split(".linear_proj.")[0] for n, m in linears.items() if type(m) is nn.Linear}
    assert plain == {"lm_head", "model.vision"}, "the head and the layers between tower and decoder"
    assert isinstance(quantised.model.embed_tokens, HostEmbedding)
    assert not [n for n, _ in quantised.named_parameters() if "embed_tokens" in n]


@pytest.mark.parametrize("asked", [EVERYTHING, QuantSection(experts="int8", tower="nf4")], ids=["nf4", "int8"])
def test_losses_and_gradients_are_those_of_the_dequantised_weights(tiny_checkpoint: Path, asked: QuantSection) -> None:
    """float32 throughout: only the order of sums differs (2e-5 of the largest value)."""
    model = load_model(tiny_checkpoint, quantization=asked)
    plain = reference_of(tiny_checkpoint, model)
    batch, found = picture_batch(labels=True), []
    for base in (model, plain):
        torch.manual_seed(0)
        wrapped = attach(base, LoraSection(targets=("experts", "vision-tower", "glu-adapter"), rank=4)).train()
        generator = torch.Generator().manual_seed(1)
        for name, value in wrapped.named_parameters():
            if "lora_" in name:
                value.data = 0.1 * torch.randn(value.shape, generator=generator)
        loss = wrapped(**batch).loss
        loss.backward()
        grads = {name: value.grad for name, value in wrapped.named_parameters() if value.grad is not None}
        found.append((loss, grads))
    (loss, grads), (expected, wanted) = found
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    assert grads.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(grads[name], value, rtol=1e-4, atol=2e-5 * float(value.abs().max()), msg=name)


def test_text_alone_runs_through_every_layer(quantised: CogVLM2ForCausalLM) -> None:
    """No token for the vision expert: its layers get zero rows, with and without gradients."""
    ids = torch.tensor([[256, 65, 66, 67]])
    logits = quantised(ids).logits
    with torch.no_grad():
        torch.testing.assert_close(quantised(ids).logits, logits)


@pytest.mark.parametrize("form", ["nf4", "int8"])
@pytest.mark.parametrize("lora", [{}, {"dora": True}, {"rslora": True}], ids=["lora", "dora", "rslora"])
def test_an_adapter_trained_on_it_loads_on_the_plain_model(
    tiny_checkpoint: Path, tmp_path: Path, form: str, lora: dict[str, Any]
) -> None:
    base = load_model(tiny_checkpoint, dtype=torch.bfloat16, quantization=QuantSection(experts=form))
    model = attach(base, LoraSection(rank=4, **lora)).train()
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    assert {value.dtype for value in trained.values()} == {torch.float32}
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model(**picture_batch(labels=True)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.5
    save_adapter(model, tmp_path)
    plain = load_adapter(load_model(tiny_checkpoint, dtype=torch.bfloat16), tmp_path).eval()
    with torch.no_grad():
        adapted = float(plain(**picture_batch(labels=True)).loss)
        without = float(load_model(tiny_checkpoint, dtype=torch.bfloat16)(**picture_batch(labels=True)).loss)
    assert adapted < without - 0.3


def test_recomputation_keeps_no_inputs_of_int8_layers(tiny_checkpoint: Path) -> None:
    """bitsandbytes' own layer keeps its input outside what recomputation controls."""
    model = load_model(tiny_checkpoint, quantization=QuantSection(experts="int8"))
    layer = model.model.layers[0].mlp.vision_mlp.up_proj
    kept: list[tuple[int, ...]] = []

    def pack(value: torch.Tensor) -> torch.Tensor:
        kept.append(tuple(value.shape))
        return value

    x = torch.randn(5, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        product = layer(x)
    assert (5, 64) not in kept
    assert not [value for value in vars(product.grad_fn).values() if isinstance(value, torch.Tensor)]


def test_a_tower_alone_can_be_quantised(tiny_checkpoint: Path) -> None:
    tower = load_tower(tiny_checkpoint, dtype=torch.float32, device="cpu", quantization=QuantSection(tower="nf4"))
    assert isinstance(tower.transformer.layers[0].mlp.fc1, bnb.nn.Linear4bit)
    whole = load_model(tiny_checkpoint, quantization=QuantSection(tower="nf4"))
    pixels = picture_batch()["pixel_values"]
    with torch.no_grad():
        assert torch.equal(tower.features(pixels), whole.model.encode_images(pixels))


def test_fp8_is_made_by_its_own_layer(tiny_checkpoint: Path) -> None:
    from cogtune.model.quantized.fp8 import Fp8Linear

    model = load_model(tiny_checkpoint, quantization=QuantSection(experts="fp8", tower="fp8"))
    assert isinstance(model.model.layers[0].mlp.language_mlp.up_proj, Fp8Linear)
    fused = "model.layers.0.self_attn.vision_expert_query_key_value"
    assert torch.equal(model.get_submodule(fused).bias, load_model(tiny_checkpoint).get_submodule(fused).bias)
    assert torch.isfinite(model(**picture_batch()).logits).all()


def test_without_bitsandbytes_the_error_says_what_to_install(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SetupError, match="nf4 weights need bitsandbytes") as caught:
        load_model(tiny_checkpoint, quantization=QuantSection(tower="nf4"))
    assert 'pip install "cogtune[quant]"' in str(caught.value.hint)


@pytest.mark.parametrize("kind", ["fp4", "nf4"])
def test_a_folder_in_bitsandbytes_layout_loads(tiny_checkpoint: Path, tmp_path: Path, kind: str) -> None:
    """The parts of a layer lie in both files."""
    meant = packed_shards(tiny_checkpoint, tmp_path / "packed", kind)
    model = load_model(tmp_path / "packed")
    plain = load_model(tiny_checkpoint)
    for name, value in meant.items():
        layer = model.get_submodule(name.removesuffix(".weight"))
        assert isinstance(layer, bnb.nn.Linear4bit), name
        assert torch.equal(dequantised(layer).float(), value.float()), name
        plain.get_submodule(name.removesuffix(".weight")).weight.data = value.float()
    with torch.no_grad():
        found, expected = (one(**picture_batch()).logits for one in (model, plain))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert load_model(tmp_path / "packed", vision_tower=False)
    assert load_tower(tmp_path / "packed", dtype=torch.float32, device="cpu")


def test_a_packed_layer_of_another_shape_is_named(tiny_checkpoint: Path, tmp_path: Path) -> None:
    packed_shards(tiny_checkpoint, tmp_path / "packed", "fp4")
    config = json.loads((tmp_path / "packed" / "config.json").read_text())
    (tmp_path / "packed" / "config.json").write_text(json.dumps(config | {"intermediate_size": 128}))
    with pytest.raises(CheckpointError, match=r"down_proj.*has shape \[64, 96\], expected \[64, 128\]"):
        load_model(tmp_path / "packed")
