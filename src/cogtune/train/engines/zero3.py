"""DeepSpeed ZeRO stage 3: frozen weights are sharded too, unit by unit while the model loads.

``deepspeed.zero.Init(module=...)`` partitions a unit as soon as its weights are loaded, so no rank ever holds the whole
model. DeepSpeed all-gathers a layer's weights before it runs and frees them after it; `zero3_units` chooses the units.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from cogtune.configuration.run_config import RunConfig
from cogtune.distributed.group import Group
from cogtune.distributed.shards import is_partitioned, own_shard, partitioned_numel
from cogtune.language import tr
from cogtune.model.vision import VisionModel
from cogtune.train.engines.base import MASTER, fresh_state
from cogtune.train.engines.zero import ZeroEngine, fill_in
from cogtune.train.engines.zero3_units import chooses_leaves, fetch_settings, hold_back, leaf_units, persistent_values


class Zero3Engine(ZeroEngine):
    """Masters, moments and frozen weights are sharded; adapters compute with copies in the model's dtype."""

    name = "zero3"

    def __init__(self, group: Group, config: RunConfig) -> None:
        super().__init__(group, config)
        self.placement = self
        self._dtype: torch.dtype | None = None

    def device_for(self, name: str) -> torch.device:
        """Return the device on which a loader puts a tensor before `finish` shards its unit."""
        return self.device

    def finish(self, unit_name: str, module: nn.Module) -> None:
        """Partition a unit whose weights are complete."""
        import deepspeed

        if self._dtype is None:
            self._dtype = next(value.dtype for value in module.parameters() if value.is_floating_point())
            self._shared_settings = self._settings(self._dtype)
            deepspeed.init_distributed(dist_init_required=False)
        module.requires_grad_(False)
        deepspeed.zero.Init(module=module, config_dict_or_path=self._shared_settings, dtype=self._dtype)

    def _wrap(self, model: nn.Module) -> nn.Module:
        import deepspeed

        assert self._dtype is not None, "the model was loaded without this engine's placement"
        self._refuse_trained(name for name, value in self.parameters.items() if is_partitioned(value))
        for unit in model.modules():
            if isinstance(unit, VisionModel):
                unit.sharded = True
        for name, value in model.named_parameters():
            if "lora_" in name and not value.requires_grad:  # keep float32 values for the adapter file
                self.unchanged[name] = value.data.clone().cpu()
            if not is_partitioned(value):  # DeepSpeed skips its own cast if any parameter is partitioned already
                value.data = value.data.to(self._dtype)
        self._settle_units(model)
        self._deepspeed, *_ = deepspeed.initialize(
            model=model, optimizer=self.optimizer, config=self._shared_settings, dist_init_required=False
        )
        stage = self._deepspeed.zero_optimization_stage()
        assert stage == 3, f"asked for ZeRO stage 3, but DeepSpeed runs stage {stage}"
        frozen = [value for value in model.parameters() if not value.requires_grad]
        self._held = (
            sum(own_shard(value).numel() for value in frozen),
            sum(partitioned_numel(value) for value in frozen),
        )
        module: nn.Module = self._deepspeed
        return module

    def _settle_units(self, model: nn.Module) -> None:
        """Set what is all-gathered in one piece, and when. Keys of the user's DeepSpeed file take precedence."""
        from deepspeed.utils import set_z3_leaf_module

        zero = self._shared_settings["zero_optimization"]
        leaves = [] if chooses_leaves(zero) else leaf_units(model)
        self._leaves = len(leaves)
        for leaf in leaves:
            set_z3_leaf_module(leaf, True)
        if leaves:
            fill_in(zero, fetch_settings(model, leaves, persistent_values(zero)))
            hold_back(leaves, self.device)
        fill_in(zero, self._bucket())

    def describe(self) -> str:
        own, whole = self._held
        where = tr(", on the CPU") if self.config.parallel.offload == "weights" else ""
        units = tr(", {leaves} layers are gathered as a whole", leaves=self._leaves) if self._leaves else ""
        return tr(
            "zero3: rank {rank} holds {own:,} of {whole:,} frozen values{where}{units}",
            rank=self.group.rank,
            own=own,
            whole=whole,
            where=where,
            units=units,
        )

    def load_state(self, tensors: dict[str, torch.Tensor], counters: dict[str, Any]) -> None:
        import deepspeed
        from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

        kinds = self.check_names(tensors)
        # The optimiser creates its state lazily in its first step, but a resumed run needs it before. DeepSpeed has no
        # public call that returns the flat shards the state belongs to.
        for shard in self._deepspeed.optimizer.fp32_partitioned_groups_flat:
            if kinds:
                self.optimizer.state[shard] = fresh_state(shard, kinds, counters["optimizer_steps"])
        for name, parameter in self.parameters.items():
            value = tensors[f"{MASTER}/{name}"].to(self.device)
            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                if self.group.is_main:
                    parameter.data.copy_(value)
            safe_set_local_fp32_param(parameter, self._part(value, parameter))
            for kind in kinds:
                moment = tensors[f"{kind}/{name}"].to(self.device)
                safe_set_local_optimizer_state(parameter, self._part(moment, parameter), kind)

    def _part(self, value: torch.Tensor, parameter: nn.Parameter) -> torch.Tensor:
        """Return this rank's shard of a whole tensor, padded with zeros at the end as DeepSpeed does."""
        size = own_shard(parameter).numel()
        flat = torch.zeros(size * self.group.size, dtype=value.dtype, device=value.device)
        flat[: value.numel()] = value.flatten()
        return flat[size * self.group.rank : size * (self.group.rank + 1)]
