"""What the loop asks of an engine, and what all engines share.

An engine wraps the model, runs backward and steps, and hands out its state by parameter name so that a checkpoint does
not know which engine wrote it.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from cogtune.checkpoint.place import Placement
from cogtune.configuration.run_config import RunConfig
from cogtune.distributed.group import Group
from cogtune.errors import CheckpointError, ConfigError
from cogtune.train.engines.async_scalar import AsyncScalar

MASTER = "master"


@dataclass(frozen=True)
class StepResult:
    """``norm`` is that of the whole step's gradient before clipping. ``decided`` is whether the step was applied; None:
    the device applies it if the norm is finite, and the host has not looked. `grad_norm` and `applied` wait for it."""

    norm: AsyncScalar
    decided: bool | None = None

    @property
    def grad_norm(self) -> float:
        return self.norm.value()

    @property
    def applied(self) -> bool:
        """False when weights and optimiser state were left alone."""
        return math.isfinite(self.grad_norm) if self.decided is None else self.decided


class Engine(ABC):
    """One per process, for the whole run."""

    name: str
    fuses_optimizer = True
    """Whether the optimiser's tensors stay the ones it was built with, so that it may be the fused one."""
    symbolic_sizes = True
    """Whether compiled layers may take sizes for symbols from the start (`model.compile.compile_layers`)."""

    def __init__(self, group: Group, config: RunConfig) -> None:
        self.group = group
        self.config = config
        self.device = group.device
        self.module: nn.Module  # what the loop calls
        self.optimizer: torch.optim.Optimizer
        self.parameters: dict[str, nn.Parameter]  # what trains, by its name in the unwrapped model
        self.unchanged: dict[str, torch.Tensor] = {}  # float32 adapter weights that do not train, if not in the model
        self.placement: Placement | None = None  # set by engines that shard while the model loads

    @property
    def loss_factor(self) -> float:
        """By what the loop multiplies this rank's share of the loss: engines average gradients over ranks, the loss of
        a step is a sum over them."""
        return float(self.group.size)

    @property
    def scaled(self) -> bool:
        """Whether losses are scaled (float16), so that a step with overflowing gradients is skipped, not an error."""
        return False

    def wrap(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Take over ``model`` (on this rank's device) and its optimiser; trainable weights become rank 0's."""
        self.optimizer = optimizer
        self.parameters = {name: value for name, value in model.named_parameters() if value.requires_grad}
        self.group.broadcast([value.data for value in self.parameters.values()])
        self.module = self._wrap(model)

    def attaching(self, model: nn.Module) -> AbstractContextManager[Any] | None:
        """Encloses the moment in which peft reads the shapes of a model that `placement` has sharded."""
        return None

    @abstractmethod
    def _wrap(self, model: nn.Module) -> nn.Module: ...

    def _refuse_trained(self, sharded: Iterable[str]) -> None:
        """Raise ConfigError where a weight of the base trains of which each rank has a part, as ``sharded`` names them:
        `configuration.engine_rules` sees ``lora.extra``, and not what the file of an adapter to start from asks for."""
        name = next(iter(sharded), None)
        if name is not None:
            raise ConfigError(
                f"{name} is a weight of the base and would train, and a rank of {self.name} has a part of it",
                hint="train adapters only, or use parallel.engine ddp or zero2",
                code="config-combination",
            )

    def describe(self) -> str:
        """One line for the log, after `wrap`: what this rank holds of the model, as counted."""
        return f"{self.name}: the whole model on rank {self.group.rank}"

    def accumulating(self, last: bool) -> AbstractContextManager[Any]:
        """Encloses forward and backward of one micro-batch; ``last`` is the one whose gradients complete the step."""
        return nullcontext()

    @abstractmethod
    def backward(self, loss: torch.Tensor) -> None: ...

    @abstractmethod
    def step(self) -> StepResult:
        """Clip the whole step's gradient, update, clear gradients. A gradient that is not finite changes nothing,
        whether the host has looked at it or not."""

    def counters(self) -> dict[str, Any]:
        """What of the engine goes into the checkpoint's JSON."""
        return {"optimizer_steps": optimizer_steps(self.optimizer)}

    @abstractmethod
    def state(self) -> dict[str, torch.Tensor]:
        """float32 masters and moments by parameter name, on the CPU; collective, the same on every rank."""

    @abstractmethod
    def load_state(self, tensors: dict[str, torch.Tensor], counters: dict[str, Any]) -> None:
        """Put back what `state` and `counters` gave, whatever engine they came from."""

    def check_names(self, tensors: dict[str, torch.Tensor]) -> list[str]:
        """The kinds of moments in ``tensors``; raises when they are not about exactly the parameters that train."""
        saved = {key.partition("/")[2]: value for key, value in tensors.items() if key.startswith(f"{MASTER}/")}
        shapes = {name: tuple(value.shape) for name, value in saved.items()}
        expected = {name: tuple(getattr(value, "ds_shape", value.shape)) for name, value in self.parameters.items()}
        if shapes != expected:
            name = sorted(set(shapes.items()) ^ set(expected.items()))[0][0]
            raise CheckpointError(
                f"the training checkpoint does not fit what trains now: {name} has shape {shapes.get(name, 'none')} "
                f"there and {expected.get(name, 'none')} here"
            )
        return sorted({key.partition("/")[0] for key in tensors} - {MASTER})


def optimizer_steps(optimizer: torch.optim.Optimizer) -> int:
    """How many updates the optimiser counts for itself (AdamW's bias correction); 0 if it does not count."""
    steps = [int(state["step"]) for state in optimizer.state.values() if "step" in state]
    return max(steps, default=0)


def fresh_state(parameter: torch.Tensor, kinds: list[str], steps: int) -> dict[str, torch.Tensor]:
    """Optimiser state of one parameter with its moments at zero, to be filled from a checkpoint."""
    moments = {kind: torch.zeros_like(parameter, memory_format=torch.preserve_format) for kind in kinds}
    return {"step": torch.tensor(float(steps)), **moments} if kinds else {}
