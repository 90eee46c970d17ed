"""Predictions against what is known: libraries' own formats, the adapter's count, and measured runs."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cogtune.adapters.attach import attach
from cogtune.checkpoint.random import TINY, TINY_VISION, random_model, tiny_config
from cogtune.configuration.quantization import QuantSection
from cogtune.configuration.run_config import LoraSection
from cogtune.plan.calibration import CONTEXT
from cogtune.plan.memory import Memory, predict
from cogtune.plan.setting import LoraShape, Setting, adapted_names
from cogtune.plan.sizes import Linear, ModelSizes
from cogtune.plan.streaming import weight_bytes
from cogtune.system.byte_sizes import GIB

FULL = ModelSizes()
TINY_SIZES = ModelSizes.from_config({**TINY, "vision_config": TINY_VISION})
RESULTS = Path(__file__).parents[3] / "benchmarks" / "results"
QKV = ["vision_expert_query_key_value"]


def setting(targets: list[str], rank: int, recomputed: int = 0, **values: object) -> Setting:
    made = Setting(adapter=LoraShape(adapted_names(FULL, targets), rank), **values)
    return made.with_recomputed(recomputed) if recomputed else made


@pytest.mark.parametrize("page", ["docs/guides/memory.md", "docs/zh/guides/memory.md"])
def test_the_guides_table_of_parts_is_the_plan(page: str) -> None:
    text = (Path(__file__).parents[3] / page).read_text(encoding="utf-8")
    (table,) = re.findall(r"^\| [^|\n]+ \| bfloat16 \| [^|\n]+ \|\n\|.*\n((?:\|.*\n)+)", text, re.M)
    shown = [[float(number) for number in re.findall(r"\d+\.\d+", row)] for row in table.splitlines()]
    live = setting(["experts"], 16, tower="live", compile="auto")
    small, half = (QuantSection(experts=name, tower=name, embedding="host") for name in ("nf4", "int8"))
    whole, recomputed, four, eight = (
        {name: size / GIB for name, size in predict(one).phase("train").parts.items()}
        for one in (
            live,
            live.with_recomputed(32),
            replace(live, quant=small, optimizer="adamw8bit"),
            replace(live, quant=half),
        )
    )
    adapters = [2 * parts["adapter"] + parts["optimizer"] for parts in (whole, four)]  # gradients are as large
    assert [[round(x, 1) for x in row] for row in shown[:-1]] == [
        [round(x, 1) for x in row]
        for row in (
            [whole["experts"], four["experts"], eight["experts"]],
            [whole["vision tower"], four["vision tower"]],
            [whole["embedding and head"], four["embedding and head"]],
            adapters,
            [whole["activations"], recomputed["activations"]],
        )
    ]
    assert shown[-1][0] == CONTEXT / GIB


@pytest.mark.parametrize("shape", [(128, 192), (96, 64)])
def test_a_quantised_linear_has_the_librarys_own_size(shape: tuple[int, int]) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    outputs, inputs = shape
    linear = Linear("model.layers.0.x", inputs, outputs, False)
    packed = bitsandbytes.functional.quantize_4bit(
        torch.randn(shape).bfloat16(), quant_type="nf4", compress_statistics=True
    )
    state = packed[1]
    tensors = [packed[0], state.absmax, state.code, state.state2.absmax, state.state2.code, state.offset]
    assert weight_bytes(linear, "nf4", "bfloat16") == sum(t.numel() * t.element_size() for t in tensors)
    module = bitsandbytes.nn.Linear8bitLt(inputs, outputs, bias=False, has_fp16_weights=False)
    codes, scales, _ = bitsandbytes.functional.int8_vectorwise_quant(module.weight.data.half())
    held = sum(t.numel() * t.element_size() for t in (codes, scales))
    assert weight_bytes(linear, "int8", "bfloat16") == held


@pytest.mark.parametrize("targets", [["experts"], ["vision-tower", "glu-adapter"], QKV])
def test_the_adapters_parameters_are_peft_s(targets: list[str]) -> None:
    lora = LoraSection(targets=targets, rank=3)
    model = attach(random_model(tiny_config(), seed=0), lora)
    own = Setting(sizes=TINY_SIZES, adapter=LoraShape(adapted_names(TINY_SIZES, targets), 3))
    held = {n: p for n, p in model.named_parameters() if "lora_" in n}
    assert own.adapter_parameters(trained_only=False) == sum(p.numel() for p in held.values())
    assert own.adapter_parameters() == sum(p.numel() for p in held.values() if p.requires_grad)


def test_the_whole_checkpoint_in_bfloat16() -> None:
    parts = predict(setting(QKV, 8)).phase("load").parts
    loaded = sum(size for name, size in parts.items() if name != "workspace")
    assert loaded == 39_006_210_560  # all tensors of the published index but the stored rotary tables


def measured(name: str) -> dict[str, float]:
    return json.loads((RESULTS / "full-size-h100.json").read_text(encoding="utf-8"))[name]


@pytest.mark.parametrize(
    ("name", "recomputed"), [("live_tower", 0), ("cached_features", 0), ("cached_features_checkpointing", 32)]
)
def test_measured_steps_at_full_size(name: str, recomputed: int) -> None:
    """That script held the tower in every row, and its reserved figure is one peak for all of them."""
    found = predict(setting(QKV, 8, recomputed, expandable=False)).phase("train")
    assert found.allocated / GIB == pytest.approx(measured(name)["peak_allocated_gib"], abs=0.25)
    if not recomputed:
        assert found.reserved / GIB == pytest.approx(measured(name)["peak_reserved_gib"], abs=0.5)


def peak(**changes: object) -> float:
    return predict(setting(["experts"], 16, **changes)).reserved / GIB


def test_what_saves_memory_is_seen_to_save_it() -> None:
    whole = peak(tower="live")
    assert peak(tower="cached") < whole - 7
    assert peak(tower="live", recomputed=32) < whole - 10
    assert peak(tower="live", recomputed=32) < peak(tower="live", recomputed=16) < whole
    small = {"tower": "cached", "recomputed": 32}
    assert (
        peak(**small, quant=QuantSection(experts="nf4"))
        < peak(**small, quant=QuantSection(experts="int8"))
        < peak(**small)
    )
    assert (
        peak(**small, quant=QuantSection(experts="nf4", embedding="host"))
        < peak(**small, quant=QuantSection(experts="nf4")) - 0.9
    )
    assert peak(**small, optimizer="adamw8bit") < peak(**small) - 0.3
    assert peak(**small, engine="fsdp2", ranks=2) < peak(**small) - 10
    waiting = replace(setting(["experts"], 16, **small, engine="fsdp2", ranks=2), offload="weights")
    assert predict(waiting).reserved / GIB < peak(**small, engine="fsdp2", ranks=2) - 8
    assert predict(waiting).host > predict(replace(waiting, offload="none")).host + 10 * GIB


def test_parts_add_up_and_phases_are_named() -> None:
    memory = predict(replace(setting(QKV, 8, 32), tower="cached", accumulation=4, eval_rows=2))
    assert [phase.name for phase in memory.phases] == ["fill", "load", "train", "evaluate", "save"]
    for phase in memory.phases:
        assert phase.allocated == sum(phase.parts.values())
        assert all(size >= 0 for size in phase.parts.values()), phase
        assert phase.host_bytes > GIB
    assert isinstance(memory, Memory)
    assert memory.driver > memory.reserved >= memory.phase("train").reserved


def test_the_update_is_counted_where_nothing_else_is_larger() -> None:
    """A wide adapter with every layer recomputed: at the update there are all gradients, and DeepSpeed's lists."""
    wide = setting(["experts"], 256, 32, tower="cached")
    gradients = 4 * wide.adapter_parameters()
    beyond = predict(wide).phase("train").parts
    held = sum(beyond[name] for name in ("activations", "adapter gradients", "logits", "workspace"))
    assert held == pytest.approx(gradients, rel=0.4)
    assert peak_of(replace(wide, optimizer="sgd")) > peak_of(replace(wide, optimizer="adamw8bit"))


def peak_of(own: Setting) -> int:
    parts = predict(own).phase("train").parts
    return sum(parts[name] for name in ("activations", "adapter gradients", "logits", "workspace"))
