"""The settings for DeepSpeed, checked by its own configuration class before data or weights are read."""

from __future__ import annotations

import difflib
import importlib.util
from collections.abc import Mapping
from typing import Any

from cogtune.configuration.deepspeed import deepspeed_settings
from cogtune.configuration.deepspeed_file import TOP_LEVEL, read_deepspeed
from cogtune.configuration.run_config import RunConfig
from cogtune.distributed import environment
from cogtune.errors import ConfigError
from cogtune.language import tr

_MONITORS = {"wandb": "wandb", "comet": "comet_ml", "tensorboard": "tensorboard"}
"""Blocks that make DeepSpeed import a package when training starts."""


def check_settings(config: RunConfig, engine: str) -> None:
    """Check the DeepSpeed file of a run whose ``engine`` is one of DeepSpeed's.

    Raises:
        ConfigError: DeepSpeed refuses a setting; names the file and, where it is known, the key.
    """
    if config.parallel.deepspeed is None or not engine.startswith("zero"):
        return
    file = str(config.parallel.deepspeed)
    dtype = "bfloat16" if config.model.dtype == "auto" else config.model.dtype
    settings = deepspeed_settings(config, dtype, environment.world_size())
    for block, package in _MONITORS.items():
        asked = settings.get(block)
        if isinstance(asked, dict) and asked.get("enabled") is True and importlib.util.find_spec(package) is None:
            raise ConfigError(
                tr(
                    "{file}: {block}.enabled: true, and the package {package} is not installed",
                    file=file,
                    block=block,
                    package=package,
                ),
                hint=tr(
                    "pip install {package}, or set {block}.enabled to false; losses are in OUTPUT/metrics.jsonl too",
                    package=package,
                    block=block,
                ),
            )
    if importlib.util.find_spec("deepspeed") is None:
        return  # the engine says so
    from deepspeed.runtime.config import DeepSpeedConfig
    from pydantic import ValidationError

    try:
        DeepSpeedConfig(settings)
    except ValidationError as error:
        raise _refused(file, error.errors()[0], read_deepspeed(file)) from error
    except Exception as error:  # DeepSpeed answers a wrong value with nearly any exception
        text = " ".join(str(error).split()) or type(error).__name__
        keys = [key for key in read_deepspeed(file) if key in text]
        where = f"{keys[0]}: " if keys else ""
        raise ConfigError(
            tr("{file}: {where}DeepSpeed refuses it: {text:.300}", file=file, where=where, text=text),
            hint=tr("change or remove that setting"),
        ) from error


def _refused(file: str, problem: Mapping[str, Any], user: Mapping[str, Any]) -> ConfigError:
    """Return the error for the first problem that pydantic found in one of the file's blocks."""
    path = [str(part) for part in problem["loc"]]
    key = path[0] if path else ""
    block = next((name for name, inner in user.items() if isinstance(inner, dict) and key in inner), None)
    named = ".".join([block, *path] if block else path)
    if problem["type"] != "extra_forbidden":
        return ConfigError(
            tr(
                "{file}: {named}: found {input!a:.80}; {msg}",
                file=file,
                named=named,
                input=problem["input"],
                msg=problem["msg"],
            ),
            hint=tr("change or remove that setting"),
        )
    if key in TOP_LEVEL:
        hint = tr("move {key} one level out: it belongs beside `{block}`", key=key, block=block)
    else:
        near = difflib.get_close_matches(key, _zero_keys(), n=1) if block == "zero_optimization" else []
        hint = tr("did you mean `{near}`?", near=near[0]) if near else tr("remove it")
    return ConfigError(tr("{file}: {named}: DeepSpeed knows no such key there", file=file, named=named), hint=hint)


def _zero_keys() -> list[str]:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    return [field.alias or name for name, field in DeepSpeedZeroConfig.model_fields.items()]
