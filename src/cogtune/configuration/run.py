"""Every key of a run: its type, default, allowed range and meaning, written once, at the field.

A run is a `RunConfig`: sections of frozen, checked values. It comes from a YAML file, from ``--section.key value``
flags, or from both (`load_config`); an unknown key, a wrong type, a value out of range or a contradiction is an error
before anything is loaded. `RunConfig.to_yaml` writes it back, every key resolved, beside the results.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from cogtune.configuration.sizes import parse_size

DataFormat = Literal["auto", "folder", "jsonl", "llava", "sharegpt", "openai", "coco", "vqa", "csv", "parquet", "hf"]
Engine = Literal["auto", "single", "ddp", "zero1", "zero2", "zero3", "fsdp2"]


class Section(BaseModel):
    """Base of all sections: values cannot change after the checks, and unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


def _one_or_many(value: object) -> object:
    """A single item stands for a list of one, so that ``path: folder`` needs no brackets."""
    return [value] if isinstance(value, str | Path | Mapping | BaseModel) else value


def _as_folder(value: object) -> object:
    return {"path": str(value)} if isinstance(value, str | Path) else value


def _no_repeats(items: tuple[Any, ...]) -> tuple[Any, ...]:
    repeated = sorted({str(item) for item in items if items.count(item) > 1})
    if repeated:
        raise ValueError(f"listed twice: {', '.join(repeated)}")
    return items


class DataFolder(Section):
    """One source of training data: a folder or a file in one of the formats of ``data.format``."""

    path: Path = Field(description="Folder with images/ and labels/, or a file in a known format.")
    weight: float = Field(
        default=1.0, gt=0, allow_inf_nan=False, description="How often an epoch shows each of its records."
    )


Text = Annotated[str, Field(min_length=1)]
Names = Annotated[tuple[Text, ...], BeforeValidator(_one_or_many), AfterValidator(_no_repeats)]
Paths = Annotated[tuple[Path, ...], BeforeValidator(_one_or_many), AfterValidator(_no_repeats)]
Folders = Annotated[tuple[Annotated[DataFolder, BeforeValidator(_as_folder)], ...], BeforeValidator(_one_or_many)]
Share = Annotated[float, Field(ge=0, lt=1)]
Beta = Annotated[float, Field(ge=0, lt=1)]


@dataclass(frozen=True)
class Shown:
    """In a field's annotation: the type as help and messages show it, where its parts would not say it."""

    text: str


def _recompute(value: object) -> object:
    """A policy in its one spelling: none, all, auto, a whole number, or a size as it was written."""
    if isinstance(value, bool) or value in ("true", "false"):
        return "all" if value in (True, "true") else "none"
    if isinstance(value, str) and value not in ("auto", "none", "all"):
        if not value.strip().isdigit():
            parse_size(value)
            return value.strip()
        value = int(value)
    if isinstance(value, int) and value < 1:
        raise ValueError(f"every {value}-th layer means nothing; 1 is every layer, none is no layer")
    return value


def _switch(value: object) -> object:
    """YAML reads a bare ``on`` and ``off`` as true and false."""
    return (
        {True: "on", False: "off", "true": "on", "false": "off"}.get(value, value)
        if isinstance(value, bool | str)
        else value
    )


def _budget(value: object) -> object:
    """A size, or a percentage of the disk, as it was written."""
    if isinstance(value, str):
        percentage = value.strip().removesuffix("%")
        if percentage == value.strip():
            parse_size(value)
        elif not percentage.strip().replace(".", "", 1).isdigit() or not 0 < float(percentage) <= 100:
            raise ValueError(f"`{value}` is no share of the disk; write one from 1% to 100%, or a size such as 500GB")
        return value.strip()
    return value


Switch = Annotated[bool | Literal["auto", "on", "off"], BeforeValidator(_switch), Shown("auto | on | off")]
Budget = Annotated[str, BeforeValidator(_budget), Shown("size | percentage")]
Recompute = Annotated[bool | int | str, BeforeValidator(_recompute), Shown("auto | none | all | every k-th | size")]

PUBLISHED_MODEL = "THUDM/cogvlm2-llama3-chat-19B"
"""The published checkpoint's name on the hub, as its own commands use it."""


class ModelSection(Section):
    """The base model."""

    path: Text = Field(description="Folder of the base model in the published layout, or its name on the hub.")
    template: Literal["chat", "vqa", "base"] | None = Field(
        default=None, description="How a question is worded for the model. null: as the checkpoint says (chat)."
    )
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        default="auto",
        description="Number format of the frozen weights and of the computation. auto: bfloat16 on a GPU, float32 on a"
        " CPU. LoRA weights are float32 always.",
    )
    rope_precision: Literal["checkpoint", "float32"] = Field(
        default="checkpoint",
        description="Rotary positions computed as the published code does, in the checkpoint's number format, or in"
        " float32.",
    )


class DataSection(Section):
    """What is trained on, and how a record becomes tokens."""

    path: Folders = Field(
        min_length=1,
        description="Training data: folders or files; several by a list or by repeating the flag; each may be"
        " {path: ..., weight: ...}.",
    )
    format: DataFormat = Field(
        default="auto",
        description="What the data is written in. auto: told from the files. folder: images/ and labels/; jsonl: the"
        " same records one a line; the others are the formats of these names.",
    )
    split: Text | None = Field(
        default=None,
        description="Which split of a Hugging Face data set to read. null: train, or the only one there is.",
    )
    image_root: Paths = Field(
        default=(),
        description="Folders that picture paths are relative to, tried in order; pictures outside of them are refused."
        " Empty: the folder of the file that names the picture.",
    )
    extract_dir: Path | None = Field(
        default=None,
        description="Where pictures that come inside a file (Parquet, data: URLs) are written, once for all runs. null:"
        " cogtune/pictures in $XDG_CACHE_HOME, else in ~/.cache.",
    )
    system: Literal["error", "prepend"] = Field(
        default="error",
        description="What to do with a system message, which the model's prompt has no place for. prepend: put it"
        " before the conversation's first question.",
    )
    exif: Literal["ignore", "apply"] = Field(
        default="ignore",
        description="The orientation a camera noted in a picture. ignore: as the published code does. apply: turn the"
        " picture as a viewer would.",
    )
    labels: Literal["auto", "labels", "labels_en", "labels_zh"] = Field(
        default="auto", description="Which label folder to read. auto: the only one there is."
    )
    validation: Paths = Field(
        default=(), description="Folders or files for validation, instead of a share of the data."
    )
    validation_share: Share = Field(
        default=0.05,
        description="Share of the pictures kept for validation, chosen by a seeded hash of the picture's key. 0: none.",
    )
    turns: Literal["all", "one_random"] = Field(
        default="all",
        description="all: every answer of a conversation is trained, each with its whole history. one_random: one"
        " random round with at most one round of history, as the published demo did.",
    )
    caption_question: Text = Field(
        default="Describe this image in detail.", description="The question put before a caption in `captions` records."
    )
    max_input_len: int = Field(
        default=512,
        ge=1,
        description="Tokens of a prompt (question and history); picture, BOS and EOS are not counted.",
    )
    max_output_len: int = Field(default=512, ge=1, description="Tokens of an answer; EOS is not counted.")
    max_row_tokens: int | None = Field(
        default=None,
        ge=1,
        description="Most tokens of one row; a picture with more is split over rows. null: no limit.",
    )
    long_prompt: Literal["drop", "error"] = Field(
        default="drop", description="What to do with a question that alone is longer than max_input_len."
    )
    long_answer: Literal["drop", "truncate", "error"] = Field(
        default="drop",
        description="What to do with an answer longer than max_output_len. truncate trains no end token for it.",
    )
    on_bad: Literal["error", "skip"] = Field(
        default="error",
        description="What to do with a record or picture that cannot be read. skip: count it and go on.",
    )
    max_bad_share: float = Field(
        default=0.1, ge=0, le=1, description="With on_bad skip: the share of bad records that still stops."
    )
    group_by_length: bool = Field(
        default=False,
        description="Bring rows of similar length together, in windows of 512 rows of the random order: more even steps"
        " over ranks and less padding inside attention.",
    )
    batch_tokens: int | None = Field(
        default=None,
        ge=1,
        description="Cut each rank's rows of a step into forward passes of at most this many tokens, instead of"
        " train.batch_size rows each. The step's rows stay the same.",
    )
    workers: int | None = Field(
        default=None,
        ge=0,
        description="Processes that prepare rows. 0: none, in the training process. null: by the number of cores.",
    )
    max_pixels: int = Field(
        default=178_956_970, ge=1, description="Pictures with more pixels are refused as decompression bombs."
    )
    cache_features: Switch = Field(
        default="auto",
        description="Keep what the frozen vision tower computes of each picture on disk and train from it, without the"
        " tower. auto: where that fits the budget and saves work or makes the run fit. off: it runs in every step.",
    )
    cache_dir: Path | None = Field(
        default=None,
        description="Folder of the feature cache; runs and users may share it. null: cogtune/features in"
        " $XDG_CACHE_HOME, else in ~/.cache.",
    )
    cache_dtype: Literal["auto", "bfloat16", "float8"] = Field(
        default="auto",
        description="Number format of cached features. auto: the one the run computes in, so that nothing is lost."
        " float8: half the disk, with an error that filling measures and prints.",
    )
    cache_budget: Budget = Field(
        default="80%",
        description="Most disk the feature cache may take: a size such as 500GB, or a share of what is free and what it"
        " takes already. Where it is not enough, files no run needs are removed, least recently used first.",
    )
    cache_batch: int = Field(
        default=1, ge=1, description="Pictures per forward pass of the tower while the feature cache is filled."
    )


class LoraSection(Section):
    """What trains."""

    targets: Names = Field(
        default=("experts",),
        min_length=1,
        description="Which linear layers get LoRA: experts, vision-experts, language-experts (each also with -attention"
        " or -mlp), vision-tower, glu-adapter; or module names and patterns.",
    )
    rank: int = Field(default=16, ge=1, description="Rank of the two added matrices.")
    alpha: float = Field(
        default=32.0, gt=0, allow_inf_nan=False, description="Scale of the update: it is multiplied by alpha / rank."
    )
    dropout: Share = Field(default=0.0, description="Dropout before the added matrices.")
    rslora: bool = Field(default=False, description="Scale by alpha / sqrt(rank) instead.")
    dora: bool = Field(default=False, description="Train magnitude and direction apart (DoRA).")
    start_from: Path | None = Field(default=None, description="Adapter folder to start from, instead of zero.")
    extra: dict[str, Any] = Field(
        default={},
        description="Other fields of peft's LoraConfig, by their names there: {layers_to_transform: [0, 1]}.",
    )


class TrainSection(Section):
    """The loop."""

    output: Path = Field(description="Folder for everything the run writes.")
    epochs: int = Field(default=1, ge=1, description="Passes over the data.")
    max_steps: int | None = Field(
        default=None, ge=1, description="Stop after this many optimiser steps. null: epochs decide."
    )
    batch_size: int = Field(default=1, ge=1, description="Rows per rank and forward pass.")
    accumulation: int = Field(default=1, ge=1, description="Forward passes per optimiser step.")
    lr: float = Field(default=1e-4, gt=0, allow_inf_nan=False, description="Highest learning rate.")
    schedule: Literal["cosine", "linear", "constant"] = Field(
        default="cosine", description="Course of the learning rate."
    )
    warmup_steps: int | None = Field(default=None, ge=0, description="Steps of warm-up, instead of warmup_ratio.")
    warmup_ratio: float = Field(default=0.03, ge=0, le=1, description="Share of all steps spent on warm-up.")
    weight_decay: float = Field(default=0.0, ge=0, allow_inf_nan=False, description="Decoupled weight decay.")
    betas: tuple[Beta, Beta] = Field(default=(0.9, 0.999), description="AdamW's two averaging factors.")
    eps: float = Field(default=1e-8, gt=0, allow_inf_nan=False, description="AdamW's guard against division by zero.")
    optimizer: Literal["adamw", "sgd", "adamw8bit", "paged_adamw", "paged_adamw8bit"] = Field(
        default="adamw",
        description="Optimiser. adamw8bit: AdamW with moments in 8 bits; paged_adamw, paged_adamw8bit: in memory that"
        " moves to the host where the GPU's is short. The last three are bitsandbytes'.",
    )
    max_grad_norm: float = Field(
        default=1.0, gt=0, description="Longer gradients are scaled to this norm. .inf: never."
    )
    seed: int = Field(default=0, ge=0, description="Seed of order, split, dropout and initial LoRA weights.")
    save_steps: int = Field(default=100, ge=1, description="Optimiser steps between checkpoints.")
    keep_checkpoints: int = Field(
        default=2, ge=1, description="How many of the latest checkpoints stay; the best one stays too."
    )
    gradient_checkpointing: Recompute = Field(
        default="auto",
        description="Which layers keep only their input and compute their activations again in the backward pass: less"
        " memory, up to a third more time. auto: as few as the free memory needs. A number k: every k-th layer. A size"
        " such as 30GiB: as few as keep the run under it. true and false mean all and none.",
    )
    compile: Literal["auto"] | bool = Field(
        default="auto",
        description="Compile the layers with torch.compile: faster steps after a slower first one. auto: on a GPU with"
        " the engines single and ddp.",
    )
    restart: bool = Field(
        default=False, description="If the output folder holds a run, start anew in a numbered sibling."
    )
    resume: Path | None = Field(default=None, description="Checkpoint folder to start from, in a new output folder.")


class QuantSection(Section):
    """Frozen weights in fewer bits, quantised while the model loads. The published files stay as they are."""

    experts: Literal["none", "nf4", "int8", "fp8"] = Field(
        default="none",
        description="Linear layers of both experts. nf4: 4 bits, double quantised; int8: 8 bits, a scale per output"
        " (both by bitsandbytes); fp8: 8 bits that newer cards also multiply faster. LoRA on top computes in"
        " model.dtype.",
    )
    tower: Literal["none", "nf4", "int8", "fp8"] = Field(
        default="none", description="Linear layers of the vision tower, live or filling the feature cache."
    )
    glu_adapter: Literal["none", "int8"] = Field(
        default="none", description="Linear layers between the tower and the decoder."
    )
    head: Literal["none", "int8"] = Field(default="none", description="The layer that gives the logits.")
    fp8_layouts: Literal["one", "two"] = Field(
        default="one",
        description="two: keep the experts' fp8 weights transposed as well, as the backward pass reads them: faster,"
        " and as much memory again. one: transpose them as they are needed.",
    )
    embedding: Literal["device", "host"] = Field(
        default="device",
        description="Where the token embedding stays. host: in host memory, 1.05 GB less on the GPU; rows are sent as"
        " they are needed.",
    )


class EvalSection(Section):
    """Validation during training."""

    steps: int | None = Field(
        default=None, ge=1, description="Optimiser steps between validations. null: at every checkpoint and at the end."
    )
    batch_size: int | None = Field(default=None, ge=1, description="Rows per rank in validation. null: as in training.")
    patience: int | None = Field(
        default=None, ge=1, description="Stop early after this many validations without a better loss. null: never."
    )


class ParallelSection(Section):
    """How the work is spread over devices."""

    engine: Engine = Field(
        default="auto",
        description="auto: one device without a launcher; with parallel.launch or torchrun the planner's choice, the"
        " fastest of ddp, zero2 (with deepspeed installed) and fsdp2 that fits; zero2 under the deepspeed launcher.",
    )
    launch: Literal["all"] | Annotated[int, Field(ge=1)] | None = Field(
        default=None,
        description="Start this many processes, one per device, with torchrun on a free port. all: one per GPU. null: a"
        " launcher started this process, or it uses one device.",
    )
    restarts: int = Field(
        default=0,
        ge=0,
        description="With parallel.launch: how often in a row, without a new checkpoint, a run that failed is started"
        " again from its last one. Under torchrun: its own --max-restarts.",
    )
    tensor: int = Field(
        default=1,
        ge=1,
        le=8,
        description="Ranks that hold one model together, each a part of every layer (tensor parallelism); neighbouring"
        " ranks. With more ranks, groups of this many share the rows as ddp does.",
    )
    offload: Literal["none", "weights", "optimizer"] = Field(
        default="none",
        description="What waits in host memory: weights (fsdp2, zero3): the frozen shards; optimizer (zero1, zero2,"
        " zero3): masters and moments. Slower.",
    )
    keep_gathered: Literal["auto"] | Annotated[int, Field(ge=0)] = Field(
        default="auto",
        description="fsdp2: how many layers stay gathered during an optimiser step instead of being gathered for every"
        " pass. auto: under accumulation as many as the memory left by the first step holds, else none.",
    )
    deepspeed: Path | None = Field(
        default=None, description="A DeepSpeed configuration file (YAML or JSON); it wins over defaults."
    )


class LogSection(Section):
    """What is written while it runs."""

    steps: int = Field(
        default=10, ge=1, description="Optimiser steps between lines on the console and in metrics.jsonl."
    )
    level: Literal["info", "warning", "error"] = Field(
        default="info", description="Least important kind of line the console shows; run.log keeps all of them."
    )
    tensorboard: bool = Field(default=True, description="Write TensorBoard events into the output folder.")


class RunConfig(Section):
    """A whole run. Build it with `load_config`, or from sections in Python."""

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
        """Every key with its value; `load_config` of this text gives an equal configuration."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)

    def with_values(self, values: Mapping[str, Any]) -> RunConfig:
        """A checked copy with some dotted keys replaced; raises ConfigError as `load_config` does."""
        from cogtune.configuration.load import replace

        return replace(self, values)


def load_config(path: str | Path | None, overrides: Mapping[str, str | Sequence[str]] | None = None) -> RunConfig:
    """Read a run's configuration.

    ``path``: a YAML file with nested sections or dotted keys, or None. ``overrides``: dotted key or alias to its text,
    as typed after ``--section.key`` (a list of texts where a flag was repeated); they win over the file.

    Raises ConfigError naming the file or flag, what was found and what was expected, and for an unknown key the nearest
    known one.
    """
    from cogtune.configuration.load import build  # it needs the classes above

    return build(path, overrides or {})


_OWN_LORA_FIELDS = {
    "r": "lora.rank",
    "lora_alpha": "lora.alpha",
    "lora_dropout": "lora.dropout",
    "target_modules": "lora.targets",
    "use_rslora": "lora.rslora",
    "use_dora": "lora.dora",
}


def _contradictions(config: RunConfig) -> Iterator[str]:
    """Pairs of values that cannot both be meant. A default never contradicts anything: only a changed value does."""
    data, train = config.data, config.train
    validates = bool(data.validation) or data.validation_share > 0

    if data.validation and data.validation_share not in (0, _default(DataSection, "validation_share")):
        yield "data.validation and data.validation_share: both say where validation data comes from; keep one"
    if config.eval.patience is not None and not validates:
        yield "eval.patience needs validation data, but data.validation_share is 0 and data.validation is empty"
    if config.eval.steps is not None and not validates:
        yield "eval.steps needs validation data, but data.validation_share is 0 and data.validation is empty"
    if data.on_bad == "error" and data.max_bad_share != _default(DataSection, "max_bad_share"):
        yield "data.max_bad_share has a meaning only with data.on_bad: skip"
    for name in sorted(_OWN_LORA_FIELDS.keys() & config.lora.extra.keys()):
        yield f"lora.extra.{name}: this is {_OWN_LORA_FIELDS[name]}; set it there"
    if train.warmup_steps is not None and train.warmup_ratio != _default(TrainSection, "warmup_ratio"):
        yield "train.warmup_steps and train.warmup_ratio: both set the warm-up; keep one"
    if train.warmup_steps and train.max_steps and train.warmup_steps >= train.max_steps:
        yield f"train.warmup_steps {train.warmup_steps} leaves nothing of train.max_steps {train.max_steps}"
    for name in ("betas", "eps"):
        if train.optimizer == "sgd" and getattr(train, name) != _default(TrainSection, name):
            yield f"train.{name} belongs to adamw, but train.optimizer is sgd"
    if config.quant.fp8_layouts == "two" and config.quant.experts != "fp8":
        yield f"quant.fp8_layouts is about fp8 experts, but quant.experts is {config.quant.experts}"
    if train.restart and train.resume is not None:
        yield "train.restart starts from nothing and train.resume from a checkpoint; keep one"
    if config.parallel.restarts and config.parallel.launch is None:
        yield "parallel.restarts needs parallel.launch: who starts the processes starts them again"
    if config.parallel.deepspeed is not None and config.parallel.engine in ("single", "ddp", "fsdp2"):
        yield f"parallel.deepspeed names a DeepSpeed file, but parallel.engine is {config.parallel.engine}"


def _default(section: type[Section], name: str) -> Any:
    return section.model_fields[name].default
