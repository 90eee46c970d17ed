"""FSDP2: frozen weights sharded over ranks by torch's ``fully_shard``, one unit at a time; adapters replicated.

A unit (a decoder layer, a tower layer, the embedding, ...) is sharded as soon as its weights are loaded, so no rank
ever holds the whole model. A unit's shards are all-gathered before it runs and freed after it. Adapters stay outside
FSDP: they are small, float32 and the same on every rank. Their gradients are all-reduced once per step, so optimiser,
checkpoint and loss are those of a single device.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
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
from cogtune.train.log import log

_SPARE = 0.8  # share of the memory left free by the first step that gathered layers may use
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
        self._keep_decided = config.parallel.keep_gathered != "auto"

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
        self._layers = layers
        if self.config.parallel.keep_gathered != "auto":
            self._keep(int(self.config.parallel.keep_gathered))
        self._frozen = _require_sharded(module, outside, self.group.size)
        return module

    def describe(self) -> str:
        own, whole = self._frozen
        kept = tr(", {kept} layers stay gathered during a step", kept=len(self._kept)) if self._kept else ""
        where = tr(", on the CPU") if self.config.parallel.offload == "weights" else ""
        return tr(
            "fsdp2: rank {rank} holds {own:,} of {whole:,} frozen values{where}{kept}",
            rank=self.group.rank,
            own=own,
            whole=whole,
            where=where,
            kept=kept,
        )

    def accumulating(self, last: bool) -> AbstractContextManager[Any]:
        for layer in self._kept:  # free kept layers only after the step's last micro-batch
            layer.set_reshard_after_backward(last, recurse=False)
        return nullcontext()

    def step(self) -> StepResult:
        sum_in_buckets(value.grad for value in self.parameters.values() if value.grad is not None)
        result = super().step()
        if not self._keep_decided:
            self._keep_decided = True
            self._keep(self._spare_layers())
        return result

    def _keep(self, count: int) -> None:
        """Keep the first ``count`` layers gathered from their first use in a step to their last."""
        self._kept = self._layers[:count]
        for layer in self._kept:
            layer.set_reshard_after_forward(False, recurse=False)

    def _spare_layers(self) -> int:
        """Return how many gathered layers fit into the memory that the first step left free, the minimum over all
        ranks."""
        if self.config.train.accumulation == 1 or self.device.type != "cuda" or not self._layers:
            return 0
        free = torch.cuda.mem_get_info(self.device)[0]
        free += torch.cuda.memory_reserved(self.device) - torch.cuda.max_memory_allocated(self.device)
        sizes = [sum(p.numel() * p.element_size() for p in _own(layer)) for layer in self._layers]
        count = min(self.group.gather(int(_SPARE * free // max(sizes))))
        count = max(0, min(count, len(self._layers)))
        log.info(
            tr("fsdp2: {count} of {layers} layers stay gathered during a step", count=count, layers=len(self._layers))
        )
        return count


def _is_layer(name: str) -> bool:
    """Return whether ``name`` is that of a layer: a unit with a number."""
    return name.rpartition(".")[2].isdigit()


def _own(module: Any) -> Iterator[DTensor]:
    return (value for value in module.parameters() if isinstance(value, DTensor))


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
