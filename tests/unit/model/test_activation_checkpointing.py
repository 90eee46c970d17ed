"""Recomputing activations changes neither loss nor gradients, whatever is recomputed, and recomputes what was asked."""

from __future__ import annotations

import pytest
import torch

from cogtune.adapters.attach import attach
from cogtune.checkpoint.random import random_model, tiny_config
from cogtune.configuration.resolve import recomputed_layers
from cogtune.configuration.run_config import LoraSection
from cogtune.model.activation_checkpointing import enable_checkpointing, first_layers
from cogtune.model.routing import Routing

LAYERS = 5


def _model(dtype: torch.dtype, dropout: float, targets: list[str]) -> torch.nn.Module:
    base = random_model(tiny_config(num_hidden_layers=LAYERS), seed=2).to(dtype)
    torch.manual_seed(4)
    model = attach(base, LoraSection(targets=targets, rank=4, dropout=dropout)).train()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # they start at zero, and then no gradient reaches lora_A
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def _batch(dtype: torch.dtype) -> dict[str, object]:
    rows = torch.tensor([[256, *[258] * 6, 65, 66, 67, 68], [256, *[258] * 6, 75, 76, 77, 78]])
    types = (rows == 258).long()
    labels = torch.where(torch.arange(11) > 7, rows, -100)
    pixels = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(3)).to(dtype)
    routing = Routing.build(types, labels=labels)
    return {"input_ids": rows, "labels": labels, "routing": routing, "pixel_values": pixels}


def _run(model: torch.nn.Module, batch: dict[str, object]) -> tuple[list[int], list[int], torch.Tensor, torch.Tensor]:
    """How often each decoder and tower layer's MLP ran, the loss and the gradients of a step."""
    decoder, tower = model.base_model.model.model.layers, model.base_model.model.model.vision.transformer.layers
    parts = [layer.mlp.vision_mlp for layer in decoder] + [layer.mlp for layer in tower]
    counts = dict.fromkeys(parts, 0)

    def count(module: torch.nn.Module, _: object) -> None:
        counts[module] += 1

    hooks = [part.register_forward_pre_hook(count) for part in parts]
    torch.manual_seed(0)  # of the dropout masks
    loss = model(**batch).loss
    loss.backward()
    for hook in hooks:
        hook.remove()
    gradients = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    model.zero_grad()
    ran = list(counts.values())
    return ran[:LAYERS], ran[LAYERS:], loss.detach(), gradients


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_policy_gives_the_same_loss_and_gradients(dtype: torch.dtype, dropout: float) -> None:
    model, batch = _model(dtype, dropout, ["experts", "vision-tower"]), _batch(dtype)
    *runs, loss, gradients = _run(model, batch)
    assert runs == [[1] * LAYERS, [1, 1]]
    for policy in ("all", 1, 2, 3, first_layers(2, LAYERS)):
        chosen = policy if isinstance(policy, tuple) else recomputed_layers(policy, LAYERS)
        tower = () if isinstance(policy, tuple) else recomputed_layers(policy, 2)
        assert enable_checkpointing(model.base_model.model, chosen, tower) == (len(chosen), len(tower))
        ran, tower_ran, same_loss, same_gradients = _run(model, batch)
        assert ran == [2 if index in chosen else 1 for index in range(LAYERS)], policy
        assert tower_ran == [2 if index in tower else 1 for index in range(2)], policy
        # bit-equal: the recomputation repeats the same operations on the same numbers
        assert torch.equal(same_loss, loss)
        assert torch.equal(same_gradients, gradients)


def test_a_frozen_tower_is_not_recomputed() -> None:
    model, batch = _model(torch.float32, 0.0, ["experts"]), _batch(torch.float32)
    assert enable_checkpointing(model.base_model.model) == (LAYERS, 0)
    ran, tower_ran, *_ = _run(model, batch)
    assert ran == [2] * LAYERS
    assert tower_ran == [1, 1]


def test_the_first_layer_computes_no_gradient_of_its_input() -> None:
    """transformers' switch asks for one; with every weight in front frozen it would be thrown away."""
    model, batch = _model(torch.float32, 0.0, ["experts"]), _batch(torch.float32)
    enable_checkpointing(model.base_model.model)
    seen: list[bool] = []
    first = model.base_model.model.model.layers[0]
    first.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0].requires_grad))
    _run(model, batch)
    assert seen  # once or twice: older transformers call the layer again as a module
    assert not any(seen)


def test_the_first_layers() -> None:
    assert first_layers(2, 5) == (0, 1)
    assert first_layers(9, 5) == (0, 1, 2, 3, 4)
