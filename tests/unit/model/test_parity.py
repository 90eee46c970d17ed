"""Quantised layers against bfloat16 and float32, layer by layer: errors no larger than their rounding explains."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.parity import FORMS, compare, error
from cogtune.checkpoint.quantize import convert
from cogtune.checkpoint.random import random_model, tiny_config
from cogtune.configuration.quantization import QuantSection
from cogtune.model.modeling import CogVLM2ForCausalLM

# e4m3 keeps three bits: an element errs by 1/16 at most and by 0.026 in the mean, and both operands of a product are
# rounded: 0.037. bfloat16 keeps seven bits, and its outputs are rounded once more.
ALONE = {"fp8": 0.045, "bfloat16": 0.005}
# Roundings add up over all the layers before and behind, and a gradient has them in both of its factors; these weights
# are random, so nothing averages them out. Measured: 0.34 and 0.04 at worst, 0.17 and 0.024 over a layer's adapters.
WHOLE = {"fp8": 0.45, "bfloat16": 0.055}
UNUSED = ("self_attn.vision_expert_dense", *(f"mlp.vision_mlp.{part}_proj" for part in ("gate", "up", "down")))
"""Of the last layer: no image token goes through them."""
ADAPTERS = {"fp8": 0.22, "bfloat16": 0.032}


def _make(dtype: torch.dtype, quantization: QuantSection) -> CogVLM2ForCausalLM:
    model = random_model(tiny_config(num_hidden_layers=3), seed=1).to(dtype)
    for path, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear):
            model.set_submodule(path, convert(quantization, path, layer))
    return model.train()


@pytest.fixture(scope="module")
def rows() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(10, 200, (1, 47), generator=generator)
    types, labels = torch.zeros_like(ids), ids.clone()
    ids[0, :7], types[0, 1:7], labels[0, :7] = 258, 1, -100
    pixels = torch.randn(1, 3, 8, 8, generator=generator)
    batch = {"input_ids": ids, "token_type_ids": types, "labels": labels, "pixel_values": pixels}
    return {row["form"]: row for row in compare(_make, batch, ["fp8"])}


@pytest.mark.parametrize(("form", "against"), [("fp8", "bfloat16"), ("fp8", "float32"), ("bfloat16", "float32")])
def test_every_linear_layer_errs_by_its_rounding(rows: dict[str, Any], form: str, against: str) -> None:
    found = rows[form]["against"][against]
    decoder = {path for path in found["linears"] if ".vision.transformer." not in path}
    assert len(decoder) == 3 * 10
    assert len(found["linears"]) == 3 * 10 + 2 * 4
    unused = {path for path, errors in found["linears"].items() if not errors["whole"]}
    assert unused == {f"model.layers.2.{part}" for part in UNUSED}
    for path in found["linears"].keys() - unused:
        errors = found["linears"][path]
        assert max(errors["alone"].values()) < ALONE[form], (path, errors["alone"])
        assert max(errors["whole"].values()) < WHOLE[form], (path, errors["whole"])
    seen = {kind for path in decoder - unused for kind in found["linears"][path]["whole"]}
    assert seen == {"output", "input gradient", "LoRA A gradient", "LoRA B gradient"}
    adapters = [layer["LoRA gradients"] for layer in found["layers"].values() if "LoRA gradients" in layer]
    assert len(adapters) == 3
    assert max(adapters) < ADAPTERS[form]


def test_errors_are_relative_norms() -> None:
    assert error(torch.tensor([3.0, 4.5]), torch.tensor([3.0, 4.0])) == pytest.approx(0.1)
    assert list(FORMS)[:2] == ["float32", "bfloat16"]
