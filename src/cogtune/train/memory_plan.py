"""A run's memory plan against the memory that is free now: log it, refuse a run that does not fit, compare it at the
end.

On a CPU nothing is refused, because the memory a machine can spare is not known well enough; a shortage is a warning.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from cogtune.configuration.run_config import RunConfig
from cogtune.distributed.group import Group
from cogtune.errors import OutOfMemoryError, SetupError
from cogtune.language import tr
from cogtune.plan.calibration import CONTEXT
from cogtune.plan.cards import Card, named_like
from cogtune.plan.choose import best, checkpointing, fits, keeping_gathered, tower_fits
from cogtune.plan.choose import engine as engine_for
from cogtune.plan.data_rows import Rows
from cogtune.plan.data_rows import summary as rows_summary
from cogtune.plan.from_config import budget_of, setting_of
from cogtune.plan.local_cards import local_cards
from cogtune.plan.memory import predict, weights
from cogtune.plan.plan import PlanError, keys_of, plan_of, too_small
from cogtune.plan.report import compared, summary
from cogtune.plan.setting import Setting
from cogtune.plan.sizes import ModelSizes
from cogtune.system.byte_sizes import format_size
from cogtune.train.engines import Engine, usable
from cogtune.train.log import log
from cogtune.train.run_inputs import Inputs

_EVERYTHING = frozenset(
    {"quant.experts", "quant.tower", "quant.embedding", "train.optimizer", "parallel.engine", "data.cache_features"}
)
"""Keys that `cogtune plan` may choose, but a run takes from its configuration unchanged."""


@dataclass(frozen=True)
class Layers:
    """The decoder and tower layers that are recomputed in the backward pass, and how many decoder layers of a sharded
    model stay gathered."""

    decoder: frozenset[int] = frozenset()
    tower: frozenset[int] = frozenset()
    gathered: int = 0


class MemoryPlan:
    """The memory plan of a run on its card. ``card`` is None on a CPU. All its decisions are the same on every rank."""

    def __init__(self, config: RunConfig, rows: Rows, setting: Setting, card: Card | None, force: bool) -> None:
        self.config, self.rows, self.card, self.force = config, rows, card, force
        self.setting = setting
        self.planned: dict[str, Any] | None = None
        """The plan that the run was started with, as ``plan.json`` keeps it; None on a CPU."""

    @property
    def tower_fits(self) -> bool | None:
        """Whether the tower fits in memory during training; None if the memory is not known."""
        if self.card is None or self.setting.tower == "none":
            return None
        return tower_fits(self.setting, self._budget)

    @property
    def _budget(self) -> int:
        assert self.card is not None
        limit = budget_of(self.config)
        return self.card.usable if limit is None else min(limit, self.card.usable)

    def check(self) -> None:
        """Refuse a run that fits under none of its allowed settings, before features are computed or weights are
        loaded.

        Raises:
            PlanError: it does not fit.
        """
        if self.card is None:
            self._warn_about_host()
            return
        self._settle(_leanest_tower(self.config, self.setting))

    def settle(self, cached: bool) -> Layers:
        """Choose the layers to recompute, now that it is known whether features are cached, and log the plan in one
        line.

        Raises:
            PlanError: it does not fit.
        """
        if self.setting.tower != "none":
            self.setting = replace(self.setting, tower="cached" if cached else "live")
        if self.card is not None:
            self.setting = keeping_gathered(self._settle(self.setting), self._budget)
            plan = plan_of(self.config, self.setting, self.card, self.rows)
            self.planned = plan.to_dict()
            log.info(summary(plan))
        return Layers(self.setting.decoder, self.setting.blocks, self.setting.keep_gathered or 0)

    def _settle(self, setting: Setting) -> Setting:
        """Return ``setting`` with as many layers recomputed as its policy says or the memory needs."""
        assert self.card is not None
        policy = self.config.train.gradient_checkpointing
        if policy == "auto" or budget_of(self.config) is not None:
            settled = checkpointing(setting, self._budget)
            if settled is not None:
                return settled
            setting = setting.with_recomputed(setting.sizes.num_hidden_layers)
        elif fits(setting, self._budget):
            return setting
        self._refuse(setting)
        return setting

    def _refuse(self, setting: Setting) -> None:
        assert self.card is not None
        memory = predict(setting)
        what = tr(
            "the plan for this run takes {driver} of the card (in the phase {name!r}); of its"
            " {memory}, {budget} can be used",
            driver=format_size(memory.driver),
            name=memory.peak.name,
            memory=format_size(self.card.memory),
            budget=format_size(self._budget),
        )
        if self.card.holders:
            what += tr("; in use by {holders}", holders=", ".join(self.card.holders))
        if self.force:
            log.warning(tr("{what}; starting anyway (--force)", what=what))
            return
        raise PlanError(what, hint=self._nearest(setting))

    def _nearest(self, setting: Setting) -> str:
        """Return the flags of the nearest plan that fits, changing as few settings as possible."""
        assert self.card is not None
        room = replace(self.card, free=self._budget)
        fixed = set(_EVERYTHING)
        for key in ("data.cache_features", "train.optimizer", "quant.embedding", "quant.experts", "quant.tower"):
            fixed.discard(key)
            found = best(setting, room, fixed)
            if found is not None:
                return tr("this fits: {flags}; --force starts anyway", flags=_flags(setting, found.setting))
        smaller = setting.with_batch(rows=1)
        if setting.batch.rows > 1 and (found := best(smaller, room)) is not None:
            rows = setting.batch.rows * setting.accumulation
            flags = f"--train.batch_size 1 --train.accumulation {rows} {_flags(smaller, found.setting)}"
            return tr("this fits: {flags}; --force starts anyway", flags=flags.strip())
        return tr("{hint}; --force starts anyway", hint=too_small(smaller, room, ()).hint)

    def _warn_about_host(self) -> None:
        free = _free_host_memory()
        needed = sum(weights(self.setting, tower=self.setting.tower != "none").values())
        if free is not None and needed > free:
            log.warning(
                tr(
                    "the model's weights take {needed} and {free} of this machine's memory are free; the run"
                    " may fail or become very slow",
                    needed=format_size(needed),
                    free=format_size(free),
                )
            )

    @contextmanager
    def explaining(self, device: torch.device) -> Iterator[None]:
        """Add the planned and the actual memory to an OutOfMemoryError raised inside the block."""
        try:
            yield
        except OutOfMemoryError as error:
            if self.card is None or device.type != "cuda":
                raise
            actual = torch.cuda.max_memory_reserved(device)
            planned = predict(self.setting).phase("train")
            raise OutOfMemoryError(
                f"{error.message}; {compared(planned, actual)}", hint=error.hint, code=error.code
            ) from error


def check_memory(
    config: RunConfig, inputs: Inputs, engine: Engine, accumulation: int, *, force: bool = False
) -> MemoryPlan:
    """Return the memory plan of this run, for the rank whose card has the least free memory. Collective.

    Raises:
        PlanError: the run fits under none of its allowed settings; not with ``force``, and never on a CPU.
    """
    rows, card, group = _rows(config, inputs), _least_card(engine.group), engine.group
    setting = setting_of(config, rows, ranks=group.processes, local_ranks=group.local_size, card=card)
    if engine.name != "tensor":
        setting = replace(setting, engine=engine.name)
    plan = MemoryPlan(config, rows, replace(setting, accumulation=accumulation), card, force)
    plan.check()
    return plan


def auto_engine(config: RunConfig, inputs: Inputs, group: Group) -> str:
    """Resolve ``parallel.engine: auto`` for several processes: the planner's choice for the card with the least free
    memory.

    Collective.
    """
    card = _least_card(group)
    name = fitting_engine(config, _rows(config, inputs), card, group.size)
    if card is not None:
        log.info(
            tr(
                "parallel.engine auto: {name}, the planner's choice for {size} x {card_name}",
                name=name,
                size=group.size,
                card_name=card.name,
            )
        )
    return name


def fitting_engine(config: RunConfig, rows: Rows, card: Card | None, ranks: int) -> str:
    """Return the fastest engine that is installed, compatible with the settings and fits the cards.

    Number formats are not changed. Without a GPU, returns the first compatible engine.
    """
    if card is None:
        return usable(config)[0]
    setting = setting_of(config, rows, ranks=ranks, card=card)
    return engine_for(_leanest_tower(config, setting), card, ranks, usable(config))


def _leanest_tower(config: RunConfig, setting: Setting) -> Setting:
    """Return ``setting`` with cached features if the run may use them."""
    cached = config.data.cache_features == "auto" and setting.cacheable
    return replace(setting, tower="cached") if cached else setting


def _rows(config: RunConfig, inputs: Inputs) -> Rows:
    shapes = inputs.rows.shapes
    pictures = sum(shape.images for shape in shapes)
    return rows_summary(shapes, pictures, ModelSizes.from_folder(config.model.path).image_tokens)


def _least_card(group: Group) -> Card | None:
    """Return the card with the least free memory over all ranks, or None on CPUs."""
    own = _own_card(group.device) if group.device.type == "cuda" else None
    found = [card for card in group.gather(own) if card is not None]
    return min(found, key=lambda card: card.usable, default=None)


def _own_card(device: torch.device) -> Card:
    """Return this rank's card with its free memory; memory that this process has reserved already counts as free."""
    free, total = torch.cuda.mem_get_info(device)
    name = torch.cuda.get_device_name(device)
    usable = free + torch.cuda.memory_reserved(device) + CONTEXT
    card = replace(named_like(name), name=name, capability=torch.cuda.get_device_capability(device))
    return replace(card, memory=total, free=usable, holders=_holders(name))


def _holders(name: str) -> tuple[str, ...]:
    """Return the processes that use memory of this card, according to ``nvidia-smi``.

    ``nvidia-smi`` numbers cards in its own order, so with several visible cards of this name the result is empty.
    """
    with suppress(SetupError):
        same = [card for card in local_cards() if card.name == name]
        mine = f"(pid {os.getpid()})"
        if len(same) == 1:
            return tuple(holder for holder in same[0].holders if mine not in holder)
    return ()


def _flags(before: Setting, after: Setting) -> str:
    old, new = keys_of(before), keys_of(after)
    changed = {key: value for key, value in new.items() if old.get(key) != value}
    return " ".join(f"--{key} {value}" for key, value in changed.items())


def _free_host_memory() -> int | None:
    """Return the bytes that Linux reports as available; None on other systems."""
    file = Path("/proc/meminfo")
    if not file.is_file():
        return None
    for line in file.read_text(encoding="ascii", errors="ignore").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None
