"""What is chosen fits, is the fastest of what fits, and keeps what the user fixed."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest

from cogtune.checkpoint.random import tiny_config
from cogtune.configuration.engine_rules import ENGINES, facts_of, refusal
from cogtune.configuration.load import load_config
from cogtune.configuration.quantization import QuantSection
from cogtune.errors import ConfigError, SetupError
from cogtune.plan.cards import CARDS, REFERENCE, find_card
from cogtune.plan.choose import (
    best,
    checkpointing,
    engine,
    fits,
    is_supported,
    keeping_gathered,
    largest_batch,
    smallest_card,
    tower_fits,
)
from cogtune.plan.data_rows import TYPICAL
from cogtune.plan.from_config import setting_of
from cogtune.plan.local_cards import local_cards
from cogtune.plan.memory import predict
from cogtune.plan.plan import keys_of
from cogtune.plan.setting import LoraShape, Setting, adapted_names
from cogtune.plan.sharding import Gathering
from cogtune.plan.sizes import ModelSizes
from cogtune.plan.time import step_time
from cogtune.system.byte_sizes import GIB

EXPERTS = LoraShape(adapted_names(ModelSizes(), ["experts"]), 16)
CACHED = Setting(adapter=EXPERTS, tower="cached", compile="auto")
TOWER = Setting(adapter=LoraShape(adapted_names(ModelSizes(), ["vision-tower"]), 4))


def test_as_few_layers_are_recomputed_as_the_budget_needs() -> None:
    assert len(checkpointing(CACHED, 80 * GIB).decoder) == 0
    counts = []
    for budget in (42, 38, 34, 32):
        found = checkpointing(CACHED, budget * GIB)
        assert found is not None
        assert fits(found, budget * GIB)
        count = len(found.decoder)
        assert found.decoder == frozenset(range(count))
        if 0 < count < 32:  # one fewer would come closer to the budget than a choice should
            assert not fits(CACHED.with_recomputed(count - 1), round(0.99 * budget * GIB) - 2**28)
        counts.append(count)
    assert counts == sorted(counts)
    assert 0 < counts[0] < counts[-1]
    assert checkpointing(CACHED, 28 * GIB) is None


def test_layers_stay_gathered_where_there_is_memory_for_them() -> None:
    """On a large card all, so that nothing is gathered a second time; on a small one as many as leave a tenth free."""
    sharded = replace(CACHED, engine="fsdp2", ranks=2)
    layers, layer = sharded.sizes.num_hidden_layers, Gathering(sharded).layer
    assert keeping_gathered(sharded, 140 * GIB).keep_gathered == layers
    least = predict(sharded).driver
    assert keeping_gathered(sharded, least).keep_gathered == 0
    some = keeping_gathered(sharded, round(least / 0.9) + 5 * layer)
    assert 1 <= (some.keep_gathered or 0) <= 5
    assert predict(some).driver <= 0.9 * (round(least / 0.9) + 5 * layer)
    assert step_time(some, REFERENCE).seconds < step_time(sharded, REFERENCE).seconds
    asked = replace(sharded, keep_gathered=3)
    assert keeping_gathered(asked, 140 * GIB) == asked
    for other in (replace(CACHED, engine="ddp", ranks=2), replace(sharded, offload="weights")):
        assert keeping_gathered(other, 140 * GIB) == other


def test_a_tower_that_trains_is_recomputed_in_proportion() -> None:
    found = checkpointing(TOWER, 60 * GIB)
    assert found is not None
    assert 0 < len(found.blocks) <= 63
    assert len(found.blocks) >= 63 * len(found.decoder) / 32


def test_the_largest_batch_fits_and_one_more_row_does_not() -> None:
    rows = largest_batch(CACHED, 40 * GIB)
    whole = CACHED.with_recomputed(32)
    assert rows >= 2
    assert fits(whole.with_batch(rows=rows), 40 * GIB)
    assert not fits(whole.with_batch(rows=rows + 1), 40 * GIB)
    assert largest_batch(CACHED, 20 * GIB) == 0


def test_one_model_a_card_where_it_fits_else_shards() -> None:
    card = find_card("h100")
    assert engine(CACHED, card, 1) == "single"
    assert engine(CACHED, card, 2) == "ddp"
    assert engine(CACHED, find_card("24GiB"), 2) == "fsdp2"
    # moments of a wide adapter, divided over eight cards, leave room for the whole model
    wide = replace(CACHED, adapter=replace(EXPERTS, rank=192))
    assert engine(wide, find_card("48GiB"), 8) == "zero2"
    assert engine(wide, find_card("48GiB"), 8, ["ddp", "fsdp2"]) == "fsdp2"


def test_the_engine_that_needs_least_where_none_fits() -> None:
    assert engine(CACHED, find_card("12GiB"), 2) == "fsdp2"
    assert engine(replace(CACHED, quant=QuantSection(experts="int8")), find_card("12GiB"), 2) in ("ddp", "zero2")


def test_what_an_engine_takes_is_what_training_lets_it_take() -> None:
    values = {
        "quant.experts": ["none", "nf4", "fp8"],
        "quant.tower": ["none", "int8"],
        "quant.embedding": ["device", "host"],
        "lora.dora": ["false", "true"],
        "lora.targets": ["experts", "vision-tower"],
        "data.cache_features": ["off", "on"],
        "train.optimizer": ["adamw", "adamw8bit"],
        "parallel.offload": ["none", "weights", "optimizer"],
    }
    for chosen in product(*values.values()):
        flags = dict(zip(values, chosen, strict=True))
        config = load_config(None, {"model": "base", "data": "pictures", "output": "out"} | flags)
        setting = setting_of(config, TYPICAL, ranks=2)
        for name in ENGINES:
            taken = refusal(facts_of(config, name)) is None
            assert is_supported(replace(setting, tensor=2 if name == "tensor" else 1), name) == taken, (name, flags)


def test_ranks_that_divide_each_layer_keep_the_model_s_number_format() -> None:
    """A plan chose NF4 for them, which training refuses."""
    cut = replace(CACHED, tower="live", ranks=2, tensor=2)
    found = best(cut, find_card("24GiB"))
    assert found is not None
    assert found.setting.quant.formats == dict.fromkeys(found.setting.quant.formats, "none")
    assert found.setting.quant.embedding == "device"
    assert found.setting.optimizer == "adamw"
    assert "parallel.engine" not in keys_of(found.setting)


def test_whether_the_tower_fits() -> None:
    assert tower_fits(CACHED, 79 * GIB)
    assert not tower_fits(CACHED, 33 * GIB)
    assert checkpointing(CACHED, 33 * GIB) is not None


@pytest.mark.parametrize("size", [12, 16, 24, 40, 80])
def test_the_choice_fits_its_card(size: int) -> None:
    card = find_card(f"{size}GiB")
    choice = best(CACHED, card)
    assert choice is not None
    assert choice.memory.driver <= card.usable
    assert (choice.setting.quant.experts == "none") == (size >= 40)
    assert (len(choice.setting.decoder) == 0) == (size in (24, 80))  # 24: in 4 bits, 80: as they are


def test_of_equally_fast_settings_the_simplest_is_taken() -> None:
    """A tiny model's step waits for the host in every format, and sums of floats differ in their last digits."""
    tiny = Setting(sizes=ModelSizes.from_config(tiny_config().to_dict()), compile="auto")
    for rows in range(1, 9):
        choice = best(tiny.with_batch(rows=rows), find_card("24GiB"))
        assert choice is not None
        assert (choice.setting.quant.experts, choice.setting.tower) == ("none", "cached")


def test_what_the_user_fixed_stays() -> None:
    card = find_card("24GiB")
    assert best(CACHED, card, {"quant.experts", "quant.stream"}) is None
    kept = replace(CACHED, quant=QuantSection(experts="int8"), tower="live")
    choice = best(kept, find_card("40GiB"), {"quant.experts", "data.cache_features"})
    assert choice is not None
    assert (choice.setting.quant.experts, choice.setting.tower) == ("int8", "live")
    every = CACHED.with_recomputed(32)
    fixed = best(every, find_card("h100"), {"train.gradient_checkpointing"})
    assert fixed is not None
    assert len(fixed.setting.decoder) == 32


def test_the_smallest_card_is_the_smallest() -> None:
    needed, card = smallest_card(CACHED)
    assert card is not None
    assert needed <= card.memory
    assert best(CACHED, card) is not None
    smaller = [other for other in CARDS if other.bfloat16 and other.memory < card.memory]
    assert all(best(CACHED, other) is None for other in smaller)
    assert smallest_card(replace(CACHED, batch=replace(CACHED.batch, rows=4000)))[1] is None


def test_sharding_over_cards_takes_less_of_each() -> None:
    one, two = (predict(replace(CACHED, engine="fsdp2", ranks=ranks)).reserved for ranks in (1, 2))
    assert two < one - 8 * GIB
    card = find_card("24GiB")
    choice = best(replace(CACHED, ranks=4, engine="ddp"), card, {"quant.experts"})
    assert choice is not None
    assert choice.setting.engine == "fsdp2"


def test_more_work_takes_longer_and_more_cards_go_faster() -> None:
    card = REFERENCE
    base = step_time(CACHED, card).seconds
    assert step_time(CACHED.with_recomputed(32), card).seconds > 1.3 * base
    assert step_time(replace(CACHED, tower="live"), card).seconds > 1.8 * base
    assert step_time(CACHED.with_batch(rows=2), card).seconds > 1.7 * base
    assert step_time(replace(CACHED, quant=QuantSection(experts="nf4")), card).seconds > base
    assert step_time(CACHED, find_card("rtx 4090")).seconds > 3 * base
    two = replace(CACHED, ranks=2, engine="ddp")
    assert base <= step_time(two, card).seconds < 1.1 * base  # gradients are sent while others are computed
    assert step_time(two, replace(card, link=1e9)).seconds > step_time(two, card).seconds


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("h100", "H100 80GB"),
        ("RTX 4090", "RTX 4090 24GB"),
        ("a100", "A100 80GB"),
        ("A100 40GB", "A100 40GB"),
        ("a10", "A10 24GB"),
        ("L4", "L4 24GB"),
        ("4090", "RTX 4090 24GB"),
        ("24", "24.0 GiB card"),
        ("24GiB", "24.0 GiB card"),
        ("24 GB", "24.0 GiB card"),
    ],
)
def test_cards_by_name_and_size(text: str, name: str) -> None:
    assert find_card(text).name == name


def test_an_unknown_card_is_refused() -> None:
    with pytest.raises(ConfigError, match="neither a known card nor a size") as caught:
        find_card("RTX 4900")
    assert "RTX" in (caught.value.hint or "")


def _smi(arguments: object) -> str:
    if "compute-apps" in str(arguments):
        return "GPU-a, 4711, /usr/bin/python3, 9000\n"
    rows = [
        "0, GPU-a, NVIDIA GeForce RTX 4090, 24564, 15000, 8.9",
        "1, GPU-b, NVIDIA H100 80GB HBM3, 81559, 81000, 9.0",
    ]
    return "\n".join(rows) + "\n"


def test_free_memory_and_who_holds_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    first, second = local_cards(_smi)
    assert first.usable == 15000 * 2**20
    assert first.holders == ("python3 (pid 4711): 9000 MiB",)
    assert not first.measured
    assert (first.capability, second.capability) == ((8, 9), (9, 0))
    assert second.measured
    assert second.holders == ()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert [card.name for card in local_cards(_smi)] == ["NVIDIA H100 80GB HBM3"]


def test_no_card_is_an_error_that_says_what_to_give() -> None:
    def absent(arguments: object) -> str:
        raise OSError("nvidia-smi is not installed")

    with pytest.raises(SetupError, match="not installed") as caught:
        local_cards(absent)
    assert "--card 24GiB" in (caught.value.hint or "")


def test_tensor_parallelism_cuts_weights_activations_and_time() -> None:
    whole = replace(CACHED, compile=True).with_batch(rows=4).with_recomputed(32)
    cut = replace(whole, ranks=2, tensor=2, engine="ddp")
    assert predict(cut).phase("load").reserved < 0.55 * predict(whole).phase("load").reserved
    one, two = (predict(setting).phase("train").parts["activations"] for setting in (whole, cut))
    assert 0.5 * one < two < 0.95 * one  # the stream itself is whole on both
    seconds = step_time(whole, REFERENCE).seconds
    assert 0.5 * seconds < step_time(cut, REFERENCE).seconds < 0.8 * seconds
