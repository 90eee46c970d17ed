"""Streamed layers compute what resident ones do, to the bit, and every layer is there when it is used.

On a CPU the code is the same but for the copies' stream and events; `tests/gpu/test_streaming.py` has those.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import PeftModel

from cogtune.adapters.attach import attach
from cogtune.checkpoint.random import random_weights, tiny_config
from cogtune.configuration.quantization import QuantSection
from cogtune.configuration.run_config import LoraSection
from cogtune.errors import SetupError
from cogtune.model import host_memory
from cogtune.model.activation_checkpointing import enable_checkpointing
from cogtune.model.compile import compile_layers, compiled_graphs, prepare_compiling
from cogtune.model.layer_streaming import LayerStream, StreamPlacement, streamed_layers
from cogtune.model.modeling import CogVLM2ForCausalLM
from cogtune.model.routing import Routing

CPU, LAYERS = torch.device("cpu"), 5
FORMATS = [
    QuantSection(),
    QuantSection(experts="nf4", tower="nf4"),
    QuantSection(experts="int8", tower="int8"),
    QuantSection(experts="fp8", tower="fp8", fp8_layouts="two"),
]


def _base(quant: QuantSection, placement: StreamPlacement | None, dtype: torch.dtype = torch.float32) -> Any:
    config = tiny_config(num_hidden_layers=LAYERS)
    model = random_weights(config, dtype, CPU, quantization=quant, placement=placement, seed=1)
    with torch.no_grad():  # larger than random_weights makes them, so that every layer shows in the output
        for name, parameter in model.named_parameters():
            if parameter.is_floating_point() and "layers" not in name and "norm" not in name:
                parameter.mul_(10)
    return model


def _adapted(base: CogVLM2ForCausalLM, targets: tuple[str, ...] = ("experts", "vision-tower")) -> PeftModel:
    torch.manual_seed(4)
    model = attach(base, LoraSection(targets=targets, rank=4)).train()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # they start at zero, and then no gradient reaches lora_A
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def _batch() -> dict[str, Any]:
    rows = torch.tensor([[256, *[258] * 6, 65, 66, 67, 68], [256, *[258] * 6, 75, 76, 77, 78]])
    labels = torch.where(torch.arange(11) > 7, rows, -100)
    pixels = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    routing = Routing.build((rows == 258).long(), labels=labels)
    return {"input_ids": rows, "labels": labels, "routing": routing, "pixel_values": pixels}


def _step(model: PeftModel) -> tuple[torch.Tensor, torch.Tensor]:
    loss = model(**_batch()).loss
    loss.backward()
    gradients = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    model.zero_grad()
    return loss.detach(), gradients


def _evaluate(model: PeftModel) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(**_batch()).loss
    return found


def _placement(resident: int = 0, tower: tuple[int, ...] = (0, 1)) -> StreamPlacement:
    return StreamPlacement(CPU, streamed_layers(resident, LAYERS), tower)


@pytest.mark.parametrize("quant", FORMATS, ids=lambda quant: quant.experts)
def test_a_streamed_model_trains_as_a_resident_one(quant: QuantSection) -> None:
    expected = _adapted(_base(quant, None))
    model = _adapted(_base(quant, _placement()))
    for _ in range(2):  # the second step starts with the buffers as the first one left them
        wanted, found = _step(expected), _step(model)
        assert torch.equal(found[0], wanted[0])
        assert torch.equal(found[1], wanted[1])
        assert torch.equal(_evaluate(model), _evaluate(expected))
    assert wanted[1].abs().max() > 0


@pytest.mark.parametrize("resident", [0, 1, 2, 3, 4])
def test_any_number_of_layers_may_stay_and_any_may_be_recomputed(resident: int) -> None:
    expected = _step(_adapted(_base(FORMATS[0], None)))
    model = _adapted(_base(FORMATS[0], _placement(resident, (0, 1) if resident % 2 else ())))
    for chosen in ((), (0, 1, 2, 3, 4), (1, 2), (0, 4)):
        enable_checkpointing(model.base_model.model, chosen, chosen[:1])
        found = _step(model)
        assert torch.equal(found[0], expected[0]), chosen
        assert torch.equal(found[1], expected[1]), chosen
        _evaluate(model)


def test_two_forward_passes_may_come_before_their_backward_passes() -> None:
    expected = _step(_adapted(_base(FORMATS[0], None)))[1] * 2
    model = _adapted(_base(FORMATS[0], _placement()))
    first, second = model(**_batch()).loss, model(**_batch()).loss
    first.backward()
    second.backward()
    gradients = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    assert torch.equal(gradients, expected)


def test_a_backward_pass_that_broke_off_leaves_nothing_wrong() -> None:
    expected = _adapted(_base(FORMATS[0], None))
    model = _adapted(_base(FORMATS[0], _placement()))
    enable_checkpointing(model.base_model.model)
    with pytest.raises(ZeroDivisionError):
        _broken_off(model)
    model.zero_grad()
    assert torch.equal(_evaluate(model), _evaluate(expected))
    assert torch.equal(_step(model)[1], _step(expected)[1])


def _broken_off(model: PeftModel) -> None:
    def fail(gradient: torch.Tensor) -> None:
        raise ZeroDivisionError

    middle = next(p for n, p in model.named_parameters() if "layers.2." in n and "language" in n and "lora_A" in n)
    handle = middle.register_hook(fail)
    try:
        model(**_batch()).loss.backward()
    finally:
        handle.remove()


def test_compiled_layers_stream_too_and_share_their_graphs() -> None:
    prepare_compiling(CPU)
    wanted = _adapted(_base(FORMATS[0], None), ("experts",))
    model = _adapted(_base(FORMATS[0], _placement(tower=())), ("experts",))
    expected = _step(wanted)
    for each in (wanted, model):
        torch._dynamo.reset()
        before = compiled_graphs()
        compile_layers(each.base_model.model, backend="aot_eager")
        found = [_step(each) for _ in range(2)]
        counts = compiled_graphs() - before
        assert torch.equal(found[0][1], found[1][1])
        torch.testing.assert_close(found[0][0], expected[0])
        if each is wanted:
            resident = counts, found[0][1]
    assert counts == resident[0], "a streamed layer is compiled as often as a resident one"
    assert torch.equal(found[0][1], resident[1])


def test_every_layer_is_copied_as_often_as_two_buffers_make_necessary(monkeypatch: pytest.MonkeyPatch) -> None:
    copies: list[int] = []
    monkeypatch.setattr(LayerStream, "_fetch", _counting(LayerStream._fetch, copies))
    model = _adapted(_base(FORMATS[0], _placement(tower=())), ("experts",))
    enable_checkpointing(model.base_model.model)
    _step(model)
    assert copies == [0, 1, 2, 3, 4, 2, 1, 0], "the last two layers are still there when the backward pass begins"
    copies.clear()
    _step(model)
    assert copies == [2, 3, 4, 2, 1, 0], "the first two are still there when the next step begins"


def _counting(fetch: Callable[..., None], copies: list[int]) -> Callable[..., None]:
    def counted(stream: LayerStream, position: int) -> None:
        if stream._held[position % 2] != position:
            copies.append(position)
        fetch(stream, position)

    return counted


def test_weights_leave_the_device() -> None:
    """What stays of a layer on the device is what two layers share, and its small tensors."""
    placement = _placement(tower=())
    model = _base(FORMATS[0], placement)
    weights = [m.weight for m in model.model.layers.modules() if isinstance(m, torch.nn.Linear)]
    assert len({weight.untyped_storage().data_ptr() for weight in weights}) == 2
    each = sum(weight.nbytes for weight in weights) // LAYERS
    assert LAYERS * each <= placement.host_bytes <= LAYERS * (each + 10 * 256)


def test_too_little_host_memory_is_said_before_it_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_memory, "free_memory", lambda: 1000)
    with pytest.raises(SetupError, match=r"keeps .* in host memory, and 1000 B are free") as caught:
        _base(FORMATS[0], _placement())
    assert caught.value.code == "host-memory"


def test_resident_layers_are_spread_evenly() -> None:
    assert streamed_layers(0, 4) == (0, 1, 2, 3)
    assert streamed_layers(2, 4) == (0, 2)
    assert streamed_layers(9, 4) == ()
    for resident in range(33):
        assert len(streamed_layers(resident, 32)) == 32 - resident
