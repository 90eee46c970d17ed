"""Shared by the commands about data: their configuration keys, and reading them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from cogtune.cli.options import Arguments

if TYPE_CHECKING:
    from cogtune.configuration.run_config import RunConfig

KEYS = ("model.path", "model.tokenizer", "model.template", "data.path", "data.", "train.seed")


def data_config(line: Arguments) -> tuple[RunConfig, str | None]:
    """Return the configuration of a data command, and the model if one is named.

    The positional argument can be data.
    """
    from cogtune.configuration.load import load_config_with

    path, overrides = line.config, dict(line.overrides)
    if path is not None and Path(path).suffix.lower() not in (".yaml", ".yml"):
        given = overrides.pop("data", []) + overrides.pop("data.path", [])
        overrides["data"] = [path, *given]
        path = None
    needed = {"model.path": "-", "train.output": "-"}
    config, used = load_config_with(path, overrides, needed)
    return config, None if "model.path" in used else config.model.path
