"""What is planned for streamed layers is what `model.layer_streaming` does with them."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cogtune.checkpoint.random import TINY, TINY_VISION, random_weights, tiny_config
from cogtune.configuration.load import load_config
from cogtune.configuration.quantization import QuantSection
from cogtune.errors import ConfigError
from cogtune.model.layer_streaming import BUFFERS, StreamPlacement, streamed_layers
from cogtune.plan import streaming as planned
from cogtune.plan.ask import plan
from cogtune.plan.cards import find_card
from cogtune.plan.choose import best, filling, fits, streaming
from cogtune.plan.inference import answer, slots
from cogtune.plan.memory import OFFLOADED_BLOCK, fill, predict
from cogtune.plan.plan import keys_of
from cogtune.plan.setting import LoraShape, MicroBatch, Setting, adapted_names
from cogtune.plan.sizes import ModelSizes
from cogtune.plan.streaming import Streaming
from cogtune.plan.time import step_time
from cogtune.system.byte_sizes import GIB

CPU = torch.device("cpu")
RANK_8 = LoraShape(adapted_names(ModelSizes(), ["vision_expert_query_key_value"]), 8)
NF4 = Setting(adapter=RANK_8, tower="cached", compile="auto", quant=QuantSection(experts="nf4", embedding="host"))
NF4 = NF4.with_recomputed(32)


@pytest.mark.parametrize("form", ["none", "nf4", "int8", "fp8"])
def test_the_bytes_of_a_layer_are_those_that_are_streamed(form: str) -> None:
    if form in ("nf4", "int8"):
        pytest.importorskip("bitsandbytes")
    quant = QuantSection(experts=form, tower=form, fp8_layouts="two" if form == "fp8" else "one")
    placement = StreamPlacement(CPU, streamed_layers(0, 4), streamed_layers(1, 3))
    config = tiny_config(num_hidden_layers=4, vision_config={"num_hidden_layers": 3})
    random_weights(config, torch.bfloat16, CPU, quantization=quant, placement=placement)
    sizes = ModelSizes.from_config(
        {**TINY, "num_hidden_layers": 4, "vision_config": {**TINY_VISION, "num_hidden_layers": 3}}
    )
    setting = Setting(sizes=sizes, quant=quant, resident=0, tower_resident=1)
    parts = Streaming.of_decoder(setting), Streaming.of_tower(setting)
    assert [part.layers for part in parts] == [4, 2]
    tensors = 4 * 10 * 2 + 2 * 4 * 2  # each begins at a multiple of 256 bytes
    assert 0 <= placement.host_bytes - sum(part.host for part in parts) <= 256 * tensors
    assert planned.BUFFERS == BUFFERS


def test_what_streaming_leaves_on_the_card() -> None:
    whole, streamed = predict(NF4).phase("train"), predict(NF4.streaming(0)).phase("train")
    layer = Streaming.of_decoder(NF4.streaming(0)).each
    assert layer == 218_103_808 // 2 * 2 + 218_103_808 * 2 // 64  # q, k, v, dense, gate, up, down of both experts
    assert whole.parts["experts"] - streamed.parts["experts"] == 30 * layer
    assert streamed.host_bytes - whole.host_bytes == 32 * layer
    assert {name: size for name, size in whole.parts.items() if name != "experts"} == {
        name: size for name, size in streamed.parts.items() if name != "experts"
    }


def test_a_small_card_streams_as_few_layers_as_it_has_to() -> None:
    for size, least, most in ((6, 0, 20), (8, 8, 31)):
        card = find_card(f"{size}GiB")
        choice = best(replace(NF4, decoder=frozenset(), quant=QuantSection()), card)
        assert choice is not None
        assert choice.memory.driver <= card.usable
        assert choice.setting.quant.experts == "nf4"
        resident = choice.setting.resident
        assert resident is not None
        assert least <= resident <= most
        assert keys_of(choice.setting)["quant.stream"] == "auto"
        assert not fits(choice.setting.streaming(resident + 2), card.usable - 2**28)


def test_nothing_is_streamed_where_all_fits() -> None:
    choice = best(NF4, find_card("12GiB"))
    assert choice is not None
    assert choice.setting.resident is None
    assert best(NF4, find_card("6GiB"), {"quant.stream"}) is None


def test_unquantised_weights_stream_where_the_user_wants_them() -> None:
    choice = best(replace(NF4, quant=QuantSection()), find_card("12GiB"), {"quant.experts"})
    assert choice is not None
    assert choice.setting.quant.experts == "none"
    assert choice.setting.resident is not None


def test_the_tower_streams_while_the_cache_is_filled_where_it_does_not_fit() -> None:
    assert filling(NF4, 12 * GIB) is None
    kept = filling(NF4, 5 * GIB)
    assert kept is not None
    assert 0 < kept < 63
    assert fill(replace(NF4, tower_resident=kept)).reserved <= 5 * GIB
    found = streaming(NF4, find_card("6GiB").usable)
    assert found is not None
    assert found.tower_resident is not None


def test_a_slow_bus_costs_time_and_a_fast_one_hides_behind_computation() -> None:
    card = find_card("h200")
    resident, streamed = step_time(NF4, card), step_time(NF4.streaming(0), card)
    copies = 30 * Streaming.of_decoder(NF4.streaming(0)).each / card.bus
    assert 0 < streamed.copying < copies, "most of two passes' copies run beside computation"
    assert step_time(NF4.streaming(16), card).seconds < 1.02 * resident.seconds
    slow = replace(card, bus=13e9)
    exposed = step_time(NF4.streaming(0), slow)
    assert exposed.seconds == pytest.approx(2 * 30 * Streaming.of_decoder(NF4.streaming(0)).each / 13e9, rel=0.05)


def test_what_answering_takes_afterwards_is_said_with_the_flags_that_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)  # which a command sets for its process
    config = load_config(None, {"model": "base", "data": "data", "output": "out"})
    asked = {"placeholders": ["model.path", "data.path"]}
    for card, stream, most in (("6GiB", "all", 4.8), ("8GiB", "0", 6.8)):
        text = plan(config, card=card, **asked).text
        found = re.search(r"--quant\.embedding host --quant\.stream (\w+) it takes (\d\.\d)", text)
        assert found is not None
        assert found[1] == stream
        assert float(found[2]) < most


def test_a_6_gb_card_answers_with_the_head_or_a_picture_on_it() -> None:
    """With a slot of 2,592 columns, as `cogtune bench decode` has it."""
    quant = QuantSection(experts="nf4", tower="nf4", embedding="host", stream=0)
    dialogue = Setting(quant=quant, batch=MicroBatch(text=94, labelled=1))
    found, stays = (slots(dialogue.streaming(count), 1, 2592) for count in (0, 1))
    assert found.reserved < 5.2 * GIB
    head = 128256 * 4096 * 2
    assert stays.parts["embedding and head"] - found.parts["embedding and head"] == head
    assert found.host_bytes - stays.host_bytes > head
    text = slots(Setting(quant=quant, batch=MicroBatch(images=0, text=2000), tower="none").streaming(0), 1, 2592)
    assert text.reserved <= found.reserved


def test_saved_inputs_in_host_memory_leave_two_on_the_card() -> None:
    """At eight unquantised rows they are nearly half of what a streamed step takes."""
    kept = replace(NF4, quant=QuantSection(embedding="host"), batch=MicroBatch(rows=8)).streaming(0)
    away = replace(kept, offloading=True)
    entry = 8 * (2304 + 402) * 4096 * 2
    saved = predict(kept).phase("train").parts["activations"] - predict(away).phase("train").parts["activations"]
    assert 28 * entry <= saved <= 31 * entry
    assert predict(away).reserved < 8 * GIB
    assert predict(away).host - predict(kept).host == 32 * -(-entry // OFFLOADED_BLOCK) * OFFLOADED_BLOCK
    card = find_card("h200")
    slower = step_time(away, card).seconds / step_time(kept, card).seconds
    assert 1 < slower < 1.02
    assert step_time(away, replace(card, bus=8e9)).copying > step_time(kept, replace(card, bus=8e9)).copying
    none = replace(away, decoder=frozenset())
    assert predict(none).phase("train").parts == predict(replace(none, offloading=False)).phase("train").parts


def test_long_answers_of_many_rows_peak_at_the_head() -> None:
    """Then the buffers are gone: what is left of the experts are those that every token reads."""
    quant = QuantSection(experts="nf4", tower="nf4", embedding="host", stream=0)
    own = Setting(quant=quant, batch=MicroBatch(images=0, text=100), tower="none").streaming(0)
    phase = answer(own, rows=1)
    each = Streaming.of_experts(own).each
    whole = answer(replace(own, resident=None, tower_resident=None, quant=quant.changed(stream="off")))
    assert whole.parts["experts"] - phase.parts["experts"] == 32 * each
    assert phase.parts["embedding and head"] == whole.parts["embedding and head"]


@pytest.mark.parametrize("page", ["docs/guides/memory.md", "docs/zh/guides/memory.md"])
def test_the_guides_table_of_slower_buses_is_the_plan(page: str) -> None:
    text = (Path(__file__).parents[3] / page).read_text(encoding="utf-8")
    (head,) = re.findall(r"^\|.*55 GB/s.*$", text, re.M)
    rates = [float(rate) for rate in re.findall(r"([\d.]+) GB/s", head)]
    rows = re.findall(r"^\| (\w+.*) \| (NF4|bfloat16) \| (\d) \| (.*%) \|$", text, re.M)
    assert len(rows) == 6
    for name, form, count, shares in rows:
        quant = QuantSection(experts="nf4" if form == "NF4" else "none", embedding="host")
        own, card = replace(NF4, quant=quant, batch=MicroBatch(rows=int(count))), find_card(name)
        planned = [
            step_time(own, card).seconds / step_time(own.streaming(0), replace(card, bus=rate * 1e9)).seconds
            for rate in rates
        ]
        assert [f"{100 * share:.0f} %" for share in planned] == shares.split(" | ")


def test_the_bus_is_a_flag_of_the_plan() -> None:
    config = load_config(None, {"model": "base", "data": "data", "output": "out", "quant.stream": "0"})
    asked = {"placeholders": ["model.path", "data.path"], "card": "8GiB"}
    fast, slow = (plan(config, bus=bus, **asked) for bus in (None, "3GB/s"))
    assert slow.times.step.copying > 2 * fast.times.step.copying
    assert "waiting for copies from host memory" in slow.text
    assert "32 of 32 layers streamed from host memory" in slow.text
    with pytest.raises(ConfigError, match="--bus: found `fast`"):
        plan(config, bus="fast", **asked)
