"""The published fine-tuning command, ``peft_lora.py``: its flags and defaults, as a cogtune configuration.

Differences on purpose: the learning rate's default; budgets are exact; every answer of a conversation is trained; the
split is the same on every rank and in every run; interrupted runs resume.
"""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from cogtune.configuration.deepspeed import apply_deepspeed
from cogtune.configuration.keys import known_keys
from cogtune.configuration.load import from_entries, parse_flag, with_values
from cogtune.configuration.problems import Entry
from cogtune.configuration.run_config import PUBLISHED_MODEL, RunConfig
from cogtune.distributed import environment
from cogtune.errors import ConfigError
from cogtune.language import tr

_DTYPES = {
    "bfloat16": "bfloat16",
    "bf16": "bfloat16",
    "float16": "float16",
    "fp16": "float16",
    "half": "float16",
    "float32": "float32",
    "fp32": "float32",
    "float": "float32",
}


def _dtype(text: str) -> str:
    name = text.strip().removeprefix("torch.").lower()
    if name not in _DTYPES:
        raise ConfigError(
            tr("--torch_type: found `{text}`, expected torch.bfloat16, torch.float16 or torch.float32", text=text),
            code="config-value",
        )
    return _DTYPES[name]


def _validation_share(text: str) -> float:
    rate = parse_flag(None, text, "--train_dataset_rate")
    if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 < rate <= 1:
        raise ConfigError(
            tr("--train_dataset_rate: found `{text}`, expected a number above 0 and at most 1", text=text),
            code="config-value",
        )
    return round(1 - rate, 12)  # 0.8 leaves 0.2, not 0.19999999999999996


@dataclass(frozen=True)
class _Flag:
    """A flag of the original script: its default there, its key here, and how to convert its text."""

    default: str
    key: str | None
    help: str
    convert: Callable[[str], Any] | None = None


FLAGS: dict[str, _Flag] = {
    "lr": _Flag(
        "1e-4",
        "train.lr",
        "Highest learning rate. The original default, 1e-7, is too small for LoRA: the loss does not move. So here "
        "it is the usual one for LoRA.",
    ),
    "num_epochs": _Flag("5", "train.epochs", "Epochs over the data."),
    "batch_size": _Flag("2", "train.batch_size", "Rows per device and forward pass."),
    "torch_type": _Flag("torch.bfloat16", "model.dtype", "torch.bfloat16, torch.float16 or torch.float32.", _dtype),
    "save_step": _Flag("100", "train.save_steps", "Optimiser steps between checkpoints."),
    "train_dataset_rate": _Flag(
        "0.8",
        "data.validation_share",
        "Share of the pictures to train on; the others are for validation.",
        _validation_share,
    ),
    "lora_rank": _Flag("8", "lora.rank", "Rank of LoRA."),
    "lora_alpha": _Flag("32", "lora.alpha", "Scale of LoRA."),
    "lora_target": _Flag(
        "vision_expert_query_key_value",
        "lora.targets",
        "What gets LoRA: one or several module names, or sets such as experts.",
    ),
    "lora_dropout": _Flag("0.1", "lora.dropout", "Dropout of LoRA."),
    "warmup_steps": _Flag("0", "train.warmup_steps", "Steps of warm-up."),
    "max_input_len": _Flag("128", "data.max_input_len", "Most tokens of a prompt; the picture is not counted."),
    "max_output_len": _Flag("128", "data.max_output_len", "Most tokens of an answer; longer ones are left out."),
    "model_path": _Flag(PUBLISHED_MODEL, "model.path", "The base model."),
    "dataset_path": _Flag(
        "CogVLM-SFT-311K/llava_instruction_multi_conversations_formate",
        "data.path",
        "Data folder with images/ and labels_en/ (or labels/ or labels_zh/).",
    ),
    "save_path": _Flag("output", "train.output", "Folder for everything the run writes."),
    "ds_config": _Flag(
        "ds_config.yaml",
        "parallel.deepspeed",
        "DeepSpeed file. It wins over defaults; a flag that is typed and says something else is an error.",
    ),
    "local_rank": _Flag("-1", None, "Set by the launcher."),
}
_SAME_AS_PUBLISHED = {"train.schedule": "linear", "train.weight_decay": 0.01}
"""The original script's fixed settings: a linear schedule, and torch's default weight decay in AdamW."""


def train_published(arguments: Sequence[str]) -> None:
    """Train with ``peft_lora.py``'s arguments. Raises ConfigError for wrong ones."""
    config, notes = configure(arguments, launched=environment.is_launched(), world_size=environment.world_size())
    if environment.is_main():
        for note in notes:
            print(note, file=sys.stderr)

    from cogtune.train.run import train  # after the checks, because it imports torch

    train(config)


def configure(arguments: Sequence[str], *, launched: bool = False, world_size: int = 1) -> tuple[RunConfig, list[str]]:
    """Return the configuration for these arguments, and notes for the user.

    ``launched``: a launcher started this process; if not, the run uses one device and no ZeRO.
    """
    typed = _typed(arguments)
    _take_local_rank(typed.get("local_rank", [FLAGS["local_rank"].default])[0])
    entries = {key: Entry(value, key) for key, value in _SAME_AS_PUBLISHED.items()}
    for name, flag in FLAGS.items():
        if flag.key is not None:
            entries[flag.key] = Entry(_value(name, flag, typed.get(name, [flag.default])), f"--{name}")
    notes: list[str] = []
    if "ds_config" not in typed and not Path(FLAGS["ds_config"].default).is_file():
        del entries["parallel.deepspeed"]
        if launched:
            entries["parallel.engine"] = Entry("zero2", "--ds_config")
            notes.append(tr("note: there is no ds_config.yaml here; using ZeRO stage 2 with DeepSpeed's defaults"))
    entries["data.labels"] = Entry(_labels(Path(entries["data.path"].value[0])), "--dataset_path")

    explicit = {
        flag.key: f"--{name}"
        for name, flag in FLAGS.items()
        if flag.key is not None and (name in typed or name == "batch_size")  # the original's loader takes it always
    }
    config = from_entries(entries, RunConfig)
    config, warnings = apply_deepspeed(config, explicit=explicit.keys(), world_size=world_size, names=explicit)
    if not launched:  # otherwise train() reads the file again and prints the warnings
        notes += [tr("warning: {warning}", warning=warning) for warning in warnings]
        config = with_values(config, {"parallel.engine": "single", "parallel.deepspeed": None})
        notes.append(
            tr("note: not started by a launcher: one device, no ZeRO; `deepspeed peft_lora.py ...` uses all GPUs")
        )
    return config, notes


def _take_local_rank(text: str) -> None:
    """Copy a rank that a launcher passes as a flag to the environment, where the engines look for it."""
    try:
        rank = int(text)
    except ValueError:
        raise ConfigError(
            tr("--local_rank: found `{text}`, expected a whole number", text=text), code="config-value"
        ) from None
    if rank >= 0:
        environment.take_local_rank(rank)


def _value(name: str, flag: _Flag, texts: list[str]) -> Any:
    if flag.convert is not None:
        return flag.convert(texts[0])
    assert flag.key is not None
    return parse_flag(known_keys()[flag.key], texts, f"--{name}")


def _labels(folder: Path) -> str:
    """Return the label folder: labels_en, the only one the original reads, or whatever the data folder has."""
    return "labels_en" if (folder / "labels_en").is_dir() else "auto"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        unknown = message.removeprefix("unrecognized arguments: ")
        near = difflib.get_close_matches(unknown.split("=")[0].lstrip("-").split(" ")[0], FLAGS, n=1)
        hint = (
            tr("did you mean `--{near}`?", near=near[0])
            if near and unknown != message
            else tr("`--help` lists the flags")
        )
        raise ConfigError(message, hint=hint, code="usage")


def _typed(arguments: Sequence[str]) -> Mapping[str, list[str]]:
    """Return the flags that were given, with their texts."""
    parser = _Parser(
        prog="peft_lora.py",
        description=tr("Fine-tune CogVLM2 with LoRA: the published demo's command. `cogtune train` can do more."),
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    for name, flag in FLAGS.items():
        parser.add_argument(
            f"--{name}",
            nargs="+" if name == "lora_target" else 1,
            metavar=name.upper(),
            help=tr("{help} (default: {default})", help=tr(flag.help), default=flag.default),
        )
    return vars(parser.parse_args(list(arguments)))
