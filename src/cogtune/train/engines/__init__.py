"""Engines: how a training step is spread over devices. `start` picks one; one that is not active is an error."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

from cogtune.configuration.engine_rules import CHOICES, check, facts_of, refusal
from cogtune.configuration.resolve import resolve_engine
from cogtune.configuration.run_config import RunConfig
from cogtune.distributed.environment import is_launched, is_launched_by_deepspeed, world_size
from cogtune.distributed.group import Group
from cogtune.errors import ConfigError
from cogtune.train.engines.base import Engine

__all__ = ["Engine", "able", "choose", "start"]


def choose(config: RunConfig) -> str:
    """The engine's name for this process, from ``parallel`` and from what launched it; ``auto`` where several processes
    run and the planner is to choose between `CHOICES`.

    Raises:
        ConfigError: the engine asked for needs a launcher, cannot be used with the one that was used, or does not go
            with another setting; or no engine does.
    """
    _check_launch(config, world_size())
    name = resolve_engine(
        config.parallel, world_size(), launched=is_launched(), by_deepspeed=is_launched_by_deepspeed()
    )
    check(config, name)
    return name


def able(config: RunConfig) -> list[str]:
    """Those of `CHOICES` that are installed and go with every setting."""
    deepspeed = importlib.util.find_spec("deepspeed") is not None
    return [name for name in CHOICES if (deepspeed or name != "zero2") and refusal(facts_of(config, name)) is None]


def _check_launch(config: RunConfig, ranks: int) -> None:
    """Raises ConfigError where the processes that were started are not those that ``parallel`` needs."""
    asked, wanted = config.parallel.engine, config.parallel.launch
    if is_launched() and isinstance(wanted, int) and wanted != ranks:
        raise ConfigError(
            f"parallel.launch is {wanted}, but a launcher has started {ranks} processes already",
            hint="leave parallel.launch out under a launcher",
        )
    if wanted is not None and not is_launched():
        raise ConfigError(
            f"parallel.launch is {wanted}, but this process was not launched and starts no others",
            hint="`cogtune train` with this configuration starts them; leave parallel.launch out for one device",
        )
    if config.parallel.tensor > 1:
        _check_tensor(config, ranks)
        return
    if asked == "single" and ranks > 1:
        raise ConfigError(
            f"parallel.engine is single, but a launcher started {ranks} processes",
            hint="start without the launcher, or set parallel.engine to ddp",
        )
    if asked not in ("auto", "single") and not is_launched():
        raise ConfigError(
            f"parallel.engine is {asked}, but no launcher started this process",
            hint="start one process per device: --parallel.launch all, or torchrun --nproc-per-node N -m cogtune ...",
        )


def _check_tensor(config: RunConfig, ranks: int) -> None:
    """Raises ConfigError when this many ranks cannot be models of ``parallel.tensor`` ranks each."""
    size = config.parallel.tensor
    if not is_launched() or ranks % size:
        raise ConfigError(
            f"parallel.tensor is {size}, but {ranks} process{'es run' if ranks > 1 else ' runs'}",
            hint=f"start a multiple of {size}: torchrun --nproc_per_node {size} -m cogtune train ... "
            f"--parallel.tensor {size}",
            code="config-value",
        )


def start(
    config: RunConfig, name: str | None = None, planned: Callable[[Group], str] = lambda group: CHOICES[0]
) -> Engine:
    """Join the process group, if there is one, and take a device. Call ``close`` on the result at the end.

    ``name``: what `choose` said; None: it is asked. ``planned``: asked in its turn where it said ``auto``.
    """
    name = choose(config) if name is None else name
    if name == "auto":
        name = planned(Group.join())
        check(config, name)
    if name == "tensor":
        from cogtune.train.engines.tensor_parallel import TensorEngine

        return TensorEngine(Group.join(config.parallel.tensor), config)
    if name == "zero3":
        from cogtune.train.engines.zero3 import Zero3Engine

        return Zero3Engine(Group.join(), config)
    if name in ("zero1", "zero2"):
        from cogtune.train.engines.zero import ZeroEngine

        return ZeroEngine(Group.join(), config)
    if name == "fsdp2":
        from cogtune.train.engines.fsdp2 import Fsdp2Engine

        return Fsdp2Engine(Group.join(), config)
    if name == "ddp":
        from cogtune.train.engines.ddp import DdpEngine

        return DdpEngine(Group.join(), config)
    from cogtune.train.engines.single import SingleEngine

    return SingleEngine(Group.alone(), config)
