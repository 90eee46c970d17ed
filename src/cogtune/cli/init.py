"""``cogtune init``: write a commented configuration for a data set and a card."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from cogtune.cli.command import Command, flag
from cogtune.cli.options import Arguments
from cogtune.cli.progress import progress_bar
from cogtune.errors import ConfigError, DataError, OutputFolderError, SetupError
from cogtune.language import tr
from cogtune.system.terminal import typed

if TYPE_CHECKING:
    from cogtune.configuration.run_config import RunConfig
    from cogtune.data.check import CheckReport
    from cogtune.plan.cards import Card
    from cogtune.plan.init_config import Proposal
    from cogtune.plan.plan import Plan

_ABOUT = """\
Look at a data set and at the card, and write a configuration with a reason for every value: epochs, rank, learning
rate, batch size and steps from the data, number formats and recomputation from the memory. No model is loaded.

Then: cogtune data check run.yaml, cogtune plan run.yaml, cogtune train run.yaml"""
_SHOWN = 3


@dataclass(frozen=True)
class _Flags:
    card: str | None = flag(None, "A size (24GiB), a name (RTX 4090), or auto: this machine's, if it has one.", "CARD")
    cards: int = flag(1, "How many such cards.", "N", least=1)
    output: Path = flag(Path("config.yaml"), "The file to write.", "FILE")
    force: bool = flag(False, "Replace the file if it is there.")


def _init(flags: _Flags, line: Arguments) -> None:
    target = flags.output
    if target.exists() and not flags.force:
        raise OutputFolderError(
            tr("{target}: exists already", target=target),
            hint=tr("name another with --output, or --force to replace it"),
        )
    config, used = _configuration(line)
    card, cards = _card(flags), flags.cards

    from cogtune.configuration.load import load_config
    from cogtune.data.check import check
    from cogtune.plan.init_config import propose, take_plan, to_yaml, with_room
    from cogtune.processing.token_file import find_token_file
    from cogtune.system import files
    from cogtune.system.file_errors import explained

    tokens = find_token_file(config.model.path, config.model.template, config.model.tokenizer)
    with progress_bar() as progress:
        report = check(with_room(config), config.train.seed, tokens, progress)
    _refuse_bad(report)
    proposal = propose(config, used, report, cards)
    if card is None:
        proposal.about.append(tr("No card was found: `cogtune plan` with this file and --card says what fits which."))
    else:
        take_plan(proposal, _planned(proposal, report, card, cards, tokens.num_image_tokens))
    text = to_yaml(proposal, "cogtune init")
    with explained(target):
        target.parent.mkdir(parents=True, exist_ok=True)
    with explained(target), files.growing(target) as growing:
        growing.write_text(text, encoding="utf-8")
        load_config(growing)  # what was written must be a valid configuration
    print(text)
    named = flags.card or ("24GiB" if card is None else None)  # without a card, `plan` asks for the name of one
    on = f" --card {typed(named)}" if named else ""
    on += f" --cards {cards}" if cards > 1 else ""
    print(
        tr("wrote {target}; next: cogtune plan {target}{on}, then cogtune train {target}", target=typed(target), on=on)
    )


def _configuration(line: Arguments) -> tuple[RunConfig, dict[str, str]]:
    """Return the configuration from flags, and the required keys that were filled in."""
    from cogtune.configuration.load import load_config_with
    from cogtune.configuration.run_config import PUBLISHED_MODEL

    overrides = dict(line.overrides)
    if line.config is not None:
        if Path(line.config).suffix.lower() in (".yaml", ".yml"):
            raise ConfigError(
                tr("{config}: a configuration already", config=line.config), hint=tr("`cogtune init` takes data")
            )
        given = overrides.pop("data", []) + overrides.pop("data.path", [])
        overrides["data"] = [line.config, *given]
    if not {"data", "data.path"} & overrides.keys():
        raise ConfigError(tr("no data is named"), hint="cogtune init DATA", code="config-missing")
    needed = {"model.path": PUBLISHED_MODEL, "train.output": "output"}
    return load_config_with(None, overrides, needed)


def _card(flags: _Flags) -> Card | None:
    """Return the card to plan for, or None."""
    from cogtune.plan.ask import choose_card

    try:
        return choose_card(flags.card or "auto", flags.cards)
    except SetupError:
        if flags.card is not None:
            raise
        return None


def _refuse_bad(report: CheckReport) -> None:
    if report.ok:
        return
    shown = "\n  ".join(
        tr("{where}: {what}", where=f.where, what=f.what) if f.where else f.what for f in report.errors[:_SHOWN]
    )
    count, code = len(report.errors), report.errors[0].code
    general = tr("`cogtune data check` lists them all; --data.on_bad skip leaves bad records out")
    raise DataError(
        tr(
            "training would stop: {count} problem{s} in the data, first:\n  {shown}",
            count=count,
            s="" if count == 1 else "s",
            shown=shown,
        ),
        hint=report.hints.get(code, general) if count == 1 else general,
        code=code,
    )


def _planned(proposal: Proposal, report: CheckReport, card: Card, cards: int, image_tokens: int) -> Plan:
    """Return the plan of the proposed configuration on these cards."""
    from cogtune.configuration.load import from_entries
    from cogtune.configuration.problems import Entry
    from cogtune.configuration.run_config import RunConfig
    from cogtune.plan.data_rows import summary
    from cogtune.plan.init_config import kept_share
    from cogtune.plan.plan import make_plan

    config = from_entries({key: Entry(value, key) for key, value in proposal.values.items()}, RunConfig)
    rows = summary(report.shapes, report.counts["train_pictures"], image_tokens)
    kept = kept_share(proposal, report)
    rows = replace(rows, count=round(kept * rows.count), pictures=round(kept * rows.pictures))
    return make_plan(config, card, rows, cards=cards)


COMMANDS = (
    Command(
        name="init",
        summary="Look at data and card and write a commented configuration.",
        about=_ABOUT,
        examples=(
            "cogtune init my-data --model cogvlm2 --output run.yaml",
            "cogtune init my-data --card 24GiB --lora.rank 8",
        ),
        run=_init,
        flags=_Flags,
        places=("[DATA]",),
        keys="run",
        keys_explained=False,
    ),
)
