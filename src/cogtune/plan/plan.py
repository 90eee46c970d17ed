"""The plan of a run: the settings chosen for the given cards, and their memory, duration, disk space and price."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

from cogtune.configuration.deepspeed import apply_deepspeed
from cogtune.configuration.engine_rules import check
from cogtune.configuration.keys import known_keys
from cogtune.configuration.load import explicit_values
from cogtune.configuration.resolve import float16_warning, resolve_engine, stream_note
from cogtune.configuration.run_config import RunConfig
from cogtune.errors import InputError
from cogtune.language import tr
from cogtune.plan.cards import Card
from cogtune.plan.choose import best, largest_batch, smallest_card
from cogtune.plan.data_rows import Rows
from cogtune.plan.from_config import budget_of, fixed_keys, setting_of
from cogtune.plan.inference import answer, merge
from cogtune.plan.memory import Memory, Phase, predict
from cogtune.plan.setting import Setting
from cogtune.plan.time import Schedule, answering_seconds, checkpoint_bytes, feature_bytes, schedule
from cogtune.system.byte_sizes import GIB, format_size


class PlanError(InputError):
    """Nothing that may be chosen fits the cards; ``nearest`` is the setting of least memory that was tried."""

    default_code = "plan-does-not-fit"


@dataclass(frozen=True)
class Plan:
    """A plan. ``keys``: configuration keys that stand for ``setting``, with their values.

    ``largest``: most rows of a micro-batch that fit with all layers recomputed. ``price``: per card and hour, or None.
    """

    setting: Setting
    card: Card
    rows: Rows
    memory: Memory
    times: Schedule
    keys: dict[str, Any]
    largest: int
    epochs: int
    keep_checkpoints: int
    price: float | None = None
    answering: float = 0.0
    """Seconds of answering validation questions once."""
    text: str = ""
    """The plan as ``cogtune plan`` prints it, if it was made with `cogtune.plan`."""

    def __str__(self) -> str:
        return self.text or repr(self)

    @property
    def cache(self) -> int:
        """Bytes of disk for the feature cache."""
        return self.rows.pictures * feature_bytes(self.setting) if self.setting.tower == "cached" else 0

    @property
    def checkpoints(self) -> int:
        """Bytes of disk for checkpoints: those that are kept, the best one, and one being written."""
        return (self.keep_checkpoints + 2) * checkpoint_bytes(self.setting)

    @property
    def seconds(self) -> float:
        """Seconds of the whole run: loading, filling the feature cache, all epochs."""
        return self.times.load + self.times.fill + self.epochs * self.times.epoch

    @property
    def cost(self) -> float | None:
        return None if self.price is None else self.price * self.setting.ranks * self.seconds / 3600

    @property
    def warnings(self) -> list[str]:
        """Warnings that training will print for these settings."""
        unused = stream_note(self.setting.quant.stream, self.setting.sizes.num_hidden_layers)
        return list(filter(None, [float16_warning(self.setting.dtype), unused]))

    @property
    def estimate(self) -> bool:
        """True if the card's rates were not measured."""
        return not self.card.measured

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON; sizes in bytes, times in seconds."""
        step = self.times.step
        return {
            "card": {"name": self.card.name, "memory": self.card.memory, "usable": self.card.usable,
                     "measured": self.card.measured, "count": self.setting.ranks, "holders": list(self.card.holders)},
            "rows": {"count": self.rows.count, "pictures": self.rows.pictures, "typical": self.rows.typical,
                     "exact": self.rows.exact,
                     "largest_text_tokens": self.rows.largest.text, "mean_text_tokens": self.rows.mean.text},
            "keys": self.keys,
            "dtype": self.setting.dtype,
            "warnings": self.warnings,
            "recomputed_layers": len(self.setting.decoder),
            "phases": {phase.name: _plain(phase) for phase in self.memory.phases},
            "afterwards": {phase.name: _plain(phase) for phase in (answer(self.setting), merge(self.setting))},
            "reserved": self.memory.reserved,
            "driver": self.memory.driver,
            "largest_batch": self.largest,
            "seconds": {"load": self.times.load, "fill": self.times.fill, "step": step.seconds,
                        "epoch": self.times.epoch, "save": self.times.save, "answering": self.answering,
                        "run": self.seconds},
            "steps_per_epoch": self.times.steps,
            "disk": {"cache": self.cache, "checkpoints": self.checkpoints},
            "cost": self.cost,
        }  # fmt: skip


def _plain(phase: Phase) -> dict[str, Any]:
    return {"reserved": phase.reserved, "allocated": phase.allocated, "parts": dict(phase.parts),
            "host": phase.host_bytes}  # fmt: skip


def make_plan(
    config: RunConfig,
    card: Card,
    rows: Rows,
    *,
    cards: int = 1,
    placeholders: Collection[str] = (),
    price: float | None = None,
) -> Plan:
    """Return the fastest plan for ``config`` on ``cards`` such cards.

    ``placeholders``: keys that were filled in for planning only, so they do not count as set by the user.

    Raises:
        PlanError: nothing fits; the hint names the smallest card that would.
        AdapterError: a LoRA target that matches nothing.
        ConfigError, SetupError: what training would refuse too: incompatible settings, a number format that the card
            does
            not support.
    """
    config = apply_deepspeed(config, world_size=cards)[0]
    check(config, resolve_engine(config.parallel, cards, launched=cards > 1))
    fixed = fixed_keys(config, dict.fromkeys(placeholders))
    setting = setting_of(config, rows, ranks=cards, card=card)
    limit = budget_of(config)
    room = card if limit is None else replace(card, free=min(card.usable, limit))
    choice = best(setting, room, fixed)
    if choice is None:
        raise too_small(setting, room, fixed)
    return plan_of(config, choice.setting, card, rows, price=price)


def plan_of(config: RunConfig, setting: Setting, card: Card, rows: Rows, *, price: float | None = None) -> Plan:
    """Return the plan of a setting without choosing anything."""
    return Plan(
        setting=setting,
        card=card,
        rows=rows,
        memory=predict(setting),
        times=schedule(setting, card, rows=rows.count, pictures=rows.pictures, mean=rows.mean),
        keys=keys_of(setting) | _as_given(config),
        largest=largest_batch(setting, card.usable),
        epochs=config.train.epochs,
        keep_checkpoints=config.train.keep_checkpoints,
        price=price,
        answering=_answering(config, setting, card, rows),
    )


def _answering(config: RunConfig, setting: Setting, card: Card, rows: Rows) -> float:
    """Return the seconds of answering ``eval.generate`` questions; 0 without validation."""
    section, validates = config.eval, bool(config.data.validation) or config.data.validation_share > 0
    tokens = min(section.max_new_tokens, round(rows.mean.labelled) + 1)
    questions = section.generate * max(1, len(config.data.validation_sets)) if validates else 0
    return answering_seconds(setting, card, questions=questions, tokens=tokens, mean=rows.mean)


def _as_given(config: RunConfig) -> dict[str, Any]:
    """Return the user's own ``train.gradient_checkpointing`` if it is a policy other than ``auto``."""
    policy = config.train.gradient_checkpointing
    return {} if policy == "auto" else {"train.gradient_checkpointing": policy}


def keys_of(setting: Setting) -> dict[str, Any]:
    """Return the configuration keys that stand for a setting, of those the planner may choose."""
    layers, recomputed = setting.sizes.num_hidden_layers, len(setting.decoder)
    policy = "none" if recomputed == 0 else "all" if recomputed == layers else "auto"
    keys: dict[str, Any] = {
        "quant.experts": setting.quant.experts,
        "quant.tower": setting.quant.tower,
        "quant.embedding": setting.quant.embedding,
        "quant.stream": _stream(setting),
        "train.optimizer": setting.optimizer,
        "train.gradient_checkpointing": policy,
    }
    if setting.tower != "none":
        keys["data.cache_features"] = "on" if setting.tower == "cached" else "off"
    if setting.ranks > 1 and setting.tensor == 1:
        keys["parallel.engine"] = setting.engine
    return keys


def _stream(setting: Setting) -> str | int:
    """Return ``quant.stream`` for a setting: ``auto`` where the number of resident layers is the card's."""
    return "off" if setting.resident is None else "auto" if setting.resident else 0


def too_small(setting: Setting, card: Card, fixed: Collection[str]) -> PlanError:
    """Return the error for a run that does not fit, with the smallest card that would do."""
    needed, able = smallest_card(setting, fixed)
    have = format_size(card.usable)
    holders = tr(" (in use: {holders})", holders=", ".join(card.holders)) if card.holders else ""
    kept = tr(" with {fixed} as given", fixed=", ".join(sorted(fixed))) if fixed else ""
    hint = tr("the smallest setting{kept} needs a card of {needed:.1f} GiB", kept=kept, needed=needed / GIB)
    hint += tr(": {name} is the smallest known here", name=able.name) if able else tr("; no card known here has that")
    if setting.ranks == 1:
        hint += tr("; or divide the model over several: --cards 2")
    if setting.batch.rows > 1:
        hint += tr("; or lower train.batch_size")
    if fixed:
        hint += tr("; or leave some of these keys to the planner")
    return PlanError(
        tr(
            "nothing that may be chosen fits {ranks} x {name}: {have} of {memory} can be used{holders}",
            ranks=setting.ranks,
            name=card.name,
            have=have,
            memory=format_size(card.memory),
            holders=holders,
        ),
        hint=hint,
    )


_PLAIN = {
    "quant.experts": "none",
    "quant.tower": "none",
    "quant.embedding": "device",
    "quant.stream": "off",
    "train.optimizer": "adamw",
}
"""Default values, which the written configuration leaves out."""


def ready_config(config: RunConfig, plan: Plan, placeholders: Collection[str] = ()) -> dict[str, dict[str, Any]]:
    """Return the user's keys and the chosen ones, as nested sections for a YAML file."""
    values = {key: value for key, value in explicit_values(config).items() if key not in placeholders}
    values |= {key: value for key, value in plan.keys.items() if key in values or value != _PLAIN.get(key)}
    nested: dict[str, dict[str, Any]] = {}
    for key, value in values.items():
        if key not in known_keys():
            continue
        section, _, name = key.partition(".")
        nested.setdefault(section, {})[name] = value
    return nested
