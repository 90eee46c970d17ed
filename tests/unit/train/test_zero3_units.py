"""What ZeRO-3 fetches as wholes; that its results stay those of one device is in tests/distributed/test_engines.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from cogtune.adapters.attach import attach
from cogtune.checkpoint.random import random_model, tiny_config
from cogtune.configuration.run_config import LoraSection
from cogtune.train.engines.zero import fill_in
from cogtune.train.engines.zero3_units import chooses_leaves, fetch_settings, hold_back, leaf_units, persistent_values


def names(targets: list[str]) -> set[str]:
    model = attach(random_model(tiny_config(num_hidden_layers=3), 0), LoraSection(targets=targets))
    leaves = leaf_units(model)
    return {
        name.rpartition("model.model.")[2].removeprefix("model.")
        for name, module in model.named_modules()
        if any(module is leaf for leaf in leaves)
    }


def test_the_first_unit_that_trains_is_no_leaf() -> None:
    """Its input needs no gradient, and DeepSpeed reduces a leaf's gradients when its input's is there."""
    frozen_tower = {"vision.patch_embedding", "vision.linear_proj"} | {f"vision.transformer.layers.{n}" for n in (0, 1)}
    assert names(["vision_expert_query_key_value"]) == frozen_tower | {"layers.1", "layers.2"}
    assert names(["vision-tower"]) == {
        "vision.patch_embedding",
        "vision.linear_proj",
        "vision.transformer.layers.1",
    } | {f"layers.{n}" for n in (0, 1, 2)}


def test_one_layer_is_fetched_ahead() -> None:
    model = random_model(tiny_config(), 0)
    layers = list(model.model.layers)
    layer = sum(value.numel() for value in layers[0].parameters() if value.numel() > 1000)
    found = fetch_settings(model, layers, whole=1000)
    assert found["stage3_prefetch_bucket_size"] == layer
    assert found["stage3_max_live_parameters"] == 2 * layer + model.lm_head.weight.numel()


def test_a_file_wins_by_either_name_of_a_key() -> None:
    block: dict[str, Any] = {
        "prefetch_bucket_size": 7,
        "stage3_max_reuse_distance": 9,
        "param_persistence_threshold": 5,
    }
    fill_in(block, {"stage3_prefetch_bucket_size": 1, "stage3_max_reuse_distance": 1, "reduce_bucket_size": 3})
    assert block == {
        "prefetch_bucket_size": 7,
        "stage3_max_reuse_distance": 9,
        "param_persistence_threshold": 5,
        "reduce_bucket_size": 3,
    }
    assert persistent_values(block) == 5
    assert not chooses_leaves(block)
    assert chooses_leaves({"leaf_module": {"classes": []}})


def test_the_host_waits_for_the_layer_before_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the forward pass and in the backward pass; with an event that only counts, as there is no device."""
    said: list[str] = []

    class Event:
        made = 0

        def __init__(self) -> None:
            self.number, Event.made = Event.made, Event.made + 1

        def record(self) -> None:
            said.append(f"queued {self.number}")

        def synchronize(self) -> None:
            said.append(f"waited for {self.number}")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    layers = nn.Sequential(*[nn.Linear(2, 2) for _ in range(3)])
    hold_back(layers, torch.device("cuda"))
    layers(torch.ones(1, 2, requires_grad=True)).sum().backward()
    assert [line for line in said if "queued" in line] == [f"queued {number}" for number in range(6)]
    assert said[2:4] == ["queued 2", "waited for 0"]
    assert said[-1] == "waited for 3"
