"""``cogtune plan``: predict memory, time and disk of a run before anything is loaded."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cogtune.cli.command import Command, flag
from cogtune.cli.options import Arguments
from cogtune.errors import ConfigError, OutputFolderError
from cogtune.language import tr

if TYPE_CHECKING:
    from collections.abc import Mapping

    from cogtune.configuration.run_config import RunConfig
    from cogtune.plan.plan import Plan

_ABOUT = """\
Predict memory, time and disk of a run, and choose settings that fit the given cards. No weight is read.

Keys that are given stay as they are; of the others, number formats, feature cache, recomputed layers, optimiser and
engine are chosen: the fastest that fits. Without --data, example rows are planned for.

Exit code 2: nothing fits, and the message names the smallest card that would."""


@dataclass(frozen=True)
class _Flags:
    card: str = flag(
        "auto", "A size (24GiB), a name (h100, RTX 4090), or auto: this machine's, with what is free on it now.", "CARD"
    )
    cards: int = flag(1, "How many such cards.", "N", least=1)
    price: str | None = flag(None, "Money per card and hour; prints what the run costs.", "X")
    bus: str | None = flag(
        None, "Bandwidth from host memory to the card, for streamed layers (13GB/s). Default: the known card's.", "RATE"
    )
    write: Path | None = flag(None, "Write a configuration with the chosen keys.", "FILE")
    targets: bool = flag(False, "List the linear layers and named sets that lora.targets may name, and stop.")
    json: bool = flag(False, "Print the plan as JSON; sizes in bytes, times in seconds.")


def _plan(flags: _Flags, line: Arguments) -> None:
    config, placeholders = _configuration(line.config, line.overrides)
    if flags.targets:
        print("\n".join(_targets(config)))
        return
    if flags.write is not None:
        _require_own(flags.write)
    from cogtune.plan.ask import plan

    found = plan(
        config,
        flags.card,
        cards=flags.cards,
        price=None if flags.price is None else _per_hour(flags.price),
        bus=flags.bus,
        placeholders=placeholders.keys(),
    )
    print(json.dumps(found.to_dict(), indent=1) if flags.json else found.text)
    if flags.write is not None:
        _write(flags.write, config, found, placeholders)


def _configuration(path: str | None, overrides: Mapping[str, Any]) -> tuple[RunConfig, dict[str, str]]:
    """Return the configuration, and the required keys that were filled in for planning."""
    from cogtune.configuration.load import load_config_with
    from cogtune.configuration.run_config import PUBLISHED_MODEL

    needed = {"model.path": PUBLISHED_MODEL, "data.path": "data", "train.output": "output"}
    config, used = load_config_with(path, overrides, needed)
    if "model.path" in used and config.lora.start_from is not None:
        base = _base_of(config.lora.start_from)
        if base is not None:
            print(tr("the base of {start_from}: {base}", start_from=config.lora.start_from, base=base), file=sys.stderr)
            config, used = load_config_with(path, overrides, needed | {"model.path": base})
    return config, used


def _base_of(adapter: Path) -> str | None:
    """Return the base that an adapter's ``cogtune.json`` names, if it can be planned for from here."""
    from cogtune.adapters.provenance import read_provenance

    found = read_provenance(adapter.expanduser())
    if found is None:
        return None
    path = found.base.get("path")
    return path if path is not None and Path(path).is_dir() else found.base.get("hub")


def _per_hour(text: str) -> float:
    """Parse a price, which can be written as ``2.5/h``."""
    try:
        value = float(text.split("/", 1)[0])
    except ValueError:
        value = -1.0
    if value < 0:
        raise ConfigError(tr("--price: found `{text}`, expected a number >= 0", text=text), code="config-value")
    return value


def _targets(config: RunConfig) -> list[str]:
    from cogtune.adapters.targets import TARGET_SETS
    from cogtune.plan.sizes import ModelSizes

    names = [linear.name for linear in ModelSizes.from_folder(config.model.path).linears]
    sets = [f"{name}: {', '.join(suffixes)}" for name, suffixes in TARGET_SETS.items()]
    return [tr("named sets:"), *(f"  {line}" for line in sets), tr("linear layers:"), *(f"  {name}" for name in names)]


_MADE = "# Made by `cogtune plan`"


def _require_own(file: Path) -> None:
    """Refuse to overwrite anything but a file that ``--write`` wrote."""
    try:
        own = not file.is_file() or file.read_bytes()[: len(_MADE)] == _MADE.encode()
    except OSError:
        own = True  # the error when it is written says more
    if not own:
        raise OutputFolderError(
            tr("{file}: exists, and `cogtune plan` did not write it", file=file), hint=tr("name another with --write")
        )


def _write(file: Path, config: RunConfig, plan: Plan, placeholders: Mapping[str, str]) -> None:
    import yaml

    from cogtune.plan.plan import ready_config
    from cogtune.system import files
    from cogtune.system.byte_sizes import format_size
    from cogtune.system.file_errors import explained

    nested = ready_config(config, plan, placeholders)
    about = tr(
        "{ranks} x {name}: {driver} planned",
        ranks=plan.setting.ranks,
        name=plan.card.name,
        driver=format_size(plan.memory.driver),
    )
    text = yaml.safe_dump(nested, sort_keys=False, allow_unicode=True, width=120)
    with explained(file):
        files.write_text(file, tr("{made} for {about}.\n{text}", made=_MADE, about=about, text=text))
    print(tr("wrote {file}", file=file))


COMMANDS = (
    Command(
        name="plan",
        summary="Predict memory, time and disk, and choose what fits, before anything is loaded.",
        about=_ABOUT,
        examples=(
            "cogtune plan --card 24GiB",
            "cogtune plan run.yaml --card auto --write fitted.yaml",
            "cogtune plan --model BASE --data DIR --card h100 --cards 8 --price 2.5",
        ),
        run=_plan,
        flags=_Flags,
        places=("[CONFIG.yaml]",),
        keys="run",
        keys_explained=False,
        needs_model=False,
    ),
)
