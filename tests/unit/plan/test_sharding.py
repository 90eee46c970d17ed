"""What the planner says is gathered, held to `fully_shard` itself on a group that sends nothing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.testing._internal.distributed.fake_pg import FakeStore

from cogtune.adapters.attach import attach
from cogtune.bench.rows import preset, synthetic_batches
from cogtune.checkpoint.random import random_weights, tiny_config
from cogtune.configuration.load import load_config
from cogtune.configuration.quantization import QuantSection
from cogtune.distributed.group import Group
from cogtune.plan import memory, sharding
from cogtune.plan.memory import predict, weights
from cogtune.plan.setting import LoraShape, Setting, adapted_names
from cogtune.plan.sharding import Gathering
from cogtune.plan.sizes import ModelSizes
from cogtune.train.batches import to_device
from cogtune.train.engines.fsdp2 import Fsdp2Engine
from cogtune.train.optim import build_optimizer

KEYS = {
    "model.path": "random", "data.path": "none", "train.output": "none", "model.dtype": "bfloat16",
    "parallel.engine": "fsdp2", "lora.targets": "vision_expert_query_key_value",
}  # fmt: skip


@pytest.fixture
def two_ranks() -> Iterator[Group]:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield Group(0, 2, torch.device("cpu"), True)
    dist.destroy_process_group()


def _whole_and_buffers(model: Any) -> tuple[int, int]:
    """Bytes that torch's units have gathered, and that its collectives' outputs hold."""
    whole, buffers = 0, {}
    for module in model.modules():
        state = module._get_fsdp_state() if isinstance(module, FSDPModule) else None
        for group in [] if state is None or state._fsdp_param_group is None else [state._fsdp_param_group]:
            for parameter in group.fsdp_params:
                whole += sum(out.untyped_storage().nbytes() for out in parameter.all_gather_outputs)
            results = [group._all_gather_result]
            last = group.comm_ctx.all_gather_state
            results += [] if last is None else [last.all_gather_result]
            for result in results:
                if result is not None:
                    storage = result.all_gather_output.untyped_storage()
                    buffers[storage._cdata] = storage.nbytes()
    return whole, sum(buffers.values())


@pytest.mark.parametrize("kept", [0, 2])
def test_fsdp2_gathers_what_the_planner_says(two_ranks: Group, kept: int, tmp_path: Path) -> None:
    config = load_config(None, KEYS | {"parallel.keep_gathered": str(kept)})
    engine, device, dtype = Fsdp2Engine(two_ranks, config), two_ranks.device, torch.bfloat16
    sizes = tiny_config(num_hidden_layers=5)
    base = random_weights(sizes, dtype, device, tower=False, placement=engine.placement)
    model = attach(base, config.lora, building=engine.attaching(base))
    engine.wrap(model, build_optimizer([p for p in model.parameters() if p.requires_grad], config.train))
    sizes = ModelSizes.from_config(base.config.to_dict())
    adapter = LoraShape(adapted_names(sizes, config.lora.targets), config.lora.rank)
    setting = Setting(sizes=sizes, adapter=adapter, tower="cached", engine="fsdp2", ranks=2, keep_gathered=kept)
    gathering, seen = Gathering(setting), dict[str, tuple[int, int]]()

    def look(moment: str) -> None:
        seen[moment] = _whole_and_buffers(engine.module)

    for index, layer in enumerate(base.model.layers):
        # a layer's MLP runs in its middle, forward and backward
        layer.mlp.register_forward_hook(lambda *_, index=index: look(f"forward {index}"))
        layer.mlp.register_full_backward_pre_hook(lambda *_, index=index: look(f"backward {index}"))
    options = {"batch_size": 1, "count": 1, "cached": True, "dtype": dtype, "device": device}
    (batch,) = synthetic_batches(preset("s400"), base.config, tmp_path, **options)
    inputs = to_device(batch, device)
    engine.module.train()
    group = engine.module._get_fsdp_state()._fsdp_param_group
    root = sum(parameter._orig_size.numel() for parameter in group.fsdp_params) * setting.width
    for _ in range(2):
        engine.backward(engine.module(**inputs, num_items_in_batch=200).loss)
    for index in range(len(base.model.layers)):
        for moment, said in (("forward", gathering.forward(index)), ("backward", gathering.backward(index))):
            whole, buffers = seen[f"{moment} {index}"]
            # with the head go a norm and the ends of a picture, and here the tower's convolution; a layer has norms
            assert said.whole == pytest.approx(whole - root + gathering.head, rel=0.01), (moment, index)
            if (moment, index) != ("backward", 0):  # behind the first layer torch fetches what is no layer
                assert said.buffers == pytest.approx(buffers, rel=0.01), (moment, index)


def test_nothing_is_gathered_where_nothing_is_sharded() -> None:
    for whole in (Setting(), Setting(engine="ddp", ranks=2), Setting(engine="ddp", ranks=2, tensor=2)):
        gathering = Gathering(whole)
        moments = [gathering.start(), gathering.tower(), gathering.forward(3), gathering.loss(), gathering.backward(3)]
        assert set(moments) == {sharding.Gathered()}
        assert gathering.pool() == 0


def test_an_nf4_weights_scales_are_whole_on_every_rank() -> None:
    sharded = Setting(engine="fsdp2", ranks=2, tower="cached", quant=QuantSection(experts="nf4"))
    experts = [x for x in sharded.sizes.linears if x.part == "experts"]
    scales = sum(memory.scale_bytes(linear, "nf4") for linear in experts)
    codes = sharding.unit_bytes(experts, sharded.quant, sharded.dtype)
    assert weights(sharded)["experts"] == pytest.approx(scales + codes / 2, rel=1e-6)


def test_the_most_that_is_gathered_counts_where_activations_are_few() -> None:
    """At the start of a step whose layers are recomputed the embedding and the head lie there twice, as measured."""
    small = Setting(engine="fsdp2", ranks=2, tower="cached", quant=QuantSection(experts="nf4")).with_recomputed(32)
    parts, gathering = predict(small).phase("train").parts, Gathering(small)
    assert parts["communication"] >= 2 * (gathering.head + gathering.embedding)
    assert parts["activations"] == 0
