"""Kernels that exist on a GPU only, against the formulas that stand in for them elsewhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from cogtune.configuration.model import CogVLM2VisionConfig
from cogtune.model import qkv_rope, swiglu, vision
from cogtune.model.kernels import HAS_TRITON
from cogtune.model.qkv_rope import rotate_into_rows
from cogtune.model.quantized import fp8
from cogtune.model.quantized.fp8 import (
    Fp8Linear,
    frozen_gated_mlp,
    rounded_gated,
    rounded_gated_gradients,
    rounded_gelu,
)
from cogtune.model.routing import Routing
from tests.support.gated_formula import updated_product

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(not HAS_TRITON, reason="needs Triton"),
]
fp8_card = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9), reason="the card has no fp8"
)


def _noise(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(*shape, device="cuda", dtype=dtype)


def _value(rounded: tuple[torch.Tensor, ...]) -> torch.Tensor:
    return rounded[0].float() * rounded[1]


def _error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    assert torch.isfinite(found).all()
    return float((found.float() - wanted.float()).norm() / wanted.float().norm())


@fp8_card
@pytest.mark.parametrize("width", [96, 1000, 14336, 15360])
def test_activations_are_rounded_as_the_formulas_say(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    gate, up, gradient = (_noise(37, width) * 2 for _ in range(3))
    gate[3] = 0
    columns = [torch.rand(width, device="cuda") + 0.1 for _ in range(2)]

    def run() -> list[torch.Tensor]:
        both = rounded_gated_gradients(gradient, gate, up, *columns)
        return [_value(part) for part in (rounded_gelu(gate), rounded_gated(gate, up), both[:2], both[2:])]

    found = run()
    monkeypatch.setattr(fp8, "kernel_available", lambda x: False)
    for one, wanted in zip(found, run(), strict=True):
        # the same float32 values to a few bits: now and then one of them is rounded to the next fp8 number
        assert _error(one, wanted) < 2e-3


@fp8_card
@pytest.mark.parametrize(("keep_transposed", "compiled"), [(False, False), (True, False), (True, True)])
def test_an_fp8_mlp_is_its_three_layers(keep_transposed: bool, compiled: bool) -> None:
    torch.manual_seed(0)
    layers = [
        Fp8Linear.from_weight(_noise(outside, inside) / inside**0.5, keep_transposed=keep_transposed)
        for inside, outside in ((128, 320), (128, 320), (320, 128))
    ]
    gate, up, down = layers
    fused = torch.compile(frozen_gated_mlp, fullgraph=True, dynamic=True) if compiled else frozen_gated_mlp
    for rows in (1, 301):
        x, upstream = _noise(rows, 128), _noise(rows, 128)
        results = []
        for way in (lambda x: down(functional.silu(gate(x)) * up(x)), lambda x: fused(x, gate, up, down)):
            given = x.clone().requires_grad_()
            out = way(given)
            out.backward(upstream)
            results.append((out.detach(), given.grad))
        # layer by layer rounds to bfloat16 in between, and a product rounded to fp8 errs by some 2.7 %
        assert _error(results[1][0], results[0][0]) < 2e-2
        assert _error(results[1][1], results[0][1]) < 2e-2


@fp8_card
def test_an_fp8_tower_rounds_as_its_layers_do() -> None:
    """Compiled, with every input rounded by a kernel of its own, against the layers one by one without kernels."""
    torch.manual_seed(0)
    config = CogVLM2VisionConfig(hidden_size=192, num_heads=2, intermediate_size=1008)
    layer = vision.VisionLayer(config).cuda().bfloat16().requires_grad_(False)
    for part in (layer.attention, layer.mlp):
        for name, linear in list(part.named_children()):
            setattr(part, name, Fp8Linear.from_weight(linear.weight, linear.bias))
    x = _noise(2, 301, 192)
    with torch._dynamo.config.patch(specialize_float=True):  # as prepare_compiling does
        found = torch.compile(vision.VisionLayer.compute, fullgraph=True, dynamic=True)(layer, x)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fp8, "kernel_available", lambda x: False)
        wanted = layer.compute(x)
    # the same numbers are rounded; now and then one of them goes to the next fp8 number
    assert _error(found - x, wanted - x) < 1e-2


@pytest.mark.parametrize(
    ("ranks", "dtype", "bound", "compiled"),
    [
        ((16, 16, 16), torch.bfloat16, 1e-2, True),
        ((16, 16, 16), torch.float32, 1e-5, False),
        ((1, 8, 64), torch.bfloat16, 1e-2, False),
        ((1, 8, 64), torch.float32, 1e-5, False),
    ],
)
def test_updates_inside_the_product_are_those_of_the_formula(
    ranks: tuple[int, int, int], dtype: torch.dtype, bound: float, compiled: bool
) -> None:
    """Value and all six gradients against autograd in float64, at sizes that fill no tile."""
    torch.manual_seed(0)
    gate_rank, up_rank, down_rank = ranks

    def kernel(*parts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        one, two = swiglu.GatedProduct.apply(*parts)
        return one, two

    function = torch.compile(kernel, fullgraph=True, dynamic=True) if compiled else kernel
    for rows in (1, 131):
        shapes = (
            (rows, 200), (rows, 200), (rows, gate_rank + up_rank), (200, gate_rank), (200, up_rank), (down_rank, 200),
        )  # fmt: skip
        given = [_noise(*shape, dtype=dtype) for shape in shapes]
        upstream = [_noise(rows, 200, dtype=dtype), _noise(rows, down_rank, dtype=dtype)]
        results = []
        for way, form in ((updated_product, torch.float64), (function, dtype)):
            parts = [part.detach().to(form).requires_grad_() for part in given]
            out = way(*parts)
            torch.autograd.backward(out, [part.to(form) for part in upstream])
            results.append([*(part.detach() for part in out), *(part.grad for part in parts)])
        for found, wanted in zip(results[1], results[0], strict=True):
            assert _error(found, wanted) < bound


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_adapted_experts_compute_the_same_with_the_kernel(dropout: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole model on the device, with the updates inside the product and layer by layer."""
    from cogtune.adapters.attach import attach
    from cogtune.checkpoint.random import random_model, tiny_config
    from cogtune.configuration.run_config import LoraSection
    from cogtune.model.compile import compile_layers, prepare_compiling

    ids = torch.randint(10, 200, (1, 40), generator=torch.Generator().manual_seed(3)).cuda()

    def run() -> tuple[float, torch.Tensor]:
        torch._dynamo.reset()
        model = random_model(tiny_config(), seed=1).cuda()
        torch.manual_seed(0)
        adapted = attach(model, LoraSection(targets=["experts"], rank=4, dropout=dropout)).train()
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter.data, std=0.02)
        if not dropout:  # generated kernels draw masks of their own
            prepare_compiling(torch.device("cuda"))
            compile_layers(model, fullgraph=True)
        torch.manual_seed(5)
        loss = adapted(ids, labels=ids).loss
        loss.backward()
        return float(loss.detach()), torch.cat([p.grad.flatten() for p in adapted.parameters() if p.grad is not None])

    loss, found = run()
    monkeypatch.setattr(swiglu, "kernel_available", lambda x: False)
    wanted_loss, wanted = run()
    assert loss == pytest.approx(wanted_loss, rel=1e-5)
    assert _error(found, wanted) < 1e-4


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 2e-2), (torch.float32, 1e-5)])
def test_inference_outside_of_compiled_layers_uses_kernels(
    dtype: torch.dtype, bound: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Norms, rotations and gated products of a whole model with a picture, against the operators that they replace."""
    from cogtune.checkpoint.random import random_model, tiny_config
    from cogtune.model import modeling, qkv_rope

    model = random_model(tiny_config(), seed=1).to(dtype).cuda()
    ids = torch.randint(10, 200, (2, 40), generator=torch.Generator().manual_seed(3)).cuda()
    types = torch.zeros_like(ids)
    types[:, 1:7] = 1
    features = _noise(2, 4, 32, dtype=dtype)
    launched = []
    norm, rotate, rotated = modeling.decode.root_mean_square_norm, qkv_rope._by_kernel, []
    monkeypatch.setattr(qkv_rope, "_by_kernel", lambda *a: rotated.append(1) or rotate(*a))
    monkeypatch.setattr(modeling.decode, "root_mean_square_norm", lambda *a: launched.append(1) or norm(*a))
    with torch.no_grad():
        found = model(ids, token_type_ids=types, image_features=features).logits
    assert len(launched) == 2 * len(model.model.layers) + 1
    assert len(rotated) == len(model.model.layers)
    with torch.no_grad(), monkeypatch.context() as patch:
        for module in (modeling, swiglu, qkv_rope):
            patch.setattr(module, "inference_kernel_available", lambda *tensors: False)
        wanted = model(ids, token_type_ids=types, image_features=features).logits
    assert len(launched) == 2 * len(model.model.layers) + 1
    assert _error(found, wanted) < bound  # in bfloat16 a last bit here and there, carried through two layers
    model(ids, token_type_ids=types, image_features=features, labels=ids).loss.backward()  # the operators again
    assert len(launched) == 2 * len(model.model.layers) + 1
    assert len(rotated) == len(model.model.layers)
    assert model.model.layers[0].input_layernorm.weight.grad is not None


@pytest.mark.parametrize("mean", [0.0, -1.0])
def test_a_gelu_inside_its_product_is_as_exact_as_one_behind_it(mean: float) -> None:
    """The tower's MLP, compiled and not, against float64; a bias of ``mean`` moves the GELU's inputs."""
    torch.manual_seed(0)
    mlp = vision.VisionMLP(CogVLM2VisionConfig(hidden_size=192, intermediate_size=1000)).cuda().bfloat16()
    mlp.requires_grad_(False)
    nn.init.normal_(mlp.fc1.weight, std=192**-0.5)
    nn.init.normal_(mlp.fc1.bias, mean=mean, std=0.1)
    x = _noise(2, 301, 192)
    assert vision._fits_epilogue(mlp.fc1, x)
    wanted = functional.gelu(functional.linear(x.double(), mlp.fc1.weight.double(), mlp.fc1.bias.double()))
    found = torch.compile(vision._product_with_gelu, fullgraph=True, dynamic=True)(mlp.fc1, x)
    assert torch.equal(found, vision._product_with_gelu(mlp.fc1, x))
    # the tanh form adds to the rounding of the result, but the sums are not rounded before
    assert _error(found, wanted) < _error(functional.gelu(mlp.fc1(x)), wanted)
    assert _error(mlp(x), functional.linear(wanted, mlp.fc2.weight.double(), mlp.fc2.bias.double())) < 5e-3
    mlp.fc1.weight.requires_grad_()
    mlp(x).sum().backward()  # a gradient goes the ordinary way
    assert mlp.fc1.weight.grad is not None


@pytest.mark.parametrize("width", [32, 1000, 1792])
def test_the_norm_that_joins_the_stream_is_the_layers(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    norm = nn.LayerNorm(width, eps=1e-6).cuda().bfloat16().requires_grad_(False)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x, update = _noise(2, 301, width), _noise(2, 301, width) * 3 + 1
    with torch._dynamo.config.patch(specialize_float=True):  # as prepare_compiling does
        found = torch.compile(vision._add_norm, fullgraph=True, dynamic=True)(x, update, norm)
    wanted = x.double() + functional.layer_norm(
        update.double(), (width,), norm.weight.double(), norm.bias.double(), norm.eps
    )
    assert _error(found, wanted) < 3e-3  # one rounding to bfloat16
    assert torch.equal(found, vision._add_norm(x, update, norm))
    update.requires_grad_()
    with monkeypatch.context() as patch:
        patch.setattr(vision.add_norm, "add_norm_on_gpu", None)  # a gradient goes the ordinary way
        vision._add_norm(x, update, norm).sum().backward()
    assert update.grad is not None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(32, 8, 128), (5, 1, 24)])
def test_heads_and_their_gradients_are_those_of_the_formulas(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    """Rows of different lengths, pictures in two of them; compiled or not, with one kernel or without."""
    queries, keys, width = shape
    torch.manual_seed(0)
    types = torch.tensor([[0, 1, 1, 1, 0, 0, 0], [0] * 7, [0, 1, 1, 0, 0, 0, 0]])
    mask = torch.tensor([[1] * 6 + [0], [1] * 3 + [0] * 4, [1] * 5 + [0] * 2])
    routing = Routing.build(types, mask, column_multiple=4).to("cuda")
    rows, columns = routing.num_rows, routing.num_columns
    angles = torch.rand(rows, 1, columns, width // 2, device="cuda") * 6
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    assert routing.from_rows is not None
    x = _noise(routing.from_rows.shape[0], (queries + 2 * keys) * width, dtype=dtype).requires_grad_()
    real = torch.zeros(rows * columns, 1, device="cuda", dtype=dtype)
    real[routing.from_rows] = 1
    real = real.view(rows, 1, columns, 1)
    upstream = [  # queries as attention hands them back, keys in another layout
        _noise(rows, columns, queries, width, dtype=dtype).transpose(1, 2) * real,
        _noise(rows, keys, columns, width, dtype=dtype) * real,
        _noise(rows, columns, keys, width, dtype=dtype).transpose(1, 2) * real,
    ]

    class Layer(nn.Module):  # whose numbers are constants to the compiler, as a decoder layer's are
        sizes = shape

        def forward(self, given: torch.Tensor, *tables: torch.Tensor) -> qkv_rope.Heads:
            return rotate_into_rows(given, *tables, routing, self.sizes)

    def run(function: Any, given: torch.Tensor, *tables: torch.Tensor) -> list[torch.Tensor]:
        found = function(given, *tables)
        return [*found, *torch.autograd.grad(found, given, [part.to(given.dtype) for part in upstream])]

    plain = run(Layer(), x, cos, sin)
    compiled = run(torch.compile(Layer(), fullgraph=True, dynamic=True), x, cos, sin)
    wanted = run(Layer(), x.detach().double().requires_grad_(), cos.double(), sin.double())  # without the kernel
    for found in (plain, compiled):
        for one, other in zip(found, wanted, strict=True):
            assert _error(one, other) < (1e-6 if dtype == torch.float32 else 5e-3)  # products rounded, or sums only
