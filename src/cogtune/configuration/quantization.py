"""Number formats of the frozen weights: the ``quant`` section as plain data, to load by and, without torch, to plan."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from cogtune.configuration.run_config import QuantSection


@dataclass(frozen=True)
class Formats:
    """Names, values and defaults are those of the configuration's ``quant`` section; a test compares them."""

    experts: str = "none"
    tower: str = "none"
    glu_adapter: str = "none"
    head: str = "none"
    embedding: str = "device"
    fp8_layouts: str = "one"

    @classmethod
    def from_section(cls, quant: QuantSection) -> Self:
        """From a configuration's ``quant`` section."""
        return cls(quant.experts, quant.tower, quant.glu_adapter, quant.head, quant.embedding, quant.fp8_layouts)
