"""What recomputed layers save waits in host memory and comes back the same, in every order of passes.

On a CPU the code is the same but for the copies' stream and events; `tests/gpu/test_streaming.py` has those, and
compiled layers.
"""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch

from cogtune.adapters.attach import attach
from cogtune.checkpoint.random import random_weights, tiny_config
from cogtune.configuration.load import load_config
from cogtune.configuration.run_config import LoraSection
from cogtune.errors import ConfigError, SetupError
from cogtune.model import host_memory
from cogtune.model.activation_checkpointing import enable_checkpointing
from cogtune.model.activation_offloading import BLOCK, ActivationOffloading
from cogtune.model.layer_streaming import StreamPlacement, streamed_layers
from cogtune.model.routing import Routing
from cogtune.plan import memory as planned

CPU, LAYERS = torch.device("cpu"), 4


def _model(placement: StreamPlacement | None = None, targets: tuple[str, ...] = ("experts", "vision-tower")) -> Any:
    config = tiny_config(num_hidden_layers=LAYERS)
    base = random_weights(config, torch.float32, CPU, placement=placement, seed=1)
    torch.manual_seed(4)
    model = attach(base, LoraSection(targets=targets, rank=4)).train()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def _loss(model: Any, words: int = 4) -> torch.Tensor:
    row = [256, *[258] * 6, *range(65, 65 + words)]
    rows = torch.tensor([row, [*row[:-1], 70]])
    labels = torch.where(torch.arange(len(row)) > 7, rows, -100)
    pixels = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    routing = Routing.build((rows == 258).long(), labels=labels)
    found: torch.Tensor = model(input_ids=rows, labels=labels, routing=routing, pixel_values=pixels).loss
    return found


def _gradients(model: Any) -> torch.Tensor:
    found = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    model.zero_grad()
    return found


def _step(model: Any, words: int = 4) -> torch.Tensor:
    _loss(model, words).backward()
    return _gradients(model)


def _offloading(model: Any, *chosen: Any) -> ActivationOffloading:
    found = ActivationOffloading(CPU)
    enable_checkpointing(model.base_model.model, *chosen, offloading=found)
    return found


@pytest.mark.parametrize("chosen", [(), ((0, 2), (1,)), ((3,), ()), ((), ())], ids=str)
def test_gradients_are_the_same_to_the_bit(chosen: Any) -> None:
    expected, model = _model(), _model()
    offloading = _offloading(model, *chosen)
    for words in (4, 9, 2):
        assert torch.equal(_step(model, words), _step(expected, words))
    assert bool(offloading.host_bytes) == (chosen != ((), ()))
    layers = [*model.base_model.model.model.layers, *model.base_model.model.model.vision.transformer.layers]
    recomputed = sum(layer.gradient_checkpointing for layer in layers)
    assert offloading.host_bytes == recomputed * BLOCK, "a block for each input, used again in every step"


def test_streamed_layers_offload_too_and_nothing_waits_in_validation() -> None:
    expected = _step(_model())
    model = _model(StreamPlacement(CPU, streamed_layers(0, LAYERS), (0, 1)))
    offloading = _offloading(model)
    assert torch.equal(_step(model), expected)
    before = offloading.host_bytes
    with torch.no_grad():
        _loss(model)
    model.eval()
    _loss(model).backward()
    assert offloading.host_bytes == before
    assert not any(each() for each in offloading._away)


def test_passes_may_interleave_and_break_off() -> None:
    expected = _step(_model(), 4) + _step(_model(), 7)
    model = _model()
    _offloading(model)
    first, second = _loss(model, 4), _loss(model, 7)
    _loss(model, 5)  # never goes back
    first.backward()
    second.backward()
    assert torch.equal(_gradients(model), expected)
    assert torch.equal(_step(model, 4), _step(_model(), 4))


def test_only_what_a_layer_saves_leaves_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[torch.Size] = []
    send = ActivationOffloading._send
    monkeypatch.setattr(ActivationOffloading, "_send", lambda own, x: sent.append(x.shape) or send(own, x))
    model = _model(targets=("experts",))
    _offloading(model)
    _step(model)
    hidden = model.base_model.model.config.hidden_size
    assert sent == LAYERS * [torch.Size([2 * 11, hidden])]


def test_what_left_is_freed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing keeps an input between the passes, not the hooks that the graph keeps either."""
    inputs: list[weakref.ref[torch.Tensor]] = []
    saving = ActivationOffloading.saving
    monkeypatch.setattr(ActivationOffloading, "saving", lambda own, x: inputs.append(weakref.ref(x)) or saving(own, x))
    model = _model(targets=("experts",))
    _offloading(model)
    loss = _loss(model)
    assert len(inputs) == LAYERS
    assert not any(each() is not None for each in inputs)
    loss.backward()


def test_host_memory_is_looked_at_before_it_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    assert planned.OFFLOADED_BLOCK == BLOCK
    model = _model()
    _offloading(model)
    monkeypatch.setattr(host_memory, "free_memory", lambda: 1000)
    with pytest.raises(SetupError, match=r"train\.activation_offloading keeps 16.0 MiB in host memory, and 1000 B are"):
        _loss(model)


def test_it_is_refused_where_nothing_is_recomputed() -> None:
    flags = {"model": "base", "data": "pictures", "output": "out", "train.activation_offloading": "true"}
    assert load_config(None, flags).train.activation_offloading
    with pytest.raises(ConfigError, match="about recomputed layers"):
        load_config(None, flags | {"train.gradient_checkpointing": "none"})
