"""FSDP2: frozen weights sharded over ranks by torch's ``fully_shard``, one unit at a time; adapters replicated.

A unit (a decoder layer, a tower layer, the embedding, ...) is sharded as soon as its weights are loaded, so no rank
ever holds the whole model. A unit's shards are all-gathered before it runs and freed after it. Adapters stay outside
FSDP: they are small, float32 and the same on every rank. Their gradients are all-reduced once per step, so optimiser,
checkpoint and loss are those of a single device.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor

from cogtune.configuration.run_config import RunConfig
from cogtune.distributed.buckets import sum_in_buckets
from cogtune.distributed.group import Group
from cogtune.language import tr
from cogtune.model.vision import VisionModel
from cogtune.train.engines.base import StepResult
from cogtune.train.engines.single import SingleEngine

_ROOT = ("lm_head",)
"""Units that belong to the root: the loss may read the head's weight directly, and needs it at the end of the forward
pass and again at the start of the backward pass."""


class Fsdp2Engine(SingleEngine):
    """Gradients are summed over ranks instead of averaged, so the loss is not multiplied by the number of ranks."""

    name = "fsdp2"
    symbolic_sizes = False  # in a sharded module even the number of heads would become symbolic (decision 15)

    def __init__(self, group: Group, config: RunConfig) -> None:
        super().__init__(group, config)
        self._mesh = init_device_mesh(group.device.type, (group.size,), mesh_dim_names=("shard",))
        self.placement = self  # the loader calls `device_for` and `finish`
        self._kept: list[FSDPModule] = []
        if config.parallel.keep_gathered != "auto":
            self.gathered_layers = int(config.parallel.keep_gathered)

    @property
    def loss_factor(self) -> float:
        return 1.0

    def device_for(self, name: str) -> torch.device:
        """Return the device on which a loader puts a tensor before `finish` shards its unit."""
        return self.device

    def finish(self, unit_name: str, module: nn.Module) -> None:
        """Shard a unit whose weights are complete (and quantised)."""
        if unit_name.rpartition(".")[2] not in _ROOT:
            module.requires_grad_(False)
            self._shard(module, set(), reshard_after_forward=True)

    def _shard(self, module: nn.Module, outside: set[nn.Parameter], *, reshard_after_forward: bool) -> None:
        """Apply ``fully_shard`` without casts of inputs and outputs: a rounded loss would differ from that of a single
        device."""
        before = [(layer, _weight(layer)) for layer in module.modules() if _weight(layer) is not None]
        fully_shard(
            module,
            mesh=self._mesh,
            reshard_after_forward=reshard_after_forward,
            mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.float32, output_dtype=None, cast_forward_inputs=False),
            offload_policy=self._offload_policy(),
            ignored_params=outside,
        )
        for layer, weight in before:  # fully_shard has replaced the parameters
            _copy_facts(weight, layer.weight)

    def _offload_policy(self) -> OffloadPolicy:
        if self.config.parallel.offload != "weights":
            return OffloadPolicy()
        return CPUOffloadPolicy(pin_memory=self.device.type == "cuda")

    @contextmanager
    def attaching(self, model: nn.Module) -> Iterator[None]:
        """Show peft the whole shapes of sharded weights while it attaches adapters.

        peft takes a sharded weight's local shape, which is right for tensor parallelism but not here. Each weight is
        replaced by an expanded stand-in of the whole shape that stores a single value.
        """
        sharded = [(layer, _weight(layer)) for layer in model.modules() if isinstance(_weight(layer), DTensor)]
        for layer, weight in sharded:
            value = torch.zeros(1, dtype=weight.dtype, device=self.device).expand(weight.shape)
            layer.weight = nn.Parameter(value, requires_grad=False)
            _copy_facts(weight, layer.weight)
        try:
            yield
        finally:
            for layer, weight in sharded:
                layer.weight = weight

    def _wrap(self, model: nn.Module) -> nn.Module:
        module = super()._wrap(model)
        self._refuse_trained(name for name, value in self.parameters.items() if isinstance(value, DTensor))
        outside = {value for name, value in model.named_parameters() if value.requires_grad or "lora_" in name}
        self._shard(module, outside, reshard_after_forward=False)
        named = [(n, unit) for n, unit in module.named_modules() if isinstance(unit, FSDPModule) and _is_layer(n)]
        layers = [unit for _, unit in sorted(named, key=lambda item: ".vision." not in item[0])]  # the tower runs first
        for unit in module.modules():
            if isinstance(unit, VisionModel):
                unit.sharded = True
        for before, after in pairwise(layers):  # all-gather the next layer while this one computes
            before.set_modules_to_forward_prefetch([after])
        decoder = [unit for name, unit in named if ".vision." not in name]
        self._kept = decoder[: self.gathered_layers]
        for kept in self._kept:  # frozen weights do not change, so a gathered layer stays valid for the whole run
            kept.set_reshard_after_forward(False, recurse=False)
            kept.set_reshard_after_backward(False, recurse=False)
        self._frozen = _require_sharded(module, outside, self.group.size)
        return module

    def describe(self) -> str:
        own, whole = self._frozen
        kept = tr(", {kept} layers stay gathered", kept=len(self._kept)) if self._kept else ""
        where = tr(", on the CPU") if self.config.parallel.offload == "weights" else ""
        return tr(
            "fsdp2: rank {rank} holds {own:,} of {whole:,} frozen values{where}{kept}",
            rank=self.group.rank,
            own=own,
            whole=whole,
            where=where,
            kept=kept,
        )

    def step(self) -> StepResult:
        sum_in_buckets(value.grad for value in self.parameters.values() if value.grad is not None)
        return super().step()


def _is_layer(name: str) -> bool:
    """Return whether ``name`` is that of a layer: a unit with a number."""
    return name.rpartition(".")[2].isdigit()


def _weight(layer: nn.Module) -> Any:
    return dict(layer.named_parameters(recurse=False)).get("weight")


def _copy_facts(weight: Any, other: Any) -> None:
    """Copy bitsandbytes' quantisation attributes from one parameter to another: peft reads them from the parameter."""
    for name in ("compress_statistics", "quant_type", "blocksize", "quant_storage"):
        if hasattr(weight, name) and not hasattr(other, name):
            setattr(other, name, getattr(weight, name))


def _require_sharded(model: nn.Module, outside: set[nn.Parameter], ranks: int) -> tuple[int, int]:
    """Return the number of frozen values on this rank and in total; raises if a weight is not sharded."""
    own = whole = 0
    for name, value in model.named_parameters():
        if value in outside:
            continue
        if not isinstance(value, DTensor):
            raise AssertionError(f"fsdp2 left {name} whole")
        rows = -(-value.shape[0] // ranks)
        local = value.to_local()
        if local.shape[0] > rows:
            raise AssertionError(f"fsdp2: {name} has {local.shape[0]} of {value.shape[0]} rows on one of {ranks} ranks")
        own, whole = own + local.numel(), whole + value.numel()
    return own, whole
