"""``cogtune plan``: memory, time and disk of a run, before anything is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from cogtune.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from cogtune.configuration.run_config import RunConfig
    from cogtune.plan.cards import Card
    from cogtune.plan.plan import Plan

_USAGE = "usage: cogtune plan [CONFIG.yaml] [--section.key value ...] [--card CARD] [--cards N] [--price X] [--json]"
_ABOUT = """\
Say what a run would take, choose what fits the given cards, and how long it would last. No weight is read.

Keys that are given stay as they are; of the others, number formats, feature cache, recomputed layers, optimiser and
engine are chosen: the fastest that fits. Without --data the rows are an example's.

  cogtune plan --card 24GiB
  cogtune plan run.yaml --card auto --write fitted.yaml
  cogtune plan --model BASE --data DIR --card h100 --cards 8 --price 2.5

Exit code 2: nothing fits, and the message names the smallest card that would."""
_FLAGS = {
    "--config FILE": "The configuration file, as the first argument.",
    "--card CARD": "A size (24GiB), a name (h100, RTX 4090), or auto: this machine's, with what is free on it now.",
    "--cards N": "How many such cards.",
    "--hosts N": "Over how many machines they are spread, with 400 Gbit/s between them.",
    "--price X": "Money per card and hour; prints what the run costs.",
    "--write FILE": "Write a configuration with the chosen keys.",
    "--targets": "List the linear layers and named sets that lora.targets may name, and stop.",
    "--json": "Print the plan as JSON; sizes in bytes, times in seconds.",
    "--help, -h": "This text.",
}
_VALUES = ("card", "cards", "hosts", "price", "write")


def register(app: typer.Typer) -> None:
    """Add the command. Its flags are configuration keys, so they are split by `cogtune.cli.options`."""
    app.command(
        "plan",
        help="Say what a run takes and choose what fits, before anything is loaded.",
        add_help_option=False,
        context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
    )(_plan)


def _plan(ctx: typer.Context) -> None:
    from cogtune.cli.options import split_arguments

    if {"--help", "-h"} & set(ctx.args):
        from cogtune.cli.options import flags_help

        print("\n".join([_USAGE, "", _ABOUT, "", "Flags of this invocation:", *flags_help(_FLAGS)]))
        print("\nConfiguration keys: as for `cogtune train --help`")
        return
    arguments = split_arguments(ctx.args, switches=["json", "targets"], values=_VALUES)
    config, placeholders = _configuration(arguments.config, arguments.overrides)
    if "targets" in arguments.switches:
        print("\n".join(_targets(config)))
        return
    card, count = _cards(arguments.values)
    hosts = int(_number(arguments.values, "hosts") or 1)
    if count % hosts:
        raise ConfigError(f"--cards {count} cannot be spread evenly over --hosts {hosts}", code="config-value")
    plan = _made(config, placeholders, card, (count, hosts), _number(arguments.values, "price"))
    if "json" in arguments.switches:
        print(json.dumps(plan.to_dict(), indent=1))
    else:
        from cogtune.plan.report import lines

        print("\n".join(lines(plan)))
    if "write" in arguments.values:
        _write(Path(arguments.values["write"]), config, plan, placeholders)


def _configuration(path: str | None, overrides: Mapping[str, Any]) -> tuple[RunConfig, dict[str, str]]:
    """The configuration, and the required keys that were missing and filled in for planning."""
    from cogtune.configuration.load import load_config_with
    from cogtune.configuration.run_config import PUBLISHED_MODEL

    needed = {"model.path": PUBLISHED_MODEL, "data.path": "data", "train.output": "output"}
    return load_config_with(path, overrides, needed)


def _made(
    config: RunConfig, placeholders: Mapping[str, str], card: Card, spread: tuple[int, int], price: float | None
) -> Plan:
    from cogtune.plan.data_rows import TYPICAL, read_rows
    from cogtune.plan.plan import make_plan
    from cogtune.plan.sizes import ModelSizes

    given = "data.path" not in placeholders
    rows = read_rows(config, ModelSizes.from_folder(config.model.path)) if given else TYPICAL
    return make_plan(
        config, card, rows, cards=spread[0], hosts=spread[1], placeholders=placeholders.keys(), price=price
    )


def _cards(values: Mapping[str, str]) -> tuple[Card, int]:
    """The card to plan for and how many. ``auto``: the one with the least free memory of this machine's."""
    from cogtune.plan.cards import find_card
    from cogtune.plan.local_cards import local_cards

    count = _number(values, "cards")
    name = values.get("card", "auto")
    if name != "auto":
        return find_card(name), int(count or 1)
    cards = local_cards()
    chosen = sorted(cards, key=lambda card: -card.usable)[: int(count or 1)]
    return chosen[-1], int(count or 1)


def _number(values: Mapping[str, str], flag: str) -> float | None:
    text = values.get(flag)
    if text is None:
        return None
    try:
        value = float(text.split("/", 1)[0])
    except ValueError:
        value = -1.0
    whole = flag not in ("cards", "hosts") or (value >= 1 and value == int(value))
    if value < 0 or not whole:
        raise ConfigError(f"--{flag}: found `{text}`, expected a number", code="config-value")
    return value


def _targets(config: RunConfig) -> list[str]:
    from cogtune.adapters.targets import TARGET_SETS
    from cogtune.plan.sizes import ModelSizes

    names = [linear.name for linear in ModelSizes.from_folder(config.model.path).linears]
    sets = [f"{name}: {', '.join(suffixes)}" for name, suffixes in TARGET_SETS.items()]
    return ["named sets:", *(f"  {line}" for line in sets), "linear layers:", *(f"  {name}" for name in names)]


def _write(file: Path, config: RunConfig, plan: Plan, placeholders: Mapping[str, str]) -> None:
    import yaml

    from cogtune.plan.plan import ready_config
    from cogtune.system import files
    from cogtune.system.byte_sizes import format_size

    nested = ready_config(config, plan, placeholders)
    about = f"{plan.setting.ranks} x {plan.card.name}: {format_size(plan.memory.driver)} planned"
    text = yaml.safe_dump(nested, sort_keys=False, allow_unicode=True, width=120)
    files.write_text(file, f"# Made by `cogtune plan` for {about}.\n{text}")
    print(f"wrote {file}")
