"""Tensor parallelism: neighbouring ranks hold one model together (``model.tensor_parallel``), and data parallelism over
such groups as with DDP.

Each rank trains its shard of the adapter. Replicated adapter weights (LoRA's A before a layer sharded by rows, its B
after one sharded by columns) receive a partial gradient on each rank of a group; these are all-reduced once per step.
Checkpoints hold whole tensors, as those of every engine do.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from cogtune.adapters.tensor_parallel import AdapterPart, check_extra, split_adapter
from cogtune.configuration.run_config import RunConfig
from cogtune.distributed.buckets import sum_in_buckets
from cogtune.distributed.group import Group, TensorGroup
from cogtune.distributed.shards import whole_numel
from cogtune.language import tr
from cogtune.model.tensor_parallel import SplitModel
from cogtune.train.engines.base import StepResult
from cogtune.train.engines.ddp import DdpEngine
from cogtune.train.engines.single import SingleEngine


class TensorEngine(DdpEngine):
    """``parallel.tensor`` ranks per model; with more ranks, DDP over the same shards of all models."""

    name = "tensor"

    def __init__(self, group: Group, config: RunConfig) -> None:
        super().__init__(group, config)
        check_extra(config.lora.extra)
        self._tensor, self._rows = make_groups(group)
        self._split = SplitModel(self._tensor, self.device)
        self._parts: dict[str, AdapterPart] = {}
        self.placement = self._split

    def attaching(self, model: nn.Module) -> AbstractContextManager[Any]:
        return self._split.whole_sizes(model)

    def _wrap(self, model: nn.Module) -> nn.Module:
        still = [(name, value) for name, value in model.named_parameters() if "lora_" in name]
        self.unchanged = {name: value.detach().cpu() for name, value in still if name not in self.parameters}
        self._parts = split_adapter(model, self._split)
        self._holds = _require_split(model, self._split)
        if self.group.size > 1:
            return super()._wrap(model)
        return SingleEngine._wrap(self, model)

    def _ddp_group(self) -> Any:
        return self._rows

    def describe(self) -> str:
        own, whole = self._holds
        return tr(
            "tensor: rank {process} holds {own:,} of {whole:,} frozen values; {copies} ranks hold a"
            " model, {size} models",
            process=self.group.process,
            own=own,
            whole=whole,
            copies=self.group.copies,
            size=self.group.size,
        )

    def accumulating(self, last: bool) -> AbstractContextManager[Any]:
        return super().accumulating(last) if self.group.size > 1 else nullcontext()

    def step(self) -> StepResult:
        shares: list[torch.Tensor] = []
        same: list[torch.Tensor] = []
        for name, value in self.parameters.items():
            part = self._parts.get(name)
            if value.grad is not None and (part is None or part.cut is None):
                (shares if part is not None and part.shares else same).append(value.grad)
        sum_in_buckets(shares, self._tensor.process_group)
        # Replicated gradients are equal already unless a kernel is nondeterministic; average them, so that ranks cannot
        # drift apart.
        sum_in_buckets(same, self._tensor.process_group, factor=1 / self._tensor.size)
        if self.scaled:
            self._share_overflow()
        return super().step()

    def _share_overflow(self) -> None:
        """Skip a step on all ranks if it overflows on one: the gradient scaler checks its own rank's gradients only."""
        gradients = [value.grad for value in self.parameters.values() if value.grad is not None]
        finite = all(bool(torch.isfinite(gradient).all()) for gradient in gradients)
        if self.group.any(not finite) and gradients:
            gradients[0].fill_(math.inf)

    def _clip(self) -> torch.Tensor:
        own: list[torch.Tensor] = []
        common: list[torch.Tensor] = []
        for name, value in self.parameters.items():
            if value.grad is not None:
                part = self._parts.get(name)
                (own if part is not None and part.cut is not None else common).append(value.grad)
        squares = [nn.utils.get_total_norm(gradients).square().reshape(1) for gradients in (own, common)]
        total = (self._tensor.sum(squares[0].to(self.device)) + squares[1].to(self.device)).sqrt().squeeze(0)
        nn.utils.clip_grads_with_norm_(self.parameters.values(), self.config.train.max_grad_norm, total)
        return total

    def state(self) -> dict[str, torch.Tensor]:
        tensors = super().state()
        for key, value in tensors.items():
            part = self._parts.get(key.partition("/")[2])
            if part is not None and part.cut is not None:
                tensors[key] = part.cut.join(self._tensor.gather(value)).contiguous()
        return tensors

    def load_state(self, tensors: dict[str, torch.Tensor], counters: dict[str, Any]) -> None:
        own = {}
        for key, value in tensors.items():
            part = self._parts.get(key.partition("/")[2])
            cut = None if part is None else part.cut
            own[key] = value if cut is None else cut.take(value, self._tensor.rank, self._tensor.size)
        super().load_state(own, counters)


def make_groups(group: Group) -> tuple[TensorGroup, Any]:
    """Return the ranks that hold this rank's model, and those that hold the same shard of other models. Collective."""
    tensor = rows = None
    for model in range(group.size):
        made = dist.new_group([model * group.copies + part for part in range(group.copies)])
        tensor = made if model == group.rank else tensor
    for part in range(group.copies):
        made = dist.new_group([model * group.copies + part for model in range(group.size)])
        rows = made if part == group.part else rows
    return TensorGroup(group.part, group.copies, tensor), rows


def _require_split(model: nn.Module, split: SplitModel) -> tuple[int, int]:
    """Return the number of frozen values on this rank and in total, as counted; raises if the model is not sharded."""
    own = whole = 0
    size = split.group.size
    for name, value in model.named_parameters():
        if "lora_" not in name:
            own += value.numel()
            whole += whole_numel(value)
    if not split.cuts or own > (0.9 if size > 1 else 1.0) * whole:
        raise AssertionError(f"tensor: rank {split.group.rank} of {size} holds {own:,} of {whole:,} values")
    return own, whole
