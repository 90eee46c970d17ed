"""The configuration of a run. Every key's type, default, range and meaning are defined once, at its field.

The sections are in `configuration.input_sections` (model, data), `configuration.quantization` (quant) and
`configuration.training_sections` (all others).

A run is a `RunConfig`: sections of frozen, checked values. It comes from a YAML file, from ``--section.key value``
flags, or from both (`configuration.load.load_config`), or is made in Python; an unknown key, a wrong type, a value out
of range or a contradiction is an error before anything is loaded. `RunConfig.to_yaml` writes it with every key
resolved; a run saves that with its results.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import yaml
from pydantic import model_validator

from cogtune.configuration.input_sections import PUBLISHED_MODEL, DataSection, ModelSection
from cogtune.configuration.quantization import QuantSection
from cogtune.configuration.training_sections import (
    EvalSection,
    LogSection,
    LoraSection,
    ParallelSection,
    TrainSection,
)
from cogtune.configuration.values import DataFolder, DataFormat, Engine, Section
from cogtune.language import tr

__all__ = [
    "PUBLISHED_MODEL", "DataFolder", "DataFormat", "DataSection", "Engine", "EvalSection", "LogSection", "LoraSection",
    "ModelSection", "ParallelSection", "QuantSection", "RunConfig", "Section", "TrainSection",
]  # fmt: skip


class RunConfig(Section):
    """A whole run: sections of checked values that cannot change.

    Build it with `cogtune.load_config` from a file, flags' texts or dotted keys, or here from sections:

    Example:
        >>> config = cogtune.RunConfig(
        ...     model={"path": "cogvlm2"}, data={"path": "my-data"}, train={"output": "output", "lr": 3e-4}
        ... )
        >>> print(config.to_yaml())

    Attributes:
        model, data: the base model and what is trained on; ``model.path`` and ``data.path`` are required.
        lora, train, quant: adapter, loop and number formats; ``train.output`` is required.
        eval, parallel, log: validation, devices, and what is written while it runs.

    Raises:
        ConfigError: an unknown key, with the nearest known one; a wrong type or a value out of range; a contradiction.
    """

    model: ModelSection
    data: DataSection
    lora: LoraSection = LoraSection()
    train: TrainSection
    quant: QuantSection = QuantSection()
    eval: EvalSection = EvalSection()
    parallel: ParallelSection = ParallelSection()
    log: LogSection = LogSection()

    @model_validator(mode="after")
    def _check_contradictions(self) -> RunConfig:
        found = list(_contradictions(self))
        if found:
            raise ValueError("\n".join(found))
        return self

    def to_yaml(self) -> str:
        """Return a YAML file with every key; `load_config` of this text gives an equal configuration."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)


_OWN_LORA_FIELDS = {
    "r": "lora.rank",
    "lora_alpha": "lora.alpha",
    "lora_dropout": "lora.dropout",
    "target_modules": "lora.targets",
    "use_rslora": "lora.rslora",
    "use_dora": "lora.dora",
}


def _contradictions(config: RunConfig) -> Iterator[str]:
    """Yield pairs of values that contradict each other. Only changed values count, never defaults."""
    data, train = config.data, config.train
    validates = bool(data.validation) or data.validation_share > 0

    if data.validation and data.validation_share not in (0, _default(DataSection, "validation_share")):
        yield tr("data.validation and data.validation_share: both say where validation data comes from; keep one")
    if config.eval.patience is not None and not validates:
        yield tr("eval.patience needs validation data, but data.validation_share is 0 and data.validation is empty")
    if config.eval.steps is not None and not validates:
        yield tr("eval.steps needs validation data, but data.validation_share is 0 and data.validation is empty")
    if data.on_bad == "error" and data.max_bad_share != _default(DataSection, "max_bad_share"):
        yield tr("data.max_bad_share has a meaning only with data.on_bad: skip")
    for name in sorted(_OWN_LORA_FIELDS.keys() & config.lora.extra.keys()):
        yield tr(
            "lora.extra.{name}: this is {own_lora_fields}; set it there",
            name=name,
            own_lora_fields=_OWN_LORA_FIELDS[name],
        )
    if train.warmup_steps is not None and train.warmup_ratio != _default(TrainSection, "warmup_ratio"):
        yield tr("train.warmup_steps and train.warmup_ratio: both set the warm-up; keep one")
    if train.warmup_steps and train.max_steps and train.warmup_steps >= train.max_steps:
        yield tr(
            "train.warmup_steps {warmup_steps} leaves nothing of train.max_steps {max_steps}",
            warmup_steps=train.warmup_steps,
            max_steps=train.max_steps,
        )
    if train.activation_offloading and train.gradient_checkpointing == "none":
        yield tr("train.activation_offloading is about recomputed layers, but train.gradient_checkpointing is none")
    for name in ("betas", "eps"):
        if train.optimizer == "sgd" and getattr(train, name) != _default(TrainSection, name):
            yield tr("train.{name} belongs to adamw, but train.optimizer is sgd", name=name)
    if config.quant.fp8_layouts == "two" and config.quant.experts != "fp8":
        yield tr("quant.fp8_layouts is about fp8 experts, but quant.experts is {experts}", experts=config.quant.experts)
    if train.restart and train.resume is not None:
        yield tr("train.restart starts from nothing and train.resume from a checkpoint; keep one")
    if config.parallel.restarts and config.parallel.launch is None:
        yield tr("parallel.restarts needs parallel.launch: who starts the processes starts them again")
    if config.parallel.tensor > 1 and config.parallel.engine not in ("auto", "ddp"):
        yield (
            tr(
                "parallel.tensor {tensor} divides each layer, and its models share the rows by ddp, but"
                " parallel.engine is {engine}",
                tensor=config.parallel.tensor,
                engine=config.parallel.engine,
            )
        )
    if config.parallel.deepspeed is not None and config.parallel.engine in ("single", "ddp", "fsdp2"):
        yield tr(
            "parallel.deepspeed names a DeepSpeed file, but parallel.engine is {engine}", engine=config.parallel.engine
        )


def _default(section: type[Section], name: str) -> Any:
    return section.model_fields[name].default
