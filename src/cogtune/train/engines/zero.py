"""DeepSpeed ZeRO stages 1 and 2: optimiser state, and in stage 2 gradients too, sharded over ranks.

Uses public DeepSpeed calls and torch's own optimiser, so nothing has to be compiled for a GPU. Masters and moments are
read and written through the full-tensor calls, by parameter name.
"""

from __future__ import annotations

import math
import warnings
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from cogtune.configuration.run_config import RunConfig
from cogtune.distributed.buffers import ZERO_BUCKET
from cogtune.distributed.group import Group
from cogtune.errors import SetupError
from cogtune.language import tr
from cogtune.train.engines.async_scalar import AsyncScalar
from cogtune.train.engines.base import MASTER, Engine, StepResult, fresh_state


class ZeroEngine(Engine):
    """DeepSpeed keeps float32 masters in addition to the model's weights, for every compute dtype."""

    name = "zero2"
    fuses_optimizer = False  # DeepSpeed replaces the parameters by flat shards, on the CPU if asked to

    def __init__(self, group: Group, config: RunConfig) -> None:
        super().__init__(group, config)
        # torch 2.13 renames collectives that DeepSpeed calls in every step; 2.11 knows no other names
        warnings.filterwarnings("ignore", ".*is deprecated. Please use `torch.distributed.*_single`", FutureWarning)
        if config.parallel.engine == "zero1":
            self.name = "zero1"
        try:
            import deepspeed  # noqa: F401  (fails here, before any weight is read)
        except ImportError as error:
            raise SetupError(
                tr("parallel.engine zero needs DeepSpeed, which is not installed"),
                hint="pip install 'cogtune[deepspeed]'",
            ) from error

    @property
    def scaled(self) -> bool:
        return bool(self._deepspeed.fp16_enabled())

    def _wrap(self, model: nn.Module) -> nn.Module:
        import deepspeed

        settings = self._settings(next(value.dtype for value in model.parameters() if not value.requires_grad))
        fill_in(settings["zero_optimization"], self._bucket())
        # DeepSpeed casts every parameter to the compute dtype. Trained ones have masters. Adapters that are not trained
        # (they cannot influence the loss) are restored, so that their file is float32 with every engine.
        unrounded = {
            name: value.data
            for name, value in model.named_parameters()
            if value.dtype == torch.float32 and not value.requires_grad
        }
        self._deepspeed, *_ = deepspeed.initialize(
            model=model, optimizer=self.optimizer, config=settings, dist_init_required=False
        )
        for name, value in model.named_parameters():
            if name in unrounded:
                value.data = unrounded[name]
        stage = self._deepspeed.zero_optimization_stage()
        assert stage == self._stage, f"asked for ZeRO stage {self._stage}, but DeepSpeed runs stage {stage}"
        shards = sum(shard.numel() for group in self.optimizer.param_groups for shard in group["params"])
        self._held = shards, sum(value.numel() for value in self.parameters.values())
        module: nn.Module = self._deepspeed
        return module

    def describe(self) -> str:
        own, whole = self._held
        return f"zero{self._stage}: rank {self.group.rank} holds {own:,} of {whole:,} masters"

    def _settings(self, dtype: torch.dtype) -> dict[str, Any]:
        from cogtune.configuration.deepspeed import deepspeed_settings

        settings = deepspeed_settings(self.config, str(dtype).removeprefix("torch."), self.group.size)
        stage = settings["zero_optimization"]["stage"]
        self._stage = stage
        offload = self.config.parallel.offload
        for kind, block in (("optimizer", "offload_optimizer"), ("weights", "offload_param")):
            if offload == kind:
                settings["zero_optimization"].setdefault(block, {"device": "cpu", "pin_memory": True})
        # with offload use torch's AdamW on the CPU; DeepSpeed's CPU optimiser would have to be compiled
        settings.setdefault("zero_force_ds_cpu_optimizer", False)
        if dtype == torch.bfloat16:  # otherwise a gradient of NaN would reach the weights
            settings["bf16"].setdefault("check_grad_overflow", True)
        return settings

    def _bucket(self) -> dict[str, Any]:
        """Limit DeepSpeed's gradient bucket, which it allocates up front: its default of 500 million values takes a
        gigabyte."""
        return {
            "reduce_bucket_size": max(1, min(ZERO_BUCKET, sum(value.numel() for value in self.parameters.values())))
        }

    def accumulating(self, last: bool) -> AbstractContextManager[Any]:
        self._deepspeed.set_gradient_accumulation_boundary(last)
        return nullcontext()

    def backward(self, loss: torch.Tensor) -> None:
        # the loop's loss is already normalised for the whole step; DeepSpeed must not divide it by accumulation steps
        self._deepspeed.backward(loss, scale_wrt_gas=False)

    def step(self) -> StepResult:
        self._deepspeed.step()
        applied = bool(self._deepspeed.was_step_applied())
        norm = self._deepspeed.get_global_grad_norm()
        known = torch.tensor(math.nan if norm is None else float(norm), dtype=torch.float64)
        return StepResult(AsyncScalar(known), applied)

    def state(self) -> dict[str, torch.Tensor]:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        tensors = {}
        kinds = self._moment_kinds()
        for name, parameter in self.parameters.items():
            tensors[f"{MASTER}/{name}"] = safe_get_full_fp32_param(parameter)
            for kind in kinds:
                tensors[f"{kind}/{name}"] = safe_get_full_optimizer_state(parameter, kind)
        return {key: value.detach().cpu().contiguous() for key, value in tensors.items()}

    def _moment_kinds(self) -> list[str]:
        return sorted(
            {
                kind
                for shard, state in self.optimizer.state.items()
                for kind, value in state.items()
                if torch.is_tensor(value) and value.shape == shard.shape
            }
        )

    def load_state(self, tensors: dict[str, torch.Tensor], counters: dict[str, Any]) -> None:
        from deepspeed.utils import (
            lazy_init_hp_params_optimizer_state,
            safe_set_full_fp32_param,
            safe_set_full_optimizer_state,
        )

        kinds = self.check_names(tensors)
        trained = list(self.parameters.values())
        for group in self.optimizer.param_groups:
            for shard in group["params"]:  # DeepSpeed has replaced the parameters by its flat shards
                if kinds:
                    self.optimizer.state[shard] = fresh_state(shard, kinds, counters["optimizer_steps"])
                    lazy_init_hp_params_optimizer_state(trained, shard, self.optimizer.state)
        for name, parameter in self.parameters.items():
            value = tensors[f"{MASTER}/{name}"].to(self.device)
            safe_set_full_fp32_param(parameter, value)
            parameter.data.copy_(value)
            for kind in kinds:
                safe_set_full_optimizer_state(parameter, tensors[f"{kind}/{name}"].to(self.device), kind)


def fill_in(settings: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Add settings that the user's ``zero_optimization`` block leaves open. DeepSpeed accepts some keys under two
    names."""
    for key, value in wanted.items():
        if key not in settings and key.removeprefix("stage3_") not in settings:
            settings[key] = value
