"""The records that a training kept for validation, read again for an evaluation."""

from __future__ import annotations

from pathlib import Path

from cogtune.adapters.adapter_folder import find_adapter
from cogtune.checkpoint.model_files import reading_rules
from cogtune.configuration.load import load_config
from cogtune.data.records import Example
from cogtune.data.split import read_and_split
from cogtune.errors import ConfigError, DataError
from cogtune.evaluate.run_folder import CONFIG_FILE
from cogtune.language import tr


def held_out(adapter: Path | None) -> tuple[list[Example], tuple[str, ...], str]:
    """Return the validation examples of an adapter's training, the paths of its data, and a note that says so.

    Raises:
        ConfigError: there is no adapter, or its training's folder is not around it.
        DataError: the training kept nothing, or its data cannot be read.
    """
    config_file = None if adapter is None else run_folder(adapter) / CONFIG_FILE
    if config_file is None or not config_file.is_file():
        raise ConfigError(tr("no data is named"), hint=tr("give --data DIR"), code="config-missing")
    config = load_config(config_file)
    split = read_and_split(config.data, config.train.seed, **reading_rules(config.model.path))
    if not split.validation:
        raise DataError(
            tr("{path}: the training kept no pictures for validation", path=config_file),
            hint=tr("give --data DIR with records that were not trained on"),
            code="data-split",
        )
    paths = tuple(str(entry.path) for entry in config.data.validation or config.data.path)
    note = tr(
        "no --data: the questions are about the {count} picture{s} that {folder} kept for validation",
        count=len(split.validation),
        s="" if len(split.validation) == 1 else "s",
        folder=config_file.parent,
    )
    return split.validation, paths, note


def run_folder(adapter: Path) -> Path:
    """Return the output folder of the training that an adapter or a checkpoint lies in."""
    folder = find_adapter(adapter)
    return folder if (folder / CONFIG_FILE).is_file() else folder.parent
