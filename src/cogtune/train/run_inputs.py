"""Inputs that a run reads before any weight: base configuration, tokenizer, data. CPU only, the same on every rank."""

from __future__ import annotations

import importlib.metadata
import platform
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from cogtune.adapters.adapter_folder import adapter_shapes
from cogtune.adapters.attach import check_continued
from cogtune.adapters.targets import adapted_modules, check_reached
from cogtune.checkpoint.fingerprint import adapter_fingerprint, model_fingerprint
from cogtune.checkpoint.model_files import check_folder, load_model_config, reading_rules
from cogtune.configuration.identity import identity
from cogtune.configuration.run_config import RunConfig
from cogtune.data.dataset import TrainRows
from cogtune.data.split import DataSplit, read_and_split
from cogtune.data.statistics import Histogram
from cogtune.language import tr
from cogtune.model.modeling import CogVLM2ForCausalLM
from cogtune.model.tensor_parallel import check_sizes
from cogtune.processing.model_folder import tokenizer_digest
from cogtune.processing.processor import CogVLM2Processor
from cogtune.train.answers import AnswerCheck, check_metric
from cogtune.train.log import log
from cogtune.train.run_record import RunIdentity

_OTHER_PARTS = (
    "modules_to_save",
    "trainable_token_indices",
    "target_parameters",
)  # peft's options that train more than the targets
_LIBRARIES = ("torch", "transformers", "peft", "accelerate", "safetensors", "tokenizers", "numpy", "deepspeed")


@dataclass(frozen=True)
class Inputs:
    """Rows to train on and, if there are any, to validate on (by the name of their set; "" is the only one), with the
    questions that are answered; and the identity by which a later start recognises the run."""

    split: DataSplit
    rows: TrainRows
    validation: dict[str, TrainRows]
    identity: RunIdentity
    answers: AnswerCheck | None = None

    def data_json(self) -> dict[str, Any]:
        """Return the content of ``data.json``."""
        held = {name: rows.report.to_dict() for name, rows in self.validation.items()}
        lengths = {name: _histogram(rows) for name, rows in self.validation.items()}
        rows = {
            "train_rows": self.rows.report.to_dict(),
            "validation_rows": held.get("", held) or None,
            "row_lengths": {"train": _histogram(self.rows), "validation": lengths.get("", lengths) or None},
        }
        return {**self.split.to_dict(), **rows}

    def counts(self) -> dict[str, int]:
        """Return the amount of training data, for the adapter folder."""
        report = self.split.report
        return {
            "pictures": report.pictures,
            "conversations": report.conversations,
            "questions": report.turns,
            "train_records": len(self.split.train),
            "validation_records": len(self.split.validation),
        }

    def lines(self) -> list[str]:
        """Return the data report for the console."""
        lines = [tr("data: {line}", line=line) for line in self.split.report.lines()]
        lines += [tr("training: {line}", line=line) for line in self.rows.report.lines()]
        if not self.validation:
            return [*lines, tr("validation: none")]
        for name, held in self.validation.items():
            for line in held.report.lines():
                told = (
                    tr("validation {name}: {line}", name=name, line=line)
                    if name
                    else tr("validation: {line}", line=line)
                )
                lines.append(told)
        if self.answers is not None:
            names = tr(", ").join(self.answers.metrics)
            count = len(self.answers.asked.questions)
            lines.append(
                tr("answers: {count} validation questions at each validation ({names})", count=count, names=names)
            )
            lines += self.answers.notes
        return lines


def _histogram(rows: TrainRows) -> dict[str, Any]:
    """How many rows have how many tokens."""
    found = Histogram()
    for length in rows.lengths:
        found.add(length)
    return found.to_dict()


def read_inputs(config: RunConfig) -> Inputs:
    """Check the base folder and the adapter's targets, read and split the data, and build its rows.

    Raises:
        CheckpointError, AdapterError, DataError, ConfigError: one of them is invalid; no weight has been read.
    """
    base = Path(config.model.path)
    model_config = load_model_config(config.model.path)
    if base.is_dir():
        check_folder(base)
    if config.parallel.tensor > 1:
        check_sizes(model_config, config.parallel.tensor)
    if config.lora.start_from is None:
        with torch.device("meta"):
            adapted = adapted_modules(CogVLM2ForCausalLM(model_config), config.lora.targets)
    else:
        check_continued(config.lora.start_from, config.lora)
        adapted = [name.split(".lora_")[0] for name in adapter_shapes(config.lora.start_from)]
    processor = CogVLM2Processor.from_pretrained(config.model.path, tokenizer=config.model.tokenizer)
    encoder = processor.encoder
    if config.model.template is not None:
        encoder.template = config.model.template
    split = read_and_split(config.data, config.train.seed, **reading_rules(config.model.path))
    more_trains = any(config.lora.extra.get(key) for key in _OTHER_PARTS)
    if split.train and not any(example.images for example in split.train) and not more_trains:
        check_reached(adapted)

    def rows(examples: list[Any], required: bool) -> TrainRows:
        return TrainRows(
            examples, encoder, config.data, processor.image_size, seed=config.train.seed, required=required
        )

    validation = {name: rows(examples, False) for name, examples in split.sets.items() if examples}
    for name in [name for name, held in validation.items() if len(held) == 0]:
        empty = tr("validation is empty: none of its answers fits data.max_input_len and data.max_output_len")
        log.warning(tr("validation {name}: {line}", name=name, line=empty) if name else empty)
        del validation[name]
    check_metric(config, validation)
    answers = AnswerCheck(validation, processor, config) if validation and config.eval.generate else None
    return Inputs(split, rows(split.train, True), validation, _identity(config, base, split), answers)


def _identity(config: RunConfig, base: Path, data: DataSplit) -> RunIdentity:
    """Return what must stay the same for a run to resume in its folder. Base and data may move meanwhile."""
    fingerprints = {
        "model.path": model_fingerprint(base),
        "data.path": data.report.fingerprint,
        "data.validation": " ".join(
            f"{name}={report.fingerprint}" if name else report.fingerprint
            for name, report in data.validation_reports.items()
        ),
        "lora.start_from": adapter_fingerprint(config.lora.start_from) if config.lora.start_from is not None else "",
    }
    if config.model.tokenizer is not None:
        fingerprints["model.tokenizer"] = tokenizer_digest(config.model.tokenizer)
    return RunIdentity(identity(config), fingerprints)


@cache
def _library_versions() -> dict[str, str | None]:
    """Return each library's version, or None if it is not installed; reading them takes a tenth of a second."""
    found: dict[str, str | None] = {}
    for name in _LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def versions(device: torch.device) -> dict[str, Any]:
    """Return the content of ``versions.json``."""
    import cogtune

    found: dict[str, Any] = {"cogtune": cogtune.__version__, "python": platform.python_version()}
    found |= _library_versions()
    cuda = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {**found, "cuda": torch.version.cuda, "device": cuda or platform.machine(), "system": platform.platform()}
