"""cogtune: fine-tune CogVLM2 with LoRA and run the result.

The three public classes are imported on first use, so that ``import cogtune`` and the command line stay fast.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cogtune.configuration.model import CogVLM2Config
    from cogtune.model.modeling import CogVLM2ForCausalLM
    from cogtune.processing.processor import CogVLM2Processor

__version__ = "0.1.0"
__all__ = ["CogVLM2Config", "CogVLM2ForCausalLM", "CogVLM2Processor", "__version__"]

_HOMES = {
    "CogVLM2Config": "cogtune.configuration.model",
    "CogVLM2ForCausalLM": "cogtune.model.modeling",
    "CogVLM2Processor": "cogtune.processing.processor",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        import importlib

        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'cogtune' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
