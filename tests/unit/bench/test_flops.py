"""Counted operations against torch's own counter, on the tiny model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from cogtune.bench.flops import Work, forward_flops, step_flops, trained_extent, work_of
from cogtune.bench.rows import preset, synthetic_batches
from cogtune.checkpoint.random import random_model, tiny_config
from cogtune.plan.sizes import ModelSizes
from cogtune.train.batches import to_device

SIZES = ModelSizes.from_config(tiny_config().to_dict())


def _batch(folder: Path, name: str, rows: int = 1) -> dict[str, Any]:
    cpu = torch.device("cpu")
    return synthetic_batches(
        preset(name), tiny_config(), folder, batch_size=rows, count=1, cached=False, dtype=torch.float32, device=cpu
    )[0]


def test_forward_operations_equal_torchs_count(tmp_path: Path) -> None:
    model, batch = random_model(tiny_config(), seed=0), _batch(tmp_path, "text=60", rows=2)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(**to_device(batch, torch.device("cpu")), return_logits=True)  # every token to the end, all logits
    found = work_of(batch, model.config.num_image_tokens)
    columns = batch["input_ids"].shape[1]
    # plain attention computes every pair of columns, not only those that see each other
    work = Work(found.tokens, pairs=2 * columns**2, labels=found.tokens, images=2, rows=2)
    assert forward_flops(SIZES, work).forward == counter.get_total_flops()


def test_pairs_of_a_chain_and_of_a_tree(tmp_path: Path) -> None:
    chain = work_of(_batch(tmp_path / "a", "text=60"), 6)
    assert (chain.tokens, chain.labels, chain.images) == (67, 30, 1)
    assert chain.pairs == 67 * 68 // 2
    batch = _batch(tmp_path / "b", "vqa10")
    segments, parents = batch["segment_ids"][0].tolist(), batch["segment_parents"][0].tolist()

    def sees(query: int, key: int) -> bool:
        segment = segments[query]
        while segment >= 0 and segment != segments[key]:
            segment = parents[segment]
        return segment == segments[key] and key <= query

    everyone = range(len(segments))
    assert len(parents) > 10
    assert work_of(batch, 6).pairs == sum(sees(query, key) for query in everyone for key in everyone)


def test_a_step_counts_what_is_trained_through_twice() -> None:
    flops = forward_flops(SIZES, Work(tokens=10, pairs=55, labels=4, images=1, rows=1))
    decoder, rest = flops.layers * flops.decoder_layer, flops.glu_adapter + 2 * flops.head
    assert step_flops(flops, live_tower=False) == 2 * decoder + rest
    assert step_flops(flops, live_tower=True) == 2 * decoder + rest + flops.tower
    assert step_flops(flops, live_tower=False, first_trained_layer=1) == 2 * decoder - flops.decoder_layer + rest
    both = step_flops(flops, live_tower=True, first_trained_layer=1, vision_trains="tower")
    assert both == 2 * (decoder + flops.glu_adapter + flops.head + flops.tower)


def test_what_trains_is_read_from_names() -> None:
    decoder = "base_model.model.model.layers.{}.self_attn.vision_expert_dense.lora_A.default.weight"
    assert trained_extent([decoder.format(3), decoder.format(12)], 32) == (3, "")
    assert trained_extent([decoder.format(3), "m.vision.linear_proj.gate_proj.lora_A.weight"], 32) == (0, "glu")
    assert trained_extent(["m.vision.transformer.layers.4.mlp.fc1.lora_A.weight"], 32) == (0, "tower")


def test_the_full_sizes_give_the_published_estimates() -> None:
    flops = forward_flops(ModelSizes(), Work(tokens=2707, pairs=2707 * 2708 // 2, labels=200, images=1, rows=1))
    decoder = flops.layers * flops.decoder_layer
    # 117, 40, 0.85 TFLOP: rounded figures of an independent estimate (the 200 labels' head is 0.2)
    assert flops.tower / 1e12 == pytest.approx(117, rel=0.01)
    assert decoder / 1e12 == pytest.approx(40, rel=0.01)
    assert flops.glu_adapter / 1e12 == pytest.approx(0.85, rel=0.01)
