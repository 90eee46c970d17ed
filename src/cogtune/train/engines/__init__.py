"""Engines: how a training step is distributed over devices. `start` selects one; requesting an unavailable one is an
error."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

from cogtune.configuration.engine_rules import CHOICES, check, facts_of, refusal
from cogtune.configuration.resolve import resolve_engine
from cogtune.configuration.run_config import RunConfig
from cogtune.distributed.environment import is_launched, is_launched_by_deepspeed, world_size
from cogtune.distributed.group import Group
from cogtune.errors import ConfigError
from cogtune.language import tr
from cogtune.train.engines.base import Engine

__all__ = ["Engine", "choose", "start", "usable"]


def choose(config: RunConfig) -> str:
    """Return the engine's name for this process, from ``parallel`` and from its launcher.

    The name is ``auto`` if several processes run and the planner is to choose between `CHOICES`.

    Raises:
        ConfigError: the requested engine needs a launcher, does not work with the one that was used, or conflicts with
            another setting; or no engine fits.
    """
    _check_launch(config, world_size())
    name = resolve_engine(
        config.parallel, world_size(), launched=is_launched(), by_deepspeed=is_launched_by_deepspeed()
    )
    check(config, name)
    return name


def usable(config: RunConfig) -> list[str]:
    """Return those of `CHOICES` that are installed and compatible with every setting."""
    deepspeed = importlib.util.find_spec("deepspeed") is not None
    return [name for name in CHOICES if (deepspeed or name != "zero2") and refusal(facts_of(config, name)) is None]


def _check_launch(config: RunConfig, ranks: int) -> None:
    """Raise ConfigError if the launched processes are not those that ``parallel`` needs."""
    asked, wanted = config.parallel.engine, config.parallel.launch
    if is_launched() and isinstance(wanted, int) and wanted != ranks:
        raise ConfigError(
            tr(
                "parallel.launch is {wanted}, but a launcher has started {ranks} processes already",
                wanted=wanted,
                ranks=ranks,
            ),
            hint=tr("leave parallel.launch out under a launcher"),
        )
    if wanted is not None and not is_launched():
        raise ConfigError(
            tr("parallel.launch is {wanted}, but this process was not launched and starts no others", wanted=wanted),
            hint=tr("`cogtune train` with this configuration starts them; leave parallel.launch out for one device"),
        )
    if config.parallel.tensor > 1:
        _check_tensor(config, ranks)
        return
    if asked == "single" and ranks > 1:
        raise ConfigError(
            tr("parallel.engine is single, but a launcher started {ranks} processes", ranks=ranks),
            hint=tr("start without the launcher, or set parallel.engine to ddp"),
        )
    if asked not in ("auto", "single") and not is_launched():
        raise ConfigError(
            tr("parallel.engine is {asked}, but no launcher started this process", asked=asked),
            hint=tr(
                "start one process per device: --parallel.launch all, or torchrun --nproc-per-node N -m cogtune ..."
            ),
        )


def _check_tensor(config: RunConfig, ranks: int) -> None:
    """Raise ConfigError if the ranks cannot be divided into models of ``parallel.tensor`` ranks each."""
    size = config.parallel.tensor
    if not is_launched() or ranks % size:
        raise ConfigError(
            tr(
                "parallel.tensor is {size}, but {ranks} process{s}",
                size=size,
                ranks=ranks,
                s="es run" if ranks > 1 else " runs",
            ),
            hint=tr(
                "start a multiple of {size}: torchrun --nproc_per_node {size} -m cogtune train ..."
                " --parallel.tensor {size}",
                size=size,
            ),
            code="config-value",
        )


def start(
    config: RunConfig, name: str | None = None, planned: Callable[[Group], str] = lambda group: CHOICES[0]
) -> Engine:
    """Join the process group, if there is one, and return the engine. Call ``close`` on its group at the end.

    ``name``: the result of `choose`; None: call it here. ``planned``: called to resolve ``auto``.
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
