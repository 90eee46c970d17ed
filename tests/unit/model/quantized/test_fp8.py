"""fp8 layers: the rounding against its bound, product and gradient against the same rounding written out."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from cogtune.checkpoint.random import random_model, tiny_config
from cogtune.errors import SetupError
from cogtune.model.quantized.fp8 import FORMAT, Fp8Linear, quantize_rows
from cogtune.system.gpu import Gpu


def _rounded(x: torch.Tensor) -> torch.Tensor:
    """Every row scaled so that its largest element is 448, rounded to e4m3, scaled back."""
    rows = []
    for row in x.double():
        largest = row.abs().max()
        scale = largest.float().double() / 448 if largest > 0 else torch.tensor(1.0)
        rows.append((row / scale).float().to(FORMAT).double() * scale)
    return torch.stack(rows)


def test_rows_are_rounded_within_the_formats_precision() -> None:
    x = torch.randn(6, 200) * torch.logspace(-6, 6, 6)[:, None]
    x[2] = 0
    quantized, scale = quantize_rows(x)
    found = quantized.float() * scale
    assert torch.isfinite(found).all()
    assert torch.equal(found[2], x[2])
    # three bits of mantissa: half a unit is 1/16 of the value, or of the smallest normal number 2^-6 below it
    bound = torch.maximum(x.abs(), scale * 2.0**-6) / 16
    assert ((found - x).abs() <= bound * 1.001).all()


@pytest.mark.parametrize("keep_transposed", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(5, 32), (2, 3, 32), (0, 32)])
def test_product_and_gradient_are_those_of_the_rounded_operands(
    shape: tuple[int, ...], bias: bool, keep_transposed: bool
) -> None:
    torch.manual_seed(0)
    plain = nn.Linear(32, 48, bias=bias)
    layer = Fp8Linear.from_weight(plain.weight, plain.bias, keep_transposed=keep_transposed)
    weight = _rounded(plain.weight.detach())
    torch.testing.assert_close(layer.dequantized().double(), weight, rtol=1e-6, atol=0)
    x = torch.randn(shape, requires_grad=True)
    out = layer(x)
    assert out.shape == (*shape[:-1], 48)
    upstream = torch.randn(out.shape)
    out.backward(upstream)
    flat, gradient = x.detach().flatten(0, -2), upstream.flatten(0, -2)
    if flat.shape[0] == 0:
        return
    wanted = _rounded(flat) @ weight.t() + (plain.bias.detach().double() if bias else 0)
    torch.testing.assert_close(out.detach().flatten(0, -2).double(), wanted, rtol=1e-5, atol=1e-5)
    scale = layer.scale_bits.view(torch.float32).double()
    wanted = _rounded(gradient.double() * scale) @ (weight / scale[:, None])
    assert x.grad is not None
    torch.testing.assert_close(x.grad.flatten(0, -2).double(), wanted, rtol=1e-5, atol=1e-6)


def test_no_cast_reaches_the_weight() -> None:
    layer = Fp8Linear.from_weight(torch.randn(16, 16), keep_transposed=True)
    wanted = layer.dequantized()
    layer.to(torch.bfloat16).half().float()
    assert torch.equal(layer.dequantized(), wanted)
    assert layer.weight.dtype == layer.transposed.dtype == torch.uint8  # type: ignore[union-attr]
    assert not any(parameter.requires_grad for parameter in layer.parameters())


def test_a_model_in_fp8_stays_near_and_has_the_gradients_of_its_adapters() -> None:
    from cogtune.adapters.attach import attach
    from cogtune.configuration.run_config import LoraSection

    ids = torch.randint(10, 200, (1, 40), generator=torch.Generator().manual_seed(3))

    def run(fp8: bool) -> tuple[float, torch.Tensor]:
        model = random_model(tiny_config(num_hidden_layers=4), seed=1)
        if fp8:
            for layer in model.model.layers:
                for name, part in list(layer.named_modules()):
                    if isinstance(part, nn.Linear):
                        layer.set_submodule(name, Fp8Linear.from_weight(part.weight, part.bias))
        torch.manual_seed(0)
        adapted = attach(model, LoraSection())
        assert all(p.dtype == torch.float32 for n, p in adapted.named_parameters() if "lora_" in n)
        loss = adapted(ids, labels=ids).loss
        loss.backward()
        flat = torch.cat([p.grad.flatten() for p in adapted.parameters() if p.grad is not None])
        return float(loss.detach()), flat

    (loss, gradient), (near, found) = run(fp8=False), run(fp8=True)
    assert near == pytest.approx(loss, rel=0.02)
    assert torch.cosine_similarity(gradient, found, dim=0) > 0.98


def test_a_compiled_layer_is_one_graph() -> None:
    """And rounds as the layer does."""
    layer = Fp8Linear.from_weight(torch.randn(16, 16), torch.randn(16))
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=True)
    for rows in (3, 5, 0):
        results = []
        for function in (layer, compiled):
            x = torch.linspace(-1, 2, rows * 16).view(rows, 16).requires_grad_()
            out = function(x)
            out.square().sum().backward()
            results.append((out.detach(), x.grad))
        torch.testing.assert_close(results[0], results[1])


def test_a_card_without_fp8_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cogtune.model.quantized.fp8.gpu_of", lambda device: Gpu("A100", (8, 0)))
    with pytest.raises(SetupError, match=r"A100 \(compute capability 8.0\) does not compute in fp8"):
        Fp8Linear.from_weight(torch.ones(16, 16), None)
    monkeypatch.setattr("cogtune.model.quantized.fp8.gpu_of", lambda device: Gpu("H100", (9, 0)))
    Fp8Linear.from_weight(torch.ones(16, 16), None)
