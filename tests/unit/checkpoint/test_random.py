"""Random weights come as a checkpoint's do: quantised layer by layer, without a tower where none is wanted."""

from __future__ import annotations

import pytest
import torch

from cogtune.checkpoint.random import published_config, random_weights, tiny_config
from cogtune.configuration.quantization import QuantSection
from cogtune.distributed.group import TensorGroup
from cogtune.model.tensor_parallel import SplitModel

CPU = torch.device("cpu")


def test_the_same_seed_gives_the_same_finite_model() -> None:
    one, two = (random_weights(tiny_config(), torch.float32, CPU, seed=3) for _ in range(2))
    states = one.state_dict(), two.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert all(bool(torch.isfinite(value).all()) for value in states[0].values())
    ids = torch.arange(8)[None]
    assert bool(torch.isfinite(one(ids).logits).all())


def test_without_a_tower_and_quantised() -> None:
    pytest.importorskip("bitsandbytes")
    quantization = QuantSection(experts="nf4", embedding="host")
    model = random_weights(tiny_config(), torch.float32, CPU, tower=False, quantization=quantization)
    assert not model.model.vision.has_tower
    layer = model.model.layers[0]
    assert type(layer.mlp.vision_mlp.up_proj).__name__ == "FourBitLinear"
    assert type(layer.self_attn.language_expert_dense).__name__ == "FourBitLinear"
    assert type(model.lm_head) is torch.nn.Linear
    assert type(model.model.embed_tokens).__name__ == "HostEmbedding"


def test_a_rank_of_a_split_model_holds_its_part_alone() -> None:
    """A slice of rows is a view: the whole tensor would stay behind it."""
    whole = random_weights(tiny_config(), torch.float32, CPU).state_dict()
    part = random_weights(tiny_config(), torch.float32, CPU, placement=SplitModel(TensorGroup(1, 2), CPU)).state_dict()
    assert part.keys() == whole.keys()
    for name, value in part.items():
        assert value.untyped_storage().nbytes() == value.nbytes, name
    name = "model.layers.0.mlp.vision_mlp.up_proj.weight"
    assert torch.equal(part[name], whole[name].chunk(2)[1])


def test_the_full_size_is_the_published_one() -> None:
    assert published_config().num_hidden_layers == 32
    assert published_config().num_image_tokens == 2306
