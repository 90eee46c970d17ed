"""Answering and merging: what they take, held to the code on the meta device and to what was measured."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from cogtune.configuration.quantization import QuantSection
from cogtune.configuration.shapes import VisionShape
from cogtune.plan.calibration import LIBRARIES
from cogtune.plan.inference import answer, merge
from cogtune.plan.setting import LoraShape, MicroBatch, Setting, adapted_names
from cogtune.plan.sizes import ModelSizes
from cogtune.system.byte_sizes import GIB
from tests.support.full_size import meta_answer

RESULTS = Path(__file__).parents[3] / "benchmarks" / "results"
DIALOGUE = MicroBatch(text=94, labelled=1)
"""2,400 positions, as `cogtune bench decode` has them."""
FOUR_BITS = QuantSection(experts="nf4", tower="nf4")


@pytest.mark.parametrize("batch", [DIALOGUE, MicroBatch(rows=2, text=1500, labelled=1)])
def test_the_first_pass_is_what_the_code_holds(batch: MicroBatch) -> None:
    few = ModelSizes(num_hidden_layers=4, vision=VisionShape(num_hidden_layers=2))
    own = Setting(sizes=few, batch=batch, adapter=LoraShape(adapted_names(few, ["experts"]), 16))
    tower, first = meta_answer(own)
    planned = answer(own, rows=batch.rows, new_tokens=0)
    pixels = batch.rows * 3 * 1344**2 * 4  # as they came
    kept = planned.parts["keys and values"]
    assert planned.parts["workspace"] + kept == pytest.approx(tower + pixels + LIBRARIES, rel=0.08)
    assert kept == 5 * batch.tokens(few) * 4096
    cache = 4 * batch.tokens(few) * 4096
    without = answer(replace(own, sizes=replace(few, vision=replace(few.vision, intermediate_size=1))), rows=batch.rows)
    assert without.parts["workspace"] == pytest.approx(first - cache + LIBRARIES, rel=0.1)


def test_the_targets_of_a_2k_dialogue() -> None:
    assert answer(Setting(batch=DIALOGUE, quant=FOUR_BITS), new_tokens=64).reserved < 13 * GIB
    assert answer(Setting(batch=DIALOGUE), new_tokens=64).reserved < 40 * GIB


def test_the_weights_are_those_that_were_measured() -> None:
    """What was allocated once the tower and the experts were loaded in 4 bits. torch's default segments count blocks
    that are not split, up to a mebibyte each."""
    rows = json.loads((RESULTS / "fit-h100.json").read_text(encoding="utf-8"))["rows"]
    (loaded,) = (row["load_allocated_gib"] for row in rows if row["name"] == "nf4-nf4-live-r8")
    parts = answer(Setting(quant=FOUR_BITS)).parts
    weights = sum(size for name, size in parts.items() if name not in ("keys and values", "workspace"))
    assert weights / GIB == pytest.approx(loaded, abs=0.2)


def test_answering_loads_the_tower_of_a_cached_run_and_needs_one_card() -> None:
    trained = Setting(tower="cached", quant=QuantSection(experts="nf4"), engine="fsdp2", ranks=4).with_recomputed(32)
    assert answer(trained).parts["vision tower"] == pytest.approx(8.03 * GIB, rel=0.01)
    assert answer(trained).parts == answer(Setting(quant=QuantSection(experts="nf4"))).parts
    text = Setting(tower="none", batch=MicroBatch(images=0, text=900))
    assert answer(text).parts["keys and values"] < answer(Setting()).parts["keys and values"]


def test_more_rows_and_longer_answers_take_more() -> None:
    one = answer(Setting(quant=FOUR_BITS))
    assert answer(Setting(quant=FOUR_BITS), rows=4).reserved > one.reserved + 2 * GIB
    longer = answer(Setting(quant=FOUR_BITS), new_tokens=1024).parts["keys and values"]
    assert longer - one.parts["keys and values"] == 33 * 512 * 4096
    assert answer(Setting(quant=QuantSection(embedding="host"))).host_bytes > one.host_bytes + 0.9 * GIB


def test_merging_needs_no_card() -> None:
    phase = merge(Setting(adapter=LoraShape(adapted_names(ModelSizes(), ["experts"]), 16)))
    assert phase.allocated == 0
    assert 3 * GIB < phase.host_bytes < 4.5 * GIB
