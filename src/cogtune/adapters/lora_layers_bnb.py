"""Adapted layers whose base bitsandbytes stores in 4 or 8 bits. Imported only where bitsandbytes is installed."""

from __future__ import annotations

from peft.tuners import lora

from cogtune.adapters.lora_layers import AdaptedLayer


class LoraLinear4bit(AdaptedLayer, lora.Linear4bit):
    """On a linear layer in NF4."""


class LoraLinear8bit(AdaptedLayer, lora.Linear8bitLt):
    """On a linear layer in int8."""
