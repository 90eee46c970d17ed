"""Determine without weights whether an adapter trains in the vision tower, whose output is then not constant."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch

from cogtune.adapters.adapter_folder import adapter_shapes
from cogtune.adapters.attach import attach
from cogtune.adapters.targets import is_match, resolve_targets
from cogtune.configuration.model import CogVLM2Config
from cogtune.configuration.run_config import LoraSection
from cogtune.configuration.shapes import TOWER
from cogtune.model.modeling import CogVLM2ForCausalLM


def tower_trains(config: CogVLM2Config, lora: LoraSection) -> bool:
    """Return whether anything in front of the GLU adapter would get a gradient under these settings.

    Raises:
        AdapterError, ConfigError: as `attach` does.
    """
    if lora.start_from is not None:
        return any(part in name for name in adapter_shapes(Path(lora.start_from)) for part in TOWER)
    with torch.device("meta"):
        model = CogVLM2ForCausalLM(config)
    modules = dict(model.named_modules())
    extra = lora.extra
    asked = [*resolve_targets(model, lora.targets), *_texts(extra.get("modules_to_save"))]
    asked += _texts(extra.get("target_parameters"))
    names = [*modules, *(name for name, _ in model.named_parameters())]
    inside = [name for name in names if f"{name}.".startswith(TOWER)]
    if not any(is_match(name, target) for name in inside for target in asked) and extra.get("bias") != "all":
        return False
    if not extra:
        return True
    attach(model, lora)  # other fields can narrow peft's choice of modules, so let peft itself decide
    return model.model.vision.tower_trains()


def _texts(value: object) -> Iterable[str]:
    return [str(item) for item in value] if isinstance(value, list | tuple) else []
