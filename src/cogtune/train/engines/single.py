"""Training on one device; also the base class of DDP, which differs in how gradients are reduced."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from cogtune.train.engines.async_scalar import AsyncScalar
from cogtune.train.engines.base import MASTER, Engine, StepResult
from cogtune.train.optim import moments, restore_moments, skips_on_device, step_if_finite


class SingleEngine(Engine):
    """The master weights are the model's own trainable parameters, in float32."""

    name = "single"

    def _wrap(self, model: nn.Module) -> nn.Module:
        computes_in_half = any(value.dtype == torch.float16 for value in model.parameters())
        self._scaler = torch.amp.GradScaler(self.device.type, enabled=computes_in_half)
        return model

    @property
    def scaled(self) -> bool:
        return self._scaler.is_enabled()

    def backward(self, loss: torch.Tensor) -> None:
        self._scaler.scale(loss).backward()

    def step(self) -> StepResult:
        self._scaler.unscale_(self.optimizer)
        length = self._clip()
        norm = AsyncScalar(length)
        if not self.scaled and skips_on_device(self.optimizer):
            step_if_finite(self.optimizer, length)
            result = StepResult(norm)
        else:
            result = StepResult(norm, math.isfinite(norm.value()))
            if result.applied or self.scaled:  # with scaling, the scaler itself skips the step and lowers the scale
                self._scaler.step(self.optimizer)
                self._scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return result

    def _clip(self) -> torch.Tensor:
        """Clip gradients to a norm of ``train.max_grad_norm`` and return their norm before, on the device without
        blocking."""
        return nn.utils.clip_grad_norm_(self.parameters.values(), self.config.train.max_grad_norm)

    def counters(self) -> dict[str, Any]:
        return {**super().counters(), **({"scaler": self._scaler.state_dict()} if self.scaled else {})}

    def state(self) -> dict[str, torch.Tensor]:
        tensors = {}
        for name, parameter in self.parameters.items():
            tensors[f"{MASTER}/{name}"] = parameter.detach().float().cpu()
            tensors |= {f"{kind}/{name}": value for kind, value in moments(self.optimizer, parameter).items()}
        return {key: value.contiguous() for key, value in tensors.items()}

    def load_state(self, tensors: dict[str, torch.Tensor], counters: dict[str, Any]) -> None:
        kinds = self.check_names(tensors)
        for name, parameter in self.parameters.items():
            parameter.data.copy_(tensors[f"{MASTER}/{name}"])
            found = {kind: tensors[key] for kind in kinds if (key := f"{kind}/{name}") in tensors}
            restore_moments(self.optimizer, parameter, found, counters["optimizer_steps"])
        if self.scaled and "scaler" in counters:
            self._scaler.load_state_dict(counters["scaler"])
