"""Engines: how a training step is spread over devices. `start` picks one; one that is not active is an error."""

from __future__ import annotations

from collections.abc import Callable

from cogtune.configuration.run_config import RunConfig
from cogtune.distributed.environment import is_launched, is_launched_by_deepspeed, world_size
from cogtune.distributed.group import Group
from cogtune.errors import ConfigError
from cogtune.train.engines.base import Engine
from cogtune.train.engines.rules import check

__all__ = ["Engine", "choose", "start"]


def choose(config: RunConfig) -> str:
    """The engine's name for this process, from ``parallel`` and from what launched it.

    Raises:
        ConfigError: the engine asked for needs a launcher, cannot be used with the one that was used, or does not go
            with another setting.
    """
    name = _choose(config)
    check(config, name)
    return name


def _choose(config: RunConfig) -> str:
    asked, ranks = config.parallel.engine, world_size()
    wanted = config.parallel.launch
    if is_launched() and isinstance(wanted, int) and wanted != ranks:
        raise ConfigError(
            f"parallel.launch is {wanted}, but a launcher has started {ranks} processes already",
            hint="leave parallel.launch out under a launcher",
        )
    if config.parallel.tensor > 1:
        _check_tensor(config, ranks)
        return "tensor"
    if asked == "auto":
        if not is_launched():
            return "single"
        if config.parallel.deepspeed is not None or is_launched_by_deepspeed():
            return "zero2"
        return "ddp" if ranks > 1 else "single"
    if asked == "single" and ranks > 1:
        raise ConfigError(
            f"parallel.engine is single, but a launcher started {ranks} processes",
            hint="start without the launcher, or set parallel.engine to ddp",
        )
    if asked != "single" and not is_launched():
        raise ConfigError(
            f"parallel.engine is {asked}, but no launcher started this process",
            hint="start one process per device: --parallel.launch all, or torchrun --nproc-per-node N -m cogtune ...",
        )
    return asked


def _check_tensor(config: RunConfig, ranks: int) -> None:
    """Raises ConfigError when this many ranks cannot be models of ``parallel.tensor`` ranks each."""
    size = config.parallel.tensor
    if config.parallel.engine not in ("auto", "ddp"):
        raise ConfigError(
            f"parallel.tensor is {size} and parallel.engine {config.parallel.engine}: only ddp goes with it",
            hint="leave parallel.engine out; with more ranks than parallel.tensor, the models share the rows (ddp)",
            code="config-value",
        )
    if not is_launched() or ranks % size:
        raise ConfigError(
            f"parallel.tensor is {size}, but {ranks} process{'es run' if ranks > 1 else ' runs'}",
            hint=f"start a multiple of {size}: torchrun --nproc_per_node {size} -m cogtune train ... "
            f"--parallel.tensor {size}",
            code="config-value",
        )


def start(config: RunConfig, planned: Callable[[Group], str] | None = None) -> Engine:
    """Join the process group, if there is one, and take a device. Call ``close`` on the result at the end.

    ``planned``: asked for the engine where ``parallel.engine`` is auto and torchrun started several processes.
    """
    name = choose(config)
    if name == "ddp" and config.parallel.engine == "auto" and planned is not None:
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
