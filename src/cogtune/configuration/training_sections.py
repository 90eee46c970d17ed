"""How a run trains: adapter, optimiser, validation, devices, and what it writes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from cogtune.configuration.values import Beta, Engine, Names, Recompute, Section, Share, Text, Trackers


class LoraSection(Section):
    """The LoRA adapter: which layers get it, its rank and options."""

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
    rslora: bool = Field(default=False, description="Scale by alpha / sqrt(rank) instead (rsLoRA).")
    dora: bool = Field(default=False, description="Train magnitude and direction separately (DoRA).")
    start_from: Path | None = Field(default=None, description="Adapter folder to start from, instead of a new adapter.")
    extra: dict[str, Any] = Field(
        default={},
        description="Other fields of peft's LoraConfig, by their names there: {layers_to_transform: [0, 1]}.",
    )


class TrainSection(Section):
    """The training loop: batches, optimiser, learning rate, checkpoints."""

    output: Path = Field(description="Folder for everything the run writes.")
    epochs: int = Field(default=1, ge=1, le=100_000, description="Passes over the data.")
    max_steps: int | None = Field(
        default=None, ge=1, description="Stop after this many optimiser steps. null: epochs decide."
    )
    batch_size: int = Field(default=1, ge=1, description="Rows per rank and forward pass.")
    accumulation: int = Field(default=1, ge=1, description="Forward passes per optimiser step.")
    lr: float = Field(default=1e-4, gt=0, allow_inf_nan=False, description="Peak learning rate.")
    schedule: Literal["cosine", "linear", "constant"] = Field(
        default="cosine", description="Learning rate schedule after the warm-up."
    )
    warmup_steps: int | None = Field(default=None, ge=0, description="Steps of warm-up, instead of warmup_ratio.")
    warmup_ratio: float = Field(default=0.03, ge=0, le=1, description="Share of all steps spent on warm-up.")
    weight_decay: float = Field(default=0.0, ge=0, allow_inf_nan=False, description="Decoupled weight decay.")
    betas: tuple[Beta, Beta] = Field(default=(0.9, 0.999), description="AdamW's betas: decay rates of its two moments.")
    eps: float = Field(
        default=1e-8, gt=0, allow_inf_nan=False, description="AdamW's epsilon, which avoids division by zero."
    )
    optimizer: Literal["adamw", "sgd", "adamw8bit"] = Field(
        default="adamw", description="Optimiser. adamw8bit: bitsandbytes' AdamW with moments in 8 bits."
    )
    max_grad_norm: float = Field(
        default=1.0, gt=0, description="Gradients with a larger norm are scaled down to it. .inf: never."
    )
    seed: int = Field(default=0, ge=0, description="Seed of order, split, dropout and initial LoRA weights.")
    save_steps: int = Field(default=100, ge=1, description="Optimiser steps between checkpoints.")
    keep_checkpoints: int = Field(
        default=2, ge=1, description="How many of the latest checkpoints are kept; the best one is kept too."
    )
    gradient_checkpointing: Recompute = Field(
        default="auto",
        description="Which layers keep only their input and compute their activations again in the backward pass: less"
        " memory, up to a third more time. auto: as few as the free memory needs. A number k: every k-th layer. A size"
        " such as 30GiB: as few as keep the run under it. true and false mean all and none.",
    )
    activation_offloading: bool = Field(
        default=False,
        description="What a recomputed layer keeps, its input, waits in host memory until the backward pass: less"
        " memory for long rows and large batches. Copies run beside computation.",
    )
    compile: Literal["auto"] | bool = Field(
        default="auto",
        description="Compile the layers with torch.compile: faster steps after a slower first one. auto: on a GPU with"
        " every engine but zero3.",
    )
    restart: bool = Field(
        default=False, description="If the output folder holds a run, start a new one in a numbered folder beside it."
    )
    resume: Path | None = Field(default=None, description="Checkpoint folder to start from, in a new output folder.")


class EvalSection(Section):
    """Validation during training."""

    steps: int | None = Field(
        default=None, ge=1, description="Optimiser steps between validations. null: at every checkpoint and at the end."
    )
    batch_size: int | None = Field(default=None, ge=1, description="Rows per rank in validation. null: as in training.")
    patience: int | None = Field(
        default=None,
        ge=1,
        description="Stop early after this many validations without a better eval.metric. null: never.",
    )
    generate: int = Field(
        default=16,
        ge=0,
        description="Questions of each validation set that are answered before the first step and at every validation,"
        " greedily, and compared with the right answers. 0: none.",
    )
    max_new_tokens: int = Field(default=64, ge=1, description="Most tokens of such an answer; a longer one is cut.")
    metrics: Names = Field(
        default=(),
        description="Metrics of those answers, as `cogtune eval --metrics` takes them. Empty: what fits them.",
    )
    metric: Text = Field(
        default="loss",
        description="What chooses the best checkpoint and stops early: loss, or a metric of the answers; of one"
        " validation set: NAME/loss, NAME/METRIC.",
    )


class TensorSection(Section):
    """How one model is split over ranks."""

    tensor: int = Field(
        default=1,
        ge=1,
        le=8,
        description="Ranks that hold one model together, each a part of every layer (tensor parallelism); neighbouring"
        " ranks. With more ranks, groups of this many share the rows as ddp does.",
    )


class ParallelSection(TensorSection):
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
    offload: Literal["none", "weights", "optimizer"] = Field(
        default="none",
        description="What waits in host memory: weights (fsdp2, zero3): the frozen shards; optimizer (zero1, zero2,"
        " zero3): masters and moments. Slower.",
    )
    keep_gathered: Literal["auto"] | Annotated[int, Field(ge=0)] = Field(
        default="auto",
        description="fsdp2: how many layers stay gathered from their first use on instead of being gathered for every"
        " pass. auto: as many as the planner finds memory for.",
    )
    deepspeed: Path | None = Field(
        default=None, description="A DeepSpeed configuration file (YAML or JSON); it wins over defaults."
    )


class LogSection(Section):
    """What a run prints and logs."""

    steps: int = Field(
        default=10,
        ge=1,
        description="Optimiser steps between lines in metrics.jsonl and in the log, which also has the first step and"
        " one every 15 seconds.",
    )
    level: Literal["info", "warning", "error"] = Field(
        default="info", description="Lowest level of lines on the console; run.log keeps all of them."
    )
    tensorboard: bool = Field(default=True, description="Write TensorBoard events into the output folder.")
    trackers: Trackers = Field(
        default=(),
        description="Services that show the run besides: wandb, mlflow, swanlab, trackio. Their packages come with"
        " cogtune[track]; addresses and keys are set as each of them says.",
    )
    project: Text = Field(
        default="cogtune", description="The project (MLflow: experiment) that they file the run under."
    )
    run_name: Text | None = Field(default=None, description="Its name there. null: the output folder's.")
