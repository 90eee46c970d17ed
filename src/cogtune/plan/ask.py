"""The plan that a user asks for: of a configuration, on cards that are named, as an object with its text."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from cogtune.configuration.run_config import RunConfig
from cogtune.errors import ConfigError
from cogtune.plan.cards import Card, find_card
from cogtune.plan.data_rows import TYPICAL, read_rows
from cogtune.plan.local_cards import local_cards
from cogtune.plan.plan import Plan, make_plan
from cogtune.plan.report import lines
from cogtune.plan.sizes import ModelSizes


def plan(
    config: RunConfig,
    card: str = "auto",
    *,
    cards: int = 1,
    price: float | None = None,
    placeholders: Collection[str] = (),
) -> Plan:
    """Say what a run takes on a card, and choose what fits it, before any weight is read.

    Keys that the configuration gives stay as they are; of the others, number formats, feature cache, recomputed layers,
    optimiser and engine are chosen: the fastest that fits.

    Example:
        >>> plan = cogtune.plan(cogtune.load_config("run.yaml"), card="24GiB")
        >>> print(plan)
        >>> fitted = cogtune.load_config("run.yaml", plan.keys)

    Args:
        card: a size (``24GiB``), a name (``h100``, ``RTX 4090``), or ``auto``: this machine's, with what is free on it
            now; of several the one with the least.
        cards: how many such cards.
        price: money per card and hour.
        placeholders: keys of ``config`` that stand for what is not known yet; without ``data.path`` the rows are an
            example's.

    Returns:
        The plan: ``memory`` (bytes, by phase), ``times`` (seconds), ``keys`` (the configuration keys chosen), ``text``.

    Raises:
        PlanError: nothing fits; the hint names the smallest card that would.
        ConfigError: an unknown card, or fewer than one.
        SetupError: ``auto`` on a machine without a card.
        DataError, CheckpointError, AdapterError: data, model or targets that are not there.
    """
    if cards < 1:
        raise ConfigError(f"cards: found {cards}, expected at least 1", code="config-value")
    known = "data.path" not in placeholders
    rows = read_rows(config, ModelSizes.from_folder(config.model.path)) if known else TYPICAL
    found = make_plan(config, choose_card(card, cards), rows, cards=cards, placeholders=placeholders, price=price)
    return replace(found, text="\n".join(lines(found)))


def choose_card(name: str = "auto", count: int = 1) -> Card:
    """The card called ``name``; ``auto``: of this machine's ``count`` freest the one with the least free memory.

    Raises:
        ConfigError: an unknown card.
        SetupError: there is none here.
    """
    if name != "auto":
        return find_card(name)
    return sorted(local_cards(), key=lambda card: -card.usable)[:count][-1]
