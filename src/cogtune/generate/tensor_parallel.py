"""Answering with a tensor-parallel model (``parallel.tensor``).

Rank 0 reads, asks and writes as if alone. It broadcasts every call on the model first, and the other ranks repeat it
with the same inputs, the same random numbers and the same end.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from transformers import StoppingCriteria

from cogtune.distributed.environment import world_size
from cogtune.distributed.group import TensorGroup, connect
from cogtune.errors import ConfigError
from cogtune.generate.decoding import Decoding
from cogtune.generate.transformers_generator import TransformersGenerator
from cogtune.language import tr

_PATIENCE = timedelta(days=7)  # a chat waits for its user


def check_launched(size: int) -> None:
    """Raise ConfigError unless exactly ``size`` processes run."""
    found = world_size()
    if found == size:
        return
    if size == 1:
        raise ConfigError(
            tr("a launcher started {found} processes, but answering takes one", found=found),
            hint=tr(
                "start without the launcher, or split one model over the processes: --parallel.tensor {found}",
                found=found,
            ),
            code="config-value",
        )
    raise ConfigError(
        tr(
            "--parallel.tensor is {size}, but {found} process{s}",
            size=size,
            found=found,
            s="es run" if found > 1 else " runs",
        ),
        hint=f"torchrun --standalone --nproc-per-node {size} -m cogtune ... --parallel.tensor {size}",
        code="config-value",
    )


def start(device: torch.device, *, needed: bool = True) -> TensorGroup | None:
    """Meet the other processes; returns None if rank 0 has nothing to do (``needed``)."""
    group = join(device)
    return group if _announced({} if needed else None) is not None else None


def join(device: torch.device) -> TensorGroup:
    """Meet the other processes."""
    connect(device, _PATIENCE)
    return TensorGroup(dist.get_rank(), dist.get_world_size())


class TensorParallelGenerator(TransformersGenerator):
    """A generator on every rank: rank 0 uses it, the other ranks `follow`."""

    def __init__(self, model: Any, processor: Any, *, group: TensorGroup, **ways: Any) -> None:
        super().__init__(model, processor, **ways)
        self.group = group
        self._broken = False

    def follow(self) -> None:
        """Repeat what rank 0 runs until it is done."""
        while (call := _announced(None)) is not None:
            _set_random(call.pop("random"), self.device)
            if "pixels" in call:
                super()._features_of(call["pixels"].to(self.device))
            else:
                inputs = {name: value.to(self.device) for name, value in call["inputs"].items()}
                stops = {"stopping_criteria": [_CommonStop(None)]} if call["stops"] else {}
                super()._generate(inputs, call["decoding"], **stops)

    def close(self) -> None:
        """Let the others end. After a failed call the launcher ends them."""
        if self.group.rank == 0 and not self._broken:
            _announced(None)

    def _features_of(self, pixels: torch.Tensor) -> torch.Tensor:
        with self._together(pixels=pixels.cpu()):
            return super()._features_of(pixels)

    def _generate(self, inputs: dict[str, torch.Tensor], decoding: Decoding, **options: Any) -> torch.Tensor:
        criteria = options.pop("stopping_criteria", None)
        if criteria is not None:
            options["stopping_criteria"] = [_CommonStop(criteria)]
        on_cpu = {name: value.cpu() for name, value in inputs.items()}
        with self._together(inputs=on_cpu, decoding=decoding, stops=criteria is not None):
            return super()._generate(inputs, decoding, **options)

    @contextmanager
    def _together(self, **call: Any) -> Iterator[None]:
        _announced({**call, "random": _get_random(self.device)})
        try:
            yield
        except BaseException:
            self._broken = True
            raise


class _CommonStop(StoppingCriteria):
    """A stopping criterion: all ranks ask at every token whether rank 0 wants to stop."""

    def __init__(self, criteria: Sequence[StoppingCriteria] | None) -> None:
        self._criteria = criteria

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        wish = torch.zeros(input_ids.shape[0], dtype=torch.uint8)
        for criterion in self._criteria or ():
            wish |= criterion(input_ids, scores, **kwargs).cpu().byte()
        dist.broadcast(wish, src=0)
        return wish.bool().to(input_ids.device)


def _announced(call: dict[str, Any] | None) -> dict[str, Any] | None:
    """Broadcast rank 0's ``call`` to every rank."""
    message = [call]
    dist.broadcast_object_list(message, src=0, device=torch.device("cpu"))
    return message[0]


def _get_random(device: torch.device) -> dict[str, torch.Tensor]:
    states = {"cpu": torch.get_rng_state()}
    return {**states, "cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else states


def _set_random(states: dict[str, torch.Tensor], device: torch.device) -> None:
    torch.set_rng_state(states["cpu"])
    if "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)
