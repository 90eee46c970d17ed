"""``cogtune init``: a commented configuration for a data set and a card."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from cogtune.errors import ConfigError, DataError, OutputFolderError, SetupError
from cogtune.system import files

if TYPE_CHECKING:
    from collections.abc import Mapping

    from cogtune.cli.options import Arguments
    from cogtune.configuration.run_config import RunConfig
    from cogtune.data.check import CheckReport
    from cogtune.plan.cards import Card
    from cogtune.plan.init_config import Proposal
    from cogtune.plan.plan import Plan

_USAGE = "usage: cogtune init DATA [--model BASE] [--card CARD] [--output FILE.yaml] [--section.key value ...]"
_ABOUT = """\
Look at a data set and at the card, and write a configuration with the reason beside every value: epochs, rank, rate,
batch and steps for this much data, number formats and recomputation for this much memory. Nothing is loaded.

  cogtune init my-data --model cogvlm2 --output run.yaml
  cogtune init my-data --card 24GiB --lora.rank 8

Then: cogtune data check run.yaml, cogtune plan run.yaml, cogtune train run.yaml"""
_FLAGS = {
    "--card CARD": "A size (24GiB), a name (RTX 4090), or auto: this machine's, if it has one.",
    "--cards N": "How many such cards.",
    "--output FILE": "The file to write. Default: config.yaml.",
    "--force": "Replace the file if it is there.",
    "--help, -h": "This text.",
}
_VALUES = ("card", "cards", "output")
_SHOWN = 3


def register(app: typer.Typer) -> None:
    """Add the command. Its flags are configuration keys, so they are split by `cogtune.cli.options`."""
    app.command(
        "init",
        help="Look at data and card and write a commented configuration.",
        add_help_option=False,
        context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
    )(_init)


def _init(ctx: typer.Context) -> None:
    from cogtune.cli.data_check import progress_bar
    from cogtune.cli.options import flags_help, split_arguments

    if {"--help", "-h"} & set(ctx.args):
        print("\n".join([_USAGE, "", _ABOUT, "", "Flags of this invocation:", *flags_help(_FLAGS)]))
        print("\nConfiguration keys: as for `cogtune train --help`; what is given stays")
        return
    arguments = split_arguments(ctx.args, switches=["force"], values=_VALUES)
    target = Path(arguments.values.get("output", "config.yaml"))
    if target.exists() and "force" not in arguments.switches:
        raise OutputFolderError(
            f"{target}: exists already", hint="name another with --output, or --force to replace it"
        )
    config, used = _configuration(arguments)
    card, cards = _card(arguments.values)

    from cogtune.configuration.load import load_config
    from cogtune.data.check import check
    from cogtune.plan.init_config import propose, take_plan, to_yaml, with_room
    from cogtune.processing.token_file import find_token_file

    tokens = find_token_file(config.model.path, config.model.template)
    with progress_bar() as progress:
        report = check(with_room(config), config.train.seed, tokens, progress)
    _refuse_bad(report)
    proposal = propose(config, used, report, cards)
    if card is None:
        proposal.about.append("No card was found: `cogtune plan` with this file and --card says what fits which.")
    else:
        take_plan(proposal, _planned(proposal, report, card, cards, tokens.num_image_tokens))
    text = to_yaml(proposal, "cogtune init")
    target.parent.mkdir(parents=True, exist_ok=True)
    with files.growing(target) as growing:
        growing.write_text(text, encoding="utf-8")
        load_config(growing)  # what was written has to be a configuration
    print(text)
    print(f"wrote {target}; next: cogtune plan {target}, then cogtune train {target}")


def _configuration(arguments: Arguments) -> tuple[RunConfig, dict[str, str]]:
    """The configuration that flags give, and the required keys that were filled in."""
    from cogtune.configuration.load import load_config_with
    from cogtune.configuration.run_config import PUBLISHED_MODEL

    overrides = dict(arguments.overrides)
    if arguments.config is not None:
        if Path(arguments.config).suffix.lower() in (".yaml", ".yml"):
            raise ConfigError(f"{arguments.config}: a configuration already", hint="`cogtune init` takes data")
        given = overrides.pop("data", []) + overrides.pop("data.path", [])
        overrides["data"] = [arguments.config, *given]
    if not {"data", "data.path"} & overrides.keys():
        raise ConfigError("no data is named", hint="cogtune init DATA", code="config-missing")
    needed = {"model.path": PUBLISHED_MODEL, "train.output": "output"}
    return load_config_with(None, overrides, needed)


def _card(values: Mapping[str, str]) -> tuple[Card | None, int]:
    """The card to plan for, if there is one, and how many."""
    from cogtune.plan.cards import find_card
    from cogtune.plan.local_cards import local_cards

    text = values.get("cards", "1")
    if not text.isdigit() or not int(text):
        raise ConfigError(f"--cards: found `{text}`, expected a whole number", code="config-value")
    count = int(text)
    name = values.get("card", "auto")
    if name != "auto":
        return find_card(name), count
    try:
        return sorted(local_cards(), key=lambda card: -card.usable)[:count][-1], count
    except SetupError:
        if "card" in values:
            raise
        return None, count


def _refuse_bad(report: CheckReport) -> None:
    if report.ok:
        return
    shown = "\n  ".join(f"{f.where}: {f.what}" if f.where else f.what for f in report.errors[:_SHOWN])
    count = len(report.errors)
    raise DataError(
        f"training would stop: {count} {'problem' if count == 1 else 'problems'} in the data, first:\n  {shown}",
        hint="`cogtune data check` lists them all; --data.on_bad skip leaves bad records out",
        code=report.errors[0].code,
    )


def _planned(proposal: Proposal, report: CheckReport, card: Card, cards: int, image_tokens: int) -> Plan:
    """The plan of the proposed configuration on these cards."""
    from cogtune.configuration.load import from_entries
    from cogtune.configuration.problems import Entry
    from cogtune.configuration.run_config import RunConfig
    from cogtune.plan.data_rows import summary
    from cogtune.plan.plan import make_plan

    config = from_entries({key: Entry(value, key) for key, value in proposal.values.items()}, RunConfig)
    rows = summary(report.shapes, report.counts["train_pictures"], image_tokens)
    return make_plan(config, card, rows, cards=cards)
