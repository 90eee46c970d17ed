"""A model over devices: whole layers, the image path together, the same answers, and each shared input sent once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cogtune.checkpoint.load import load_model
from cogtune.checkpoint.model_files import load_model_config
from cogtune.configuration.quantization import PLAIN, QuantSection
from cogtune.errors import SetupError
from cogtune.model.device_map import GIB, RESERVE, DeviceMap, _Mover, place_layers, plan_device_map
from cogtune.model.device_map import _Guest as Guest
from cogtune.model.routing import Routing
from tests.support.batches import picture_batch

CUDA = [torch.device(f"cuda:{number}") for number in range(3)]


def names(layers: int) -> dict[str, int]:
    """A model whose layers take 1 GiB each in four tensors, and 2 GiB of other parts."""
    quarter = GIB // 4
    sizes = {f"model.layers.{i}.part{k}": quarter for i in range(layers) for k in range(4)}
    return {"model.embed_tokens.weight": GIB // 2, **sizes, "model.vision.conv.weight": GIB, "lm_head.weight": GIB // 2}


def test_devices_are_filled_with_whole_layers_in_order() -> None:
    free = [(CUDA[0], RESERVE + 4 * GIB + GIB // 2), (CUDA[1], RESERVE + 3 * GIB), (CUDA[2], RESERVE + 9 * GIB)]
    device_map = place_layers(names(7), 7, free, host=False)
    assert device_map.layers == (CUDA[0],) * 2 + (CUDA[1],) * 3 + (CUDA[2],) * 2
    assert not device_map.waiting
    places = {name: device_map.device_for(name) for name in names(7)}
    for index in range(7):
        assert len({place for name, place in places.items() if name.startswith(f"model.layers.{index}.")}) == 1
    others = {place for name, place in places.items() if ".layers." not in name or ".vision." in name}
    assert others == {CUDA[0]}, "embedding, image path and head are together"
    assert device_map.device_for("model.vision.transformer.layers.5.mlp.fc1.weight") == CUDA[0]


def test_what_does_not_fit_waits_in_host_memory_or_is_an_error() -> None:
    free = [(CUDA[0], RESERVE + 6 * GIB)]
    device_map = place_layers(names(7), 7, free, host=True)
    assert device_map.waiting == {3, 4, 5, 6}, "room for one guest is kept"
    assert set(device_map.layers) == {CUDA[0]}
    assert device_map.device_for("model.layers.5.part0") == torch.device("cpu")
    assert "4 in host memory, computed on cuda:0" in device_map.describe()
    with pytest.raises(SetupError, match=r"takes 9.0 GiB.*layers from 4 on fit nowhere") as caught:
        place_layers(names(7), 7, free, host=False)
    assert caught.value.code == "spread-too-small"
    with pytest.raises(SetupError, match="what is not decoder layers"):
        place_layers(names(7), 7, [(CUDA[0], RESERVE)], host=True)


def test_answers_over_several_devices_are_the_same(tiny_checkpoint: Path) -> None:
    """All devices are the CPU here, and the second layer a guest: hooks, swapping and the cache are what is tested."""
    cpu = torch.device("cpu")
    device_map = DeviceMap(cpu, (cpu, cpu), frozenset({1}))
    model = load_model(tiny_checkpoint, placement=device_map)
    device_map.connect(model)
    plain = load_model(tiny_checkpoint)
    batch = picture_batch()
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, plain(**batch).logits)
    row = {name: value[:1] for name, value in batch.items()}
    options = {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(model.generate(**row, **options), plain.generate(**row, **options))


def test_shared_inputs_cross_once_per_device_and_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    moves: list[str] = []
    original = Routing.to

    def counted(self: Routing, device: torch.device | str, non_blocking: bool = False) -> Routing:
        moves.append(str(device))
        return original(self, device, non_blocking)

    monkeypatch.setattr(Routing, "to", counted)
    mover, routing = _Mover(), Routing.build(torch.zeros(1, 3, dtype=torch.long))
    table, meta = torch.ones(3), torch.device("meta")
    first = [mover.send(value, meta, once=True) for value in (routing, table)]
    again = [mover.send(value, meta, once=True) for value in (routing, table)]
    assert [a is b for a, b in zip(first, again, strict=True)] == [True, True]
    assert first[0].positions.is_meta
    assert moves == ["meta"]
    mover.forget()
    mover.send(routing, meta, once=True)
    assert moves == ["meta", "meta"]
    cache = object()
    assert mover.send(cache, meta, once=True) is cache


def test_a_guest_s_weights_go_home_also_after_an_error() -> None:
    layer = torch.nn.Linear(2, 2)
    home = layer.weight.data_ptr()
    guest = Guest(torch.device("meta"))
    layer.register_forward_pre_hook(guest.arrive)
    layer.register_forward_hook(guest.leave, always_call=True)
    with pytest.raises(RuntimeError):
        layer(torch.zeros(1, 3, device="meta"))
    assert layer.weight.data_ptr() == home


def test_sizes_follow_the_number_formats(tiny_checkpoint: Path) -> None:
    config, free = load_model_config(tiny_checkpoint), [(CUDA[0], 10 * GIB)]
    plain = plan_device_map(config, free, host=False, dtype=torch.bfloat16, quantization=PLAIN)
    assert plain.layers == (CUDA[0], CUDA[0])
    with pytest.raises(SetupError, match="wait in host memory only in"):
        plan_device_map(config, free, host=True, dtype=torch.bfloat16, quantization=QuantSection(experts="nf4"))
