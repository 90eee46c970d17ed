"""A run's memory plan against the memory that is free now: log it, refuse a run that does not fit, compare it at the
end.

On a CPU nothing is refused, because the memory a machine can spare is not known well enough; a shortage is a warning.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

import torch

from cogtune.configuration.model import CogVLM2Config
from cogtune.configuration.resolve import recomputed_layers, resident_layers, torch_dtype
from cogtune.configuration.run_config import RunConfig
from cogtune.distributed.group import Group
from cogtune.errors import OutOfMemoryError, SetupError
from cogtune.language import tr
from cogtune.model.host_memory import OFFLOADING, require_host_memory
from cogtune.model.layer_streaming import StreamPlacement, stream_placement
from cogtune.plan.calibration import CONTEXT
from cogtune.plan.cards import Card, named_like
from cogtune.plan.choose import best, checkpointing, filling, fits, keeping_gathered, streaming, tower_fits
from cogtune.plan.choose import engine as engine_for
from cogtune.plan.data_rows import Rows
from cogtune.plan.data_rows import summary as rows_summary
from cogtune.plan.from_config import budget_of, setting_of
from cogtune.plan.local_cards import local_cards
from cogtune.plan.memory import offloaded_bytes, predict, weights
from cogtune.plan.plan import PlanError, keys_of, plan_of, too_small
from cogtune.plan.report import compared, summary
from cogtune.plan.setting import Setting
from cogtune.plan.sizes import ModelSizes
from cogtune.plan.streaming import Streaming
from cogtune.system.allocator import expandable
from cogtune.system.byte_sizes import format_size
from cogtune.system.machine import free_memory
from cogtune.train.engines import Engine, usable
from cogtune.train.log import log
from cogtune.train.run_inputs import Inputs

_EVERYTHING = frozenset(
    {
        *("quant.experts", "quant.tower", "quant.embedding", "quant.stream"),
        *("train.optimizer", "parallel.engine", "data.cache_features"),
    }
)
"""Keys that `cogtune plan` may choose, but a run takes from its configuration unchanged."""
_SMALLER = ("embedding", "experts", "tower", "stream")
"""Keys of ``quant`` that make a model smaller on its card, in the order in which they are offered."""


@dataclass(frozen=True)
class Layers:
    """The decoder and tower layers that are recomputed in the backward pass; how many decoder layers of a sharded model
    stay gathered; and how many decoder and tower layers stay on the card while the others are streamed (None: all)."""

    decoder: frozenset[int] = frozenset()
    tower: frozenset[int] = frozenset()
    gathered: int = 0
    resident: int | None = None
    tower_resident: int | None = None

    @classmethod
    def named(cls, config: RunConfig, model: CogVLM2Config) -> Layers:
        """Return the layers that the configuration names; what it leaves to the planner is not recomputed and stays."""
        layers, blocks = _depths(model)
        policy, stream = config.train.gradient_checkpointing, config.quant.stream
        decoder, tower = (frozenset(recomputed_layers(policy, count) or ()) for count in (layers, blocks))
        resident, tower_resident = resident_layers(stream, layers), resident_layers(stream, layers, blocks)
        return cls(decoder, tower, resident=resident, tower_resident=tower_resident)

    def streamed(self, model: CogVLM2Config, device: torch.device) -> StreamPlacement | None:
        """Return the placement that streams the other layers, or None if all stay on the device."""
        layers, blocks = _depths(model)
        own = self.resident, self.tower_resident
        return stream_placement(device, layers=layers, resident=own[0], blocks=blocks, tower_resident=own[1])


def _depths(model: CogVLM2Config) -> tuple[int, int]:
    """Return the numbers of decoder and tower layers."""
    vision: Any = model.vision_config
    return model.num_hidden_layers, vision.num_hidden_layers


class MemoryPlan:
    """The memory plan of a run on its card. ``card`` is None on a CPU; ``processes`` run on this machine. All its
    decisions are the same on every rank.
    """

    def __init__(
        self, config: RunConfig, rows: Rows, setting: Setting, card: Card | None, force: bool, processes: int = 1
    ) -> None:
        self.config, self.rows, self.card, self.force, self._processes = config, rows, card, force, processes
        self.setting = setting
        self.planned: dict[str, Any] | None = None
        """The plan that the run was started with, as ``plan.json`` keeps it; None on a CPU."""

    @property
    def tower_fits(self) -> bool | None:
        """Whether the tower fits in memory during training; None if the memory is not known."""
        if self.card is None or self.setting.tower == "none":
            return None
        if tower_fits(self.setting, self._budget):
            return True
        return self._streams and streaming(replace(self.setting, tower="live"), self._budget) is not None

    @property
    def _streams(self) -> bool:
        return self.config.quant.stream == "auto"

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
        self._require_host(self._settle(_leanest_tower(self.config, self.setting)))

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
        own = self.setting
        return Layers(own.decoder, own.blocks, own.keep_gathered or 0, own.resident, own.tower_resident)

    def _settle(self, setting: Setting) -> Setting:
        """Return ``setting`` with as many layers recomputed as its policy says or the memory needs."""
        assert self.card is not None
        policy = self.config.train.gradient_checkpointing
        if policy == "auto" or budget_of(self.config) is not None:
            settled = checkpointing(setting, self._budget)
            if settled is None and self._streams:
                settled = streaming(setting, self._budget)
            if settled is not None:
                return settled
            setting = setting.with_recomputed(setting.sizes.num_hidden_layers)
        elif fits(setting, self._budget):
            return setting
        elif self._streams and (streamed := streaming(setting, self._budget, settled=True)) is not None:
            return streamed
        self._refuse(setting)
        return setting

    def _require_host(self, setting: Setting) -> None:
        """Refuse streamed layers and saved inputs that this machine's free memory cannot hold, for all its processes.

        Raises:
            SetupError: it cannot.
        """
        each = Streaming.of_decoder(setting).host
        if setting.tower == "live":
            each += Streaming.of_tower(setting).host
        if self.force:
            return
        require_host_memory(self._processes * each)
        if inputs := offloaded_bytes(setting):
            require_host_memory(self._processes * (each + inputs), OFFLOADING)

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
        for key in (
            "data.cache_features",
            "train.optimizer",
            "quant.embedding",
            "quant.experts",
            "quant.tower",
            "quant.stream",
        ):
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
        free = free_memory()
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
    plan = MemoryPlan(config, rows, replace(setting, accumulation=accumulation), card, force, group.local_size)
    plan.check()
    return plan


def filling_placement(config: RunConfig, model: CogVLM2Config, device: torch.device) -> StreamPlacement | None:
    """Return the placement of the tower while the feature cache is filled, as ``quant.stream`` says; None: it stays
    whole on the device.
    """
    layers, blocks = _depths(model)
    kept = resident_layers(config.quant.stream, layers, blocks)
    if config.quant.stream == "auto" and device.type == "cuda":
        dtype = str(torch_dtype(config.model.dtype, device)).removeprefix("torch.")
        sizes = ModelSizes.from_config(model.to_dict())
        setting = Setting(sizes, quant=config.quant, tower="cached", dtype=dtype, expandable=expandable())
        kept = filling(setting, _own_card(device).usable, config.data.cache_batch)
    return stream_placement(device, layers=layers, resident=None, blocks=blocks, tower_resident=kept)


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
    card = replace(named_like(name), name=name, capability=torch.cuda.get_device_capability(device), host=free_memory())
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
