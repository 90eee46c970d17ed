"""The model's configuration with what vLLM asks for beyond transformers."""

from __future__ import annotations

from typing import Any

from cogtune.configuration.model import CogVLM2Config

CHANNELS = 3
"""Positions that vLLM keeps for a token. The first is the rotary position. The second differs from it at an image's
last token alone: that one belongs to the language expert, and a batch that vLLM cuts anywhere would not show it."""


class CogVLM2ForVLLMConfig(CogVLM2Config):
    """`CogVLM2Config`, which asks vLLM to take positions from the model instead of counting tokens."""

    @property
    def rope_parameters(self) -> dict[str, Any]:
        """vLLM takes a section for each channel as the sign that the model computes positions itself."""
        return {"rope_type": "default", "rope_theta": self.rope_theta, "mrope_section": [1] * CHANNELS}

    @rope_parameters.setter
    def rope_parameters(self, value: Any) -> None:
        """transformers sets it from a file; the file's own keys say the same."""
