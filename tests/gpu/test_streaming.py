"""Streamed layers on a GPU: copies have a stream of their own, and overwrite no layer before it has been used."""

from __future__ import annotations

import gc
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend

from cogtune.adapters.attach import attach
from cogtune.checkpoint.random import random_weights, tiny_config
from cogtune.configuration.quantization import QuantSection
from cogtune.configuration.run_config import LoraSection
from cogtune.generate.decode_steps import Begun, DecodeSteps
from cogtune.generate.decoding import Decoding
from cogtune.model import attention
from cogtune.model.activation_checkpointing import enable_checkpointing
from cogtune.model.activation_offloading import BLOCK, ActivationOffloading
from cogtune.model.compile import compile_layers, prepare_compiling
from cogtune.model.decode import prefill, prefill_hidden
from cogtune.model.head_offload import fetch_head, set_aside_head
from cogtune.model.host_memory import HostMemory
from cogtune.model.layer_streaming import StreamPlacement, streamed_layers
from cogtune.model.routing import Routing
from cogtune.model.slots import SlotCache, SlotView

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

LAYERS = 5
BUSY = 4_000_000  # cycles, 2 ms: longer than a layer's copy of 0.5 ms
WIDE = {"hidden_size": 1024, "intermediate_size": 2048, "num_attention_heads": 8, "num_multi_query_heads": 2}
FORMATS = [
    QuantSection(),
    QuantSection(experts="nf4", tower="nf4"),
    QuantSection(experts="int8"),
    QuantSection(experts="fp8", fp8_layouts="two"),
]


@pytest.fixture(autouse=True)
def _repeatable(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The fused attention kernels add gradients in an order of their own."""
    monkeypatch.setattr(attention, "_FASTEST", [SDPBackend.MATH])
    yield
    gc.collect()
    torch.cuda.empty_cache()


def _model(quant: QuantSection, resident: int | None) -> Any:
    if "fp8" in quant.formats.values() and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this card does not multiply fp8")
    if {"nf4", "int8"} & set(quant.formats.values()):
        pytest.importorskip("bitsandbytes")
    config, device = tiny_config(num_hidden_layers=LAYERS, **WIDE), torch.device("cuda")
    placement = None if resident is None else StreamPlacement(device, streamed_layers(resident, LAYERS), (0, 1))
    base = random_weights(config, torch.bfloat16, device, quantization=quant, placement=placement, seed=1)
    torch.manual_seed(4)
    model = attach(base, LoraSection(targets=("experts",), rank=8)).train()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # they start at zero, and then no gradient reaches lora_A
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def _step(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    rows = torch.tensor([[256, *[258] * 6, *range(60, 120)], [256, *[258] * 6, *range(100, 160)]])
    labels = torch.where(torch.arange(rows.shape[1]) > 7, rows, -100)
    pixels = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(3)).bfloat16().cuda()
    routing = Routing.build((rows == 258).long(), labels=labels)
    loss = model(input_ids=rows.cuda(), labels=labels.cuda(), routing=routing, pixel_values=pixels).loss
    loss.backward()
    gradients = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    model.zero_grad()
    return loss.detach(), gradients


def _busy(layers: Any) -> None:
    """Make every layer's own work begin late, forward and backward, so that copies would be early."""

    def wait(*_: Any) -> None:
        torch.cuda._sleep(BUSY)

    for layer in layers:
        layer.register_forward_pre_hook(wait)
        for parameter in layer.parameters():
            if parameter.requires_grad:
                parameter.register_hook(wait)


@pytest.mark.parametrize("slow", ["copies", "computation"])
@pytest.mark.parametrize("quant", FORMATS, ids=lambda quant: quant.experts)
def test_a_streamed_model_trains_as_a_resident_one(quant: QuantSection, slow: str) -> None:
    expected, model = _model(quant, None), _model(quant, 0)
    wanted, again = _step(expected), _step(expected)
    assert torch.equal(wanted[1], again[1]), "the test needs kernels that repeat their results"
    if slow == "computation":
        _busy(model.base_model.model.model.layers)
    for chosen in ((), (0, 1, 2, 3, 4), (1, 2)):
        enable_checkpointing(model.base_model.model, chosen)
        for _ in range(2):
            found = _step(model)
            assert torch.equal(found[0], wanted[0]), chosen
            assert torch.equal(found[1], wanted[1]), chosen
        with torch.no_grad():
            enable_checkpointing(model.base_model.model, ())


def test_compiled_layers_stream_to_the_bit() -> None:
    """In NF4, whose kernel the compiler launches itself, where bitsandbytes is installed."""
    quant = FORMATS[1 if importlib.util.find_spec("bitsandbytes") else 0]
    prepare_compiling(torch.device("cuda"))
    results = []
    for resident in (None, 0, 2):
        model = _model(quant, resident)
        compile_layers(model.base_model.model)
        for chosen in ((), (0, 1, 2, 3, 4)):
            enable_checkpointing(model.base_model.model, chosen)
            results.append([_step(model) for _ in range(2)][1])
        del model
    for place, (loss, gradients) in enumerate(results):
        assert torch.equal(loss, results[place % 2][0])
        assert torch.equal(gradients, results[place % 2][1])


@pytest.mark.parametrize(
    ("compiled", "slow"),
    [(False, "copies"), (False, "computation"), (True, "computation")],
    ids=["copies", "computation", "compiled"],
)
def test_saved_inputs_that_wait_in_host_memory_change_no_bit(compiled: bool, slow: str) -> None:
    prepare_compiling(torch.device("cuda"))
    results = []
    for offloading, resident in ((None, None), (ActivationOffloading(torch.device("cuda")), None),
                                 (ActivationOffloading(torch.device("cuda")), 0)):  # fmt: skip
        model = _model(FORMATS[0], resident)
        if compiled:
            compile_layers(model.base_model.model)
        if slow == "computation":
            _busy(model.base_model.model.model.layers)
        enable_checkpointing(model.base_model.model, offloading=offloading)
        results += [_step(model) for _ in range(3)]
        del model
    for loss, gradients in results:
        assert torch.equal(loss, results[0][0])
        assert torch.equal(gradients, results[0][1])


def _held(model: Any, offloading: ActivationOffloading | None, words: int) -> tuple[int, int]:
    """Bytes on the card between the two passes of a step, and the most there were, besides what was there before."""
    enable_checkpointing(model.base_model.model, offloading=offloading)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    row = torch.tensor([[256, *[60 + place % 60 for place in range(words)]]])
    labels = torch.where(torch.arange(words + 1) > words - 8, row, -100)
    routing = Routing.build(torch.zeros_like(row), labels=labels)
    loss = model(input_ids=row.cuda(), labels=labels.cuda(), routing=routing).loss
    held = torch.cuda.memory_allocated() - before
    loss.backward()
    model.zero_grad()
    return held, torch.cuda.max_memory_allocated() - before


@pytest.mark.alone
def test_one_saved_input_is_on_the_card_at_a_time_besides_the_layers_own() -> None:
    model, words = _model(FORMATS[0], None), 6000
    entry = (words + 1) * 1024 * 2
    _held(model, None, words)  # libraries take their workspaces
    kept, most = _held(model, None, words)
    offloading = ActivationOffloading(torch.device("cuda"))
    for _ in range(2):
        left, least = _held(model, offloading, words)
        assert kept - left > (LAYERS - 1.5) * entry
        assert most - least > (LAYERS - 4) * entry
    assert offloading.host_bytes == LAYERS * BLOCK


@torch.no_grad()
def _answer(model: Any, seed: int, step: Callable[[], None]) -> tuple[torch.Tensor, list[int]]:
    """The logits behind a picture and five words, and seven tokens; ``step`` is called before each of them."""
    cache = SlotCache(model.config, 1, 64, torch.bfloat16, torch.device("cuda"))
    steps, words = DecodeSteps(model, cache, graphs=True), torch.arange(60, 65)[None]
    picture = torch.tensor([[256, *[258] * 6]])
    for _ in range(2):  # the second time the captured step is replayed
        set_aside_head(model)
        pixels = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(seed)).bfloat16().cuda()
        view = SlotView(cache, 0)
        features = model.model.encode_images(pixels)
        _, position = prefill_hidden(model, view, picture, (picture == 258).long(), features)
        logits, position = prefill(model, view, words, torch.zeros_like(words), start=position)
        found = steps.begin(logits[None], [Begun(0, position, view.length, Decoding(max_new_tokens=9))]).tolist()
        for _ in range(6):
            step()
            found += steps.step([0], False).tolist()
    return logits, found


def test_a_head_that_comes_back_elsewhere_gives_the_same_answers() -> None:
    """Captured steps read the head where it was; if it is somewhere else they are captured anew."""
    config = tiny_config(num_hidden_layers=LAYERS, vocab_size=4096, **WIDE)
    device, everything = torch.device("cuda"), streamed_layers(0, LAYERS)
    placement = StreamPlacement(device, everything, (0, 1), answers=True, head=True)
    resident = random_weights(config, torch.bfloat16, device, seed=1).eval()
    model = random_weights(config, torch.bfloat16, device, placement=placement, seed=1).eval()
    places, kept = set[int](), list[torch.Tensor]()

    def moved() -> None:
        set_aside_head(model)
        kept.append(torch.empty(model.lm_head.weight.nbytes, dtype=torch.uint8, device=device))  # in its place
        places.add(fetch_head(model))

    for seed, step in ((3, lambda: None), (5, moved)):
        wanted, found = _answer(resident, seed, lambda: None), _answer(model, seed, step)
        assert torch.equal(found[0], wanted[0])
        assert found[1] == wanted[1]
    assert len(places) > 6


@pytest.mark.alone
def test_the_head_and_the_buffers_are_not_on_the_card_together() -> None:
    """At their own turn each takes the place of the other."""
    config = tiny_config(num_hidden_layers=LAYERS, vocab_size=8192, **WIDE)
    device, everything = torch.device("cuda"), streamed_layers(0, LAYERS)
    placement = StreamPlacement(device, everything, (0, 1), answers=True, head=True)
    model = random_weights(config, torch.bfloat16, device, placement=placement, seed=1).eval()
    pixels = torch.randn(1, 3, 8, 8, device=device)
    with torch.no_grad():
        model.model.encode_images(pixels)  # libraries take their workspaces
    fetch_head(model)
    set_aside_head(model)
    before = torch.cuda.memory_allocated()
    fetch_head(model)
    head = torch.cuda.memory_allocated() - before
    assert abs(head - model.lm_head.weight.nbytes) < 2**20  # small tensors of libraries come and go
    with torch.no_grad():
        model.model.encode_images(pixels)
    buffers = torch.cuda.memory_allocated() - before
    assert 0 < buffers < head
    fetch_head(model)
    assert abs(torch.cuda.memory_allocated() - before - head) < 2**20


@pytest.mark.alone
def test_only_two_layers_are_on_the_card() -> None:
    before = torch.cuda.memory_allocated()
    model = _model(QuantSection(), 0)
    weights = {m.weight.untyped_storage() for m in model.base_model.model.model.layers.modules()
               if isinstance(m, torch.nn.Linear) and m.weight.dtype == torch.bfloat16}  # fmt: skip
    sizes = {storage.data_ptr(): storage.nbytes() for storage in weights}  # adapters are float32
    assert len(sizes) == 2
    layer = min(sizes.values())
    assert layer > 2 * 3 * 1024 * 2048 * 2
    small = 24 * 2**20  # embedding, GLU adapter, adapter, tower
    assert torch.cuda.memory_allocated() - before < 2 * layer + small
    del model, weights
    gc.collect()
    assert torch.cuda.memory_allocated() - before < 2**20


@pytest.mark.alone
def test_host_memory_is_locked_while_it_is_used() -> None:
    memory = HostMemory(10_000_000, torch.device("cuda"))
    content = memory.content
    assert content.is_pinned()
    assert content.numel() == 10_000_000
    assert content.data_ptr() % 4096 == 0
    del memory
    gc.collect()
    assert not content.is_pinned()
