"""Answering with a tensor-parallel model (``parallel.tensor``).

Rank 0 reads, asks and writes as if alone. Its engine says what is computed, and the other ranks compute it with it
(`generate.lockstep`).
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from cogtune.distributed.environment import world_size
from cogtune.distributed.group import TensorGroup, connect
from cogtune.errors import ConfigError
from cogtune.generate.choices import ChoiceScores, ClosedQuestion
from cogtune.generate.generator import Generator, Images
from cogtune.generate.lockstep import announced, explaining, follow
from cogtune.generate.transformers_generator import closed_questions_refused
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
    """Meet the other processes; returns None if rank 0 has nothing to do (``needed``).

    Raises:
        RunError: another one ended.
    """
    group = join(device)
    return group if announced({} if needed else None) is not None else None


def join(device: torch.device) -> TensorGroup:
    """Meet the other processes."""
    with explaining(0):
        connect(device, _PATIENCE)
    return TensorGroup(dist.get_rank(), dist.get_world_size())


class TensorParallelGenerator(Generator):
    """A generator on every rank: the first one uses it, the others `follow`."""

    def __init__(self, model: Any, processor: Any, **ways: Any) -> None:
        super().__init__(model, processor, leads=True, **ways)

    def follow(self) -> None:
        """Repeat what the first rank computes until it is done."""
        follow(self.model, self.processor)

    def close(self) -> None:
        """End the engine, and let the others end. After a failed call the launcher ends them."""
        super().close()
        if self._engine is None or self._engine.work.failed is None:
            announced(None)

    def score(self, images: Images, questions: Sequence[ClosedQuestion]) -> list[ChoiceScores]:
        """Closed questions need the model in one place, so this always raises.

        Raises:
            SetupError: always.
        """
        raise closed_questions_refused()
