"""Reads a user's DeepSpeed file, and says what in it has no effect."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cogtune.configuration.yaml_text import describe, read_mapping
from cogtune.errors import ConfigError
from cogtune.language import tr

DeepSpeedDict = dict[str, Any]

TOP_LEVEL = (
    "train_micro_batch_size_per_gpu",
    "train_batch_size",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "zero_optimization",
    "optimizer",
    "scheduler",
)
"""Known top-level keys: DeepSpeed accepts any key there, so a misspelt one would go unnoticed."""
ZERO_KEYS = (
    "stage",
    "offload_optimizer",
    "offload_param",
    "overlap_comm",
    "contiguous_gradients",
    "reduce_scatter",
    "reduce_bucket_size",
    "allgather_partitions",
    "allgather_bucket_size",
    "round_robin_gradients",
)
"""Keys of the zero_optimization block, which DeepSpeed silently ignores at the top level."""


def read_deepspeed(path: str | Path) -> DeepSpeedDict:
    """Return the content of a DeepSpeed file (YAML, or JSON by suffix). Raises ConfigError if it cannot be one."""
    content = read_mapping(path, tr("DeepSpeed file"))
    if "bfloat16" in content and "bf16" not in content:  # DeepSpeed's old name of the block
        content["bf16"] = content.pop("bfloat16")
    for name in ("zero_optimization", "bf16", "fp16", "optimizer", "scheduler"):
        if name in content and not isinstance(content[name], dict):
            raise ConfigError(
                tr(
                    "{path}: `{name}`: found {found}, expected a mapping",
                    path=path,
                    name=name,
                    found=describe(content[name]),
                )
            )
        if name in ("optimizer", "scheduler") and not isinstance(content.get(name, {}).get("params") or {}, dict):
            raise ConfigError(
                tr(
                    "{path}: `{name}.params`: found {found}, expected a mapping",
                    path=path,
                    name=name,
                    found=describe(content[name]["params"]),
                )
            )
    if "zero_optimization" not in content:
        _refuse_other_file(content, path)
    return content


def _refuse_other_file(content: Mapping[str, Any], path: str | Path) -> None:
    """Raise ConfigError for a file without ``zero_optimization`` that is no DeepSpeed file, or nested too deep."""
    if "compute_environment" in content or "distributed_type" in content:
        inner = content.get("deepspeed_config")
        named = inner.get("deepspeed_config_file") if isinstance(inner, dict) else None
        raise ConfigError(
            tr("{path}: this is a configuration of accelerate, not a DeepSpeed file", path=path),
            hint=tr("give the DeepSpeed file that it names: {named}", named=named)
            if named
            else tr("write its settings as a DeepSpeed file; ds_config.yaml of this project is one to start from"),
        )
    for name, inner in content.items():
        if isinstance(inner, dict) and "zero_optimization" in inner:
            raise ConfigError(
                tr("{path}: the settings stand one level too deep, under `{name}`", path=path, name=name),
                hint=tr("move them out of `{name}`", name=name),
            )


def file_warnings(user: Mapping[str, Any], file: str) -> Iterator[str]:
    """Yield a sentence about each setting of a file that has no effect here."""
    for name in ZERO_KEYS:
        if name in user:
            yield (
                tr(
                    "{file}: `{name}` stands at the top level, where DeepSpeed ignores it; it is off. To"
                    " switch it on, indent it under `zero_optimization`",
                    file=file,
                    name=name,
                )
            )
    for name in user.keys() - {*TOP_LEVEL, *ZERO_KEYS}:
        for near in difflib.get_close_matches(name, TOP_LEVEL, n=1, cutoff=0.85):
            yield tr(
                "{file}: `{name}` is not a DeepSpeed key and has no effect; did you mean `{near}`?",
                file=file,
                name=name,
                near=near,
            )
    if user.get("activation_checkpointing"):
        yield (
            tr(
                "{file}: `activation_checkpointing` has no effect on this model; use"
                " --train.gradient_checkpointing to save memory",
                file=file,
            )
        )
    if user.get("wall_clock_breakdown") is True:
        yield tr(
            "{file}: `wall_clock_breakdown: true` waits for the device at every stage and slows each step", file=file
        )
    schedule = (user.get("scheduler") or {}).get("params") or {}
    if schedule.get("total_num_steps", "auto") != "auto":
        yield tr(
            "{file}: `scheduler.params.total_num_steps` is not used; the length follows from data and epochs", file=file
        )
    if schedule.get("warmup_type", "auto") not in ("auto", "linear"):
        yield tr("{file}: `scheduler.params.warmup_type` has no effect; the warm-up is linear", file=file)
