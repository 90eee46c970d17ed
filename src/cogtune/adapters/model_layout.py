"""Layouts of a merged model's folder: the published one, or the one that transformers' Auto classes read.

Weights are the same in both. In the published layout every other file is the base's, byte for byte. In transformers'
layout ``config.json`` names the model type instead of remote code, the code is left out, and the processor's files
stand beside it. Settings of the training that a configuration has (template, rope precision) are in it.
"""

from __future__ import annotations

from pathlib import Path

from cogtune.adapters.provenance import Provenance
from cogtune.checkpoint.model_files import load_model_config
from cogtune.errors import ConfigError
from cogtune.language import tr
from cogtune.processing.model_folder import (
    CHAT_TEMPLATE_NAME,
    PROCESSOR_NAME,
    TOKENIZER_FILES,
    find_tokenizer,
    write_config,
)
from cogtune.processing.processor import CogVLM2Processor
from cogtune.processing.sentencepiece_file import FILE_NAME as SENTENCEPIECE

PUBLISHED, TRANSFORMERS = "published", "transformers"
_OWN_FILES = ("config.json", CHAT_TEMPLATE_NAME, PROCESSOR_NAME)


def check_layout(layout: str) -> None:
    """Raise ConfigError for an unknown layout."""
    if layout not in (PUBLISHED, TRANSFORMERS):
        raise ConfigError(tr("layout is {layout}; it is published or transformers", layout=layout), code="config-value")


def is_copied(name: str, layout: str) -> bool:
    """Return whether the base's file of this name belongs into a merged folder."""
    return layout == PUBLISHED or not (name in _OWN_FILES or name.endswith(".py"))


def tokenizer_folder(base: Path, given: str | Path | None, provenance: Provenance | None) -> Path | None:
    """Return the folder of the tokenizer that a merged folder needs beside the base's files; None: the base's own.

    It is the ``given`` one, or for a base without one that of the training, if it is on this machine.

    Raises:
        CheckpointError: nothing is there.
    """
    if given is not None:
        return find_tokenizer(given)
    trained = None if provenance is None else provenance.settings.get("model.tokenizer")
    own = any((base / name).is_file() for name in (TOKENIZER_FILES[0], SENTENCEPIECE))
    return find_tokenizer(trained) if trained and not own and Path(trained).exists() else None


def write_model_files(base: Path, folder: Path, provenance: Provenance | None, tokenizer: Path | None = None) -> None:
    """Write configuration, tokenizer, chat template and processor in transformers' layout.

    Args:
        tokenizer: its folder, if it is not the base's own.

    Raises:
        CheckpointError: the base's files cannot be read.
    """
    settings = {} if provenance is None else provenance.settings
    config, processor = load_model_config(base), CogVLM2Processor.from_pretrained(base, tokenizer=tokenizer)
    template, precision = settings.get("model.template"), settings.get("model.rope_precision")
    if template is not None:
        config.template_version = processor.encoder.template = template
    if precision == "float32":  # the other value means: as the base says
        config.rope_precision = precision
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # a merged model's weights are plain numbers
    write_config(config, folder)
    processor.save_pretrained(folder)
