"""Adapted layers on bitsandbytes' 4-bit and 8-bit layers. Imported only where bitsandbytes is installed."""

from __future__ import annotations

from peft.tuners import lora

from cogtune.adapters.lora_layers import AdaptedLayer


class LoraLinear4bit(AdaptedLayer, lora.Linear4bit):
    """An adapted linear layer in NF4."""


class LoraLinear8bit(AdaptedLayer, lora.Linear8bitLt):
    """An adapted linear layer in int8."""
