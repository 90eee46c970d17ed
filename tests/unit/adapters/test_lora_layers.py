"""Our adapted layers against peft's own forward on the same weights."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

from cogtune.adapters.attach import attach, computed_by_peft
from cogtune.adapters.lora_conversion import convert_lora_layers
from cogtune.adapters.lora_layers import LoraLinear, plain_adapter
from cogtune.checkpoint.load import load_model
from cogtune.checkpoint.random import random_model, tiny_config
from cogtune.configuration.run_config import LoraSection, QuantSection

# Both round the update to the number format, peft twice more (update, scaled update): a few units in the last place.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2e-2}


class _Base(nn.Module):
    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(24, 40, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.linear(x)
        return result


def _model(dtype: torch.dtype, *, bias: bool = True, **settings: Any) -> Any:
    """An adapted model of peft's, the base in ``dtype``, the adapter in float32 with weights that count."""
    torch.manual_seed(0)
    config = peft.LoraConfig(**({"r": 4, "lora_alpha": 6.0, "target_modules": ["linear"]} | settings))
    model: Any = peft.get_peft_model(_Base(bias).to(dtype), config)
    layer = model.base_model.model.linear
    for matrix in (layer.lora_A, layer.lora_B):
        matrix["default"].weight = nn.Parameter(torch.randn_like(matrix["default"].weight, dtype=torch.float32))
    return model.train()


def _pefts(dtype: torch.dtype, **settings: Any) -> Any:
    """Its adapted layer."""
    return _model(dtype, **settings).base_model.model.linear


def _ours(dtype: torch.dtype, **settings: Any) -> Any:
    """The same layer, converted."""
    model = _model(dtype, **settings)
    convert_lora_layers(model)
    return model.base_model.model.linear


def _run(layer: Any, x: torch.Tensor) -> list[torch.Tensor]:
    x = x.clone().requires_grad_()
    torch.manual_seed(1)  # dropout
    out = layer(x)
    out.backward(torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape))
    gradients = [layer.lora_A["default"].weight.grad, layer.lora_B["default"].weight.grad]
    assert all(gradient.dtype == torch.float32 for gradient in gradients)
    return [out.detach(), x.grad, *gradients]  # type: ignore[list-item]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("shape", [(7, 24), (2, 7, 24), (0, 24)])
def test_output_and_gradients_are_pefts(dtype: torch.dtype, dropout: float, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    wanted = _run(_pefts(dtype, lora_dropout=dropout), x)
    layer = _ours(dtype, lora_dropout=dropout)
    assert plain_adapter(layer) == "default"
    for found, expected in zip(_run(layer, x), wanted, strict=True):
        assert found.dtype == expected.dtype
        error = (found.float() - expected.float()).norm() / expected.float().norm().clamp(min=1e-30)
        assert error <= TOLERANCE[dtype]


def test_activations_kept_for_the_backward_pass_are_the_input_once_and_the_small_product() -> None:
    layer = _ours(torch.bfloat16)
    x = torch.randn(512, 24, dtype=torch.bfloat16).requires_grad_()
    kept: dict[int, torch.Tensor] = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.data_ptr(), t), lambda t: t):
        layer(x)
    activations = sorted(tuple(t.shape) for t in kept.values() if 512 in t.shape)
    assert activations == [(512, 4), (512, 24)]


def test_whatever_it_does_not_know_is_left_to_peft() -> None:
    x = torch.randn(5, 24)
    for settings in ({"use_dora": True}, {"lora_bias": True}):
        layer, plain = _ours(torch.float32, **settings), _pefts(torch.float32, **settings)
        assert plain_adapter(layer) is None
        torch.testing.assert_close(layer(x), plain(x))
    layer = _ours(torch.float32)
    adapted, base = layer(x), layer.base_layer(x)
    layer.enable_adapters(False)
    assert torch.equal(layer(x), base)
    layer.enable_adapters(True)
    layer.merge()
    assert plain_adapter(layer) is None
    torch.testing.assert_close(layer(x), adapted)
    layer.unmerge()
    torch.testing.assert_close(layer(x), adapted)


def test_a_model_says_which_layers_peft_computes() -> None:
    assert computed_by_peft(attach(random_model(tiny_config(), seed=1), LoraSection())) == []
    names = computed_by_peft(attach(random_model(tiny_config(), seed=1), LoraSection(dora=True)))
    assert len(names) == 2 * 10


def test_conversion_changes_nothing_but_the_class_and_the_small_layers() -> None:
    torch.manual_seed(3)
    model = _model(torch.bfloat16, lora_dropout=0.4, use_rslora=True)
    before, names = model.base_model.model.linear, list(model.state_dict())
    hooked: list[int] = []
    before.register_forward_pre_hook(lambda *_: hooked.append(1))
    convert_lora_layers(model)
    after = model.base_model.model.linear
    assert type(after) is LoraLinear
    assert list(model.state_dict()) == names
    assert after.base_layer is before.base_layer
    assert after.scaling == before.scaling
    assert after.training
    after(torch.zeros(1, 24, dtype=torch.bfloat16))
    assert hooked
    convert_lora_layers(model)
    assert model.base_model.model.linear is after  # once is enough


def _pickled(layer: Any) -> Any:
    return pickle.loads(pickle.dumps(layer))


@pytest.mark.parametrize("copied", [copy.deepcopy, _pickled])
@pytest.mark.parametrize("form", ["none", "fp8", "nf4", "int8"])
def test_an_adapted_layer_can_be_copied_and_pickled(
    tiny_checkpoint: Path, form: str, copied: Callable[[Any], Any]
) -> None:
    """The copy computes the same and shares nothing."""
    if form in ("nf4", "int8"):
        pytest.importorskip("bitsandbytes")
    model = load_model(tiny_checkpoint, quantization=QuantSection(experts=form))
    attach(model, LoraSection(targets=["experts"], rank=4))
    layer: Any = model.get_submodule("model.layers.0.mlp.language_mlp.gate_proj")
    nn.init.normal_(layer.lora_B["default"].weight)
    x = torch.randn(3, layer.in_features)
    other = copied(layer)
    assert type(other) is type(layer)
    assert torch.equal(other(x), layer(x))
    with torch.no_grad():
        other.lora_B["default"].weight.zero_()
    assert not torch.equal(other(x), layer(x))
