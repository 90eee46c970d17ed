"""The interface between the training loop and an engine, and the code that all engines share.

An engine wraps the model, runs backward passes and steps, and exposes its state by parameter name, so that a checkpoint
does not depend on the engine that wrote it.
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
from cogtune.language import tr
from cogtune.train.engines.async_scalar import AsyncScalar
from cogtune.train.optim import SCALES

MASTER = "master"


@dataclass(frozen=True)
class StepResult:
    """Outcome of an optimiser step.

    ``norm`` is the norm of the whole step's gradient before clipping. ``decided`` is whether the step was applied;
    None: the device decides (it applies the step if the norm is finite), and the host has not read the result.
    `grad_norm` and `applied` block until it is known.
    """

    norm: AsyncScalar
    decided: bool | None = None

    @property
    def grad_norm(self) -> float:
        return self.norm.value()

    @property
    def applied(self) -> bool:
        """False if weights and optimiser state were left unchanged."""
        return math.isfinite(self.grad_norm) if self.decided is None else self.decided


class Engine(ABC):
    """Base class of engines; one instance per process, for the whole run."""

    name: str
    fuses_optimizer = True
    """Whether the optimiser keeps the tensors it was built with, which the fused one requires."""
    symbolic_sizes = True
    """Whether compiled layers may treat sizes as symbolic from the start (`model.compile.compile_layers`)."""

    def __init__(self, group: Group, config: RunConfig) -> None:
        self.group = group
        self.config = config
        self.device = group.device
        self.module: nn.Module  # what the loop calls
        self.optimizer: torch.optim.Optimizer
        self.parameters: dict[str, nn.Parameter]  # what trains, by its name in the unwrapped model
        self.unchanged: dict[str, torch.Tensor] = {}  # float32 adapter weights that do not train, if not in the model
        self.placement: Placement | None = None  # set by engines that shard while the model loads
        self.gathered_layers = 0  # decoder layers that a sharding engine keeps gathered; set before `wrap`

    @property
    def loss_factor(self) -> float:
        """Factor by which the loop multiplies this rank's share of the loss.

        A step's loss is a sum over ranks; the factor compensates for engines that average gradients.
        """
        return float(self.group.size)

    @property
    def scaled(self) -> bool:
        """Whether losses are scaled (float16), so that a step with overflowing gradients is skipped instead of an
        error."""
        return False

    def wrap(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Wrap ``model`` (on this rank's device) and its optimiser; broadcasts rank 0's trainable weights."""
        self.optimizer = optimizer
        self.parameters = {name: value for name, value in model.named_parameters() if value.requires_grad}
        self.group.broadcast([value.data for value in self.parameters.values()])
        self.module = self._wrap(model)

    def attaching(self, model: nn.Module) -> AbstractContextManager[Any] | None:
        """Return a context in which peft reads the shapes of a model that `placement` has sharded, or None if none is
        needed."""
        return None

    @abstractmethod
    def _wrap(self, model: nn.Module) -> nn.Module: ...

    def _refuse_trained(self, sharded: Iterable[str]) -> None:
        """Raise ConfigError if a sharded base weight, one of the names in ``sharded``, would be trained.

        `configuration.engine_rules` checks ``lora.extra``, but not what the file of an adapter to start from asks for.
        """
        name = next(iter(sharded), None)
        if name is not None:
            raise ConfigError(
                tr(
                    "{name} is a weight of the base and would train, and each rank of {self_name} holds only a shard"
                    " of it",
                    name=name,
                    self_name=self.name,
                ),
                hint=tr("train adapters only, or use parallel.engine ddp or zero2"),
                code="config-combination",
            )

    def describe(self) -> str:
        """Return a log line about what this rank holds of the model, as counted. Call it after `wrap`."""
        return tr("{name}: the whole model on rank {rank}", name=self.name, rank=self.group.rank)

    def accumulating(self, last: bool) -> AbstractContextManager[Any]:
        """Return a context for forward and backward pass of one micro-batch. ``last``: its gradients complete the
        step."""
        return nullcontext()

    @abstractmethod
    def backward(self, loss: torch.Tensor) -> None: ...

    @abstractmethod
    def step(self) -> StepResult:
        """Clip the whole step's gradient, update the weights and clear the gradients.

        A gradient that is not finite changes nothing, whether or not the host has read the norm.
        """

    def counters(self) -> dict[str, Any]:
        """Return the engine's part of the checkpoint's JSON."""
        return {"optimizer_steps": optimizer_steps(self.optimizer)}

    @abstractmethod
    def state(self) -> dict[str, torch.Tensor]:
        """Return float32 masters and moments by parameter name, on the CPU. Collective; the result is the same on every
        rank."""

    @abstractmethod
    def load_state(self, tensors: dict[str, torch.Tensor], counters: dict[str, Any]) -> None:
        """Restore the results of `state` and `counters`, whichever engine they came from."""

    def check_names(self, tensors: dict[str, torch.Tensor]) -> list[str]:
        """Return the kinds of moments in ``tensors``; raises if they do not match the trained parameters exactly."""
        saved = {key.partition("/")[2]: value for key, value in tensors.items() if key.startswith(f"{MASTER}/")}
        shapes = {name: tuple(value.shape) for name, value in saved.items()}
        expected = {name: tuple(getattr(value, "ds_shape", value.shape)) for name, value in self.parameters.items()}
        if shapes != expected:
            name = sorted(set(shapes.items()) ^ set(expected.items()))[0][0]
            raise CheckpointError(
                tr(
                    "the training checkpoint does not fit what trains now: {name} has shape {there} there and"
                    " {here} here",
                    name=name,
                    there=shapes.get(name, "none"),
                    here=expected.get(name, "none"),
                )
            )
        for key, value in tensors.items():
            kind, _, name = key.partition("/")
            if kind not in (MASTER, *SCALES) and tuple(value.shape) != expected.get(name):
                raise CheckpointError(
                    tr(
                        "the training checkpoint does not fit what trains now: {name} has shape {there} there and"
                        " {here} here",
                        name=key,
                        there=tuple(value.shape),
                        here=expected.get(name, "none"),
                    )
                )
        return sorted({key.partition("/")[0] for key in tensors} - {MASTER})


def optimizer_steps(optimizer: torch.optim.Optimizer) -> int:
    """Return how many updates the optimiser has counted (for AdamW's bias correction); 0 if it does not count."""
    steps = [int(state["step"]) for state in optimizer.state.values() if "step" in state]
    return max(steps, default=0)


def fresh_state(parameter: torch.Tensor, kinds: list[str], steps: int) -> dict[str, torch.Tensor]:
    """Return optimiser state of one parameter with zero moments, to be filled from a checkpoint."""
    moments = {kind: torch.zeros_like(parameter, memory_format=torch.preserve_format) for kind in kinds}
    return {"step": torch.tensor(float(steps)), **moments} if kinds else {}
