"""An adapter added to the weights of its loaded base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft import PeftModel
from peft.tuners.lora import LoraLayer

from cogtune.adapters.adapter_folder import quantised_layer


def merge_in_memory(model: PeftModel, folder: Path) -> Any:
    """Add a loaded adapter to the base's weights, and return the base; for files use ``adapters.merge``.

    Raises:
        AdapterError: it changes a quantised layer.
    """
    layers = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, LoraLayer)]
    for name, layer in layers:
        weight = layer.get_base_layer().weight
        if not weight.is_floating_point() or getattr(layer.get_base_layer(), "quant_state", None) is not None:
            raise quantised_layer(folder, name)
    return model.merge_and_unload()
