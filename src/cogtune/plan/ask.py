"""The public entry point: plan a configuration for given cards and return an object that prints as text."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from cogtune.configuration.resolve import as_stored
from cogtune.configuration.run_config import RunConfig
from cogtune.errors import ConfigError
from cogtune.language import tr
from cogtune.plan.cards import Card, find_card
from cogtune.plan.data_rows import TYPICAL, TYPICAL_CLIPS, read_rows
from cogtune.plan.local_cards import local_cards
from cogtune.plan.plan import Plan, make_plan
from cogtune.plan.report import lines
from cogtune.plan.sizes import ModelSizes
from cogtune.system.byte_sizes import parse_size


def plan(
    config: RunConfig,
    card: str = "auto",
    *,
    cards: int = 1,
    price: float | None = None,
    bus: str | None = None,
    placeholders: Collection[str] = (),
) -> Plan:
    """Predict what a run needs on a card, and choose the fastest settings that fit, before any weight is read.

    Keys that the configuration sets stay as they are. The planner chooses the others: number formats, feature cache,
    recomputed layers, optimiser and engine.

    Example:
        >>> plan = cogtune.plan(cogtune.load_config("run.yaml"), card="24GiB")
        >>> print(plan)
        >>> fitted = cogtune.load_config("run.yaml", plan.keys)

    Args:
        card: a size (``24GiB``), a name (``h100``, ``RTX 4090``), or ``auto``: this machine's cards with the memory
            that is free now. If they differ, the one with the least free memory counts.
        cards: number of such cards.
        price: price of a card per hour, in any currency.
        bus: bandwidth from host memory to the card, such as ``13GB/s``; None: the known card's.
        placeholders: keys of ``config`` that were filled in because their value is not known yet. If ``data.path`` is
            one of them, the plan assumes typical rows.

    Returns:
        The plan: ``memory`` (bytes, by phase), ``times`` (seconds), ``keys`` (the configuration keys chosen), ``text``.

    Raises:
        PlanError: nothing fits; the hint names the smallest card that would.
        ConfigError: unknown card, fewer than one card, or a bandwidth that is none.
        SetupError: ``auto`` on a machine without a GPU.
        DataError, CheckpointError, AdapterError: the data, the model or a LoRA target does not exist.
    """
    if cards < 1:
        raise ConfigError(tr("cards: found {cards}, expected at least 1", cards=cards), code="config-value")
    known = "data.path" not in placeholders
    config = as_stored(config, config.model.path)
    sizes = ModelSizes.from_folder(config.model.path)
    rows = read_rows(config, sizes) if known else TYPICAL if sizes.vision_experts else TYPICAL_CLIPS
    rate = None if bus is None else _bandwidth(bus)
    chosen = choose_card(card, cards)
    if rate is not None:
        chosen = replace(chosen, bus=rate)
    found = make_plan(config, chosen, rows, cards=cards, placeholders=placeholders, price=price)
    return replace(found, text="\n".join(lines(found)))


def _bandwidth(text: str) -> float:
    """Parse bytes per second, written as ``13GB/s``."""
    try:
        found = parse_size(text.removesuffix("/s"))
    except ValueError:
        found = 0
    if found <= 0:
        raise ConfigError(
            tr("--bus: found `{text}`, expected bytes per second such as 13GB/s", text=text),
            hint=tr("PCIe 4 with 16 lanes reaches about 24GB/s, with 8 lanes 13GB/s"),
            code="config-value",
        )
    return float(found)


def choose_card(name: str = "auto", count: int = 1) -> Card:
    """Return the card called ``name``. With ``auto``, take this machine's ``count`` cards with the most free memory,
    and return the one of them that has least.

    Raises:
        ConfigError: unknown card.
        SetupError: this machine has no GPU.
    """
    if name != "auto":
        return find_card(name)
    return sorted(local_cards(), key=lambda card: -card.usable)[:count][-1]
