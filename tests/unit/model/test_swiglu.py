"""Gated MLPs computed in one step: as their three layers one after the other, and as autograd differentiates them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional

from cogtune.adapters.attach import attach
from cogtune.checkpoint.random import random_model, tiny_config
from cogtune.configuration.run_config import LoraSection
from cogtune.model import swiglu as module
from cogtune.model import vision
from cogtune.model.compile import compile_layers, prepare_compiling
from cogtune.model.quantized.fp8 import Fp8Linear, frozen_gated_mlp
from cogtune.model.swiglu import GatedProduct
from cogtune.model.vision import VisionMLP
from tests.support.gated_formula import updated_product


def _error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("keep_transposed", [False, True])
@pytest.mark.parametrize("shape", [(7, 32), (2, 3, 32), (0, 32)])
def test_three_fp8_layers_round_between_them_as_one_after_the_other(
    shape: tuple[int, ...], keep_transposed: bool
) -> None:
    torch.manual_seed(0)

    def layer(inside: int, outside: int) -> Fp8Linear:
        return Fp8Linear.from_weight(torch.randn(outside, inside) / inside**0.5, keep_transposed=keep_transposed)

    gate, up, down = layer(32, 80), layer(32, 80), layer(80, 32)
    x, upstream = torch.randn(shape), torch.randn(shape)
    ways: list[Callable[[torch.Tensor], torch.Tensor]] = [
        lambda x: down(functional.silu(gate(x)) * up(x)),
        lambda x: frozen_gated_mlp(x, gate, up, down),
    ]
    results = []
    for way in ways:
        given = x.clone().requires_grad_()
        out = way(given)
        out.backward(upstream)
        assert given.grad is not None
        results.append((out.detach(), given.grad))
    (wanted, gradient), (out, found) = results
    assert out.shape == wanted.shape == shape
    if shape[0]:
        # the same numbers are rounded; a last bit of float32 can still carry one of them to the next fp8 number
        assert _error(out, wanted) < 2e-3
        assert _error(found, gradient) < 2e-3


def test_a_frozen_fp8_tower_rounds_behind_its_gelu() -> None:
    torch.manual_seed(0)
    mlp = VisionMLP(tiny_config().vision_config).requires_grad_(False)  # type: ignore[arg-type]
    mlp.fc2 = Fp8Linear.from_weight(mlp.fc2.weight, mlp.fc2.bias)
    x = torch.randn(2, 5, mlp.fc1.in_features)
    wanted = mlp.fc2(functional.gelu(mlp.fc1(x)))
    assert _error(mlp(x), wanted) < 2e-3
    assert mlp(x[:0]).shape == (0, 5, mlp.fc2.out_features)
    x.requires_grad_()  # an adapter below: the gradient has to pass
    mlp(x).sum().backward()
    assert x.grad is not None
    assert float(x.grad.norm()) > 0


def test_a_gelu_inside_its_product_is_one_behind_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The operator that a GPU in bfloat16 uses; on a CPU it has the exact GELU."""
    torch.manual_seed(0)
    mlp = VisionMLP(tiny_config().vision_config).requires_grad_(False)  # type: ignore[arg-type]
    x = torch.randn(2, 5, mlp.fc1.in_features)
    wanted = mlp(x)
    assert not vision._fits_epilogue(mlp.fc1, x)
    monkeypatch.setattr(vision, "_fits_epilogue", lambda layer, x: True)
    assert torch.equal(mlp(x), wanted)
    assert torch.equal(torch.compile(mlp, backend="aot_eager", fullgraph=True, dynamic=True)(x), wanted)


@pytest.mark.parametrize("joined", [True, False])
@pytest.mark.parametrize("compiled", [False, True])
def test_the_updated_product_is_differentiated_like_its_formula(compiled: bool, joined: bool) -> None:
    torch.manual_seed(0)
    shapes = ((6, 40), (6, 40), (6, 8), (40, 3), (40, 5), (4, 40))
    given = [torch.randn(shape) for shape in shapes]

    def fused(*parts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if joined:
            one, two = GatedProduct.apply(*parts)
            return one, two
        inner, nothing = GatedProduct.apply(*parts[:-1], None)
        assert nothing is None
        return inner, inner @ parts[-1].t()

    way = torch.compile(fused, backend="aot_eager", fullgraph=True, dynamic=True) if compiled else fused
    upstream = torch.randn(6, 40), torch.randn(6, 4)
    results = []
    for function in (updated_product, way):
        parts = [part.clone().requires_grad_() for part in given]
        out = function(*parts)
        torch.autograd.backward(out, upstream)
        results.append([*(part.detach() for part in out), *(part.grad for part in parts)])
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_adapted_layers_in_one_step_are_the_layers_one_after_the_other(
    dropout: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loss and every gradient of a model whose experts are adapted, with the same masks where inputs are dropped."""
    ids = torch.randint(10, 200, (1, 40), generator=torch.Generator().manual_seed(3))
    calls = []

    def run(fused: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        monkeypatch.setattr(module, "kernel_available", lambda x: fused)
        model = random_model(tiny_config(), seed=1)
        torch.manual_seed(0)
        adapted = attach(model, LoraSection(targets=["experts"], rank=4, dropout=dropout)).train()
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter.data, std=0.02)
        torch.manual_seed(5)
        loss = adapted(ids, labels=ids).loss
        loss.backward()
        return loss.detach(), {n: p.grad for n, p in adapted.named_parameters() if p.grad is not None}

    apply = GatedProduct.apply
    monkeypatch.setattr(GatedProduct, "apply", lambda *parts: calls.append(1) or apply(*parts))
    (loss, wanted), (found_loss, found) = run(fused=False), run(fused=True)
    assert len(calls) == tiny_config().num_hidden_layers  # no picture, so one expert has no rows
    torch.testing.assert_close(found_loss, loss)
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("fused", [False, True])
def test_a_compiled_model_with_adapters_on_everything_has_the_gradients_of_the_plain_one(
    fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compiled, an update is added by a function of its own; ``fused``: and those of an MLP inside its product."""
    ids = torch.randint(10, 200, (1, 40), generator=torch.Generator().manual_seed(3))

    def run(compiled: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        torch._dynamo.reset()
        model = random_model(tiny_config(), seed=1)
        torch.manual_seed(0)
        adapted = attach(model, LoraSection(targets=["experts"], rank=4)).train()
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter.data, std=0.02)
        if compiled:
            prepare_compiling(torch.device("cpu"))
            monkeypatch.setattr(module, "kernel_available", lambda x: fused)
            compile_layers(model, "aot_eager", fullgraph=True)
        loss = adapted(ids, labels=ids).loss
        loss.backward()
        return loss.detach(), {n: p.grad for n, p in adapted.named_parameters() if p.grad is not None}

    (loss, wanted), (found_loss, found) = run(compiled=False), run(compiled=True)
    torch.testing.assert_close(found_loss, loss)
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_adapters_wider_than_a_tile_or_switched_off_go_layer_by_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "kernel_available", lambda x: True)
    ids = torch.randint(10, 200, (1, 12), generator=torch.Generator().manual_seed(3))
    calls = []
    apply = GatedProduct.apply
    monkeypatch.setattr(GatedProduct, "apply", lambda *parts: calls.append(1) or apply(*parts))
    narrow = attach(random_model(tiny_config(), seed=1), LoraSection(targets=["experts"], rank=4))
    with narrow.disable_adapter():
        narrow(ids)
    attach(random_model(tiny_config(), seed=1), LoraSection(targets=["experts"], rank=65))(ids)
    assert not calls
    narrow(ids)
    assert calls
    calls.clear()
    divided = next(layer for name, layer in narrow.named_modules() if name.endswith("language_mlp.down_proj"))
    whole = divided.lora_B["default"].weight
    assert divided.low_rank_update(torch.float32).first.shape[0] == 4
    divided.lora_B["default"].weight = nn.Parameter(whole.data.new_empty(0))  # as ZeRO-3 leaves it between two uses
    assert divided.low_rank_update(torch.float32) is None
