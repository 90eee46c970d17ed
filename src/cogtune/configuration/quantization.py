"""Number formats of the frozen weights: the ``quant`` section, used to load, plan and query a model.

Needs no torch. To add a quantised part, add a field here and its layers' names to `PARTS`.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from cogtune.configuration.values import Section, Stream

PARTS = {"experts": "model.layers.", "tower": "model.vision.transformer."}
"""Keys of the section that stand for a part of the model, with the prefixes of its linear layers' names."""


def part_of(name: str) -> str | None:
    """Return the part of `PARTS` that a linear layer belongs to; None: it is never quantised."""
    return next((part for part, prefix in PARTS.items() if name.startswith(prefix)), None)


class QuantSection(Section):
    """Frozen weights in fewer bits, quantised while the model loads. The published files stay as they are."""

    experts: Literal["none", "nf4", "int8", "fp8"] = Field(
        default="none",
        description="Number format of both experts' linear layers. nf4: 4 bits, double quantised; int8: 8 bits, a scale"
        " per output (both by bitsandbytes); fp8: 8 bits that newer cards also multiply faster. LoRA on top computes"
        " in model.dtype.",
    )
    tower: Literal["none", "nf4", "int8", "fp8"] = Field(
        default="none", description="Linear layers of the vision tower, live or filling the feature cache."
    )
    fp8_layouts: Literal["one", "two"] = Field(
        default="one",
        description="two: keep the experts' fp8 weights transposed as well, as the backward pass reads them: faster,"
        " and as much memory again. one: transpose them as they are needed.",
    )
    embedding: Literal["device", "host"] = Field(
        default="device",
        description="Where the token embedding stays. host: in host memory, 1.05 GB less on the GPU; rows are sent as"
        " they are needed.",
    )
    stream: Stream = Field(
        default="off",
        description="Frozen layers that wait in host memory and are copied to the GPU just in time, in every pass. N:"
        " so many decoder layers stay on the GPU, and as large a share of the tower's. auto: as many as fit. off: all.",
    )

    @property
    def streams(self) -> bool:
        """Return whether layers may be streamed from host memory."""
        return self.stream != "off"

    @property
    def formats(self) -> dict[str, str]:
        """Return the number format of each part in `PARTS`."""
        return {"experts": self.experts, "tower": self.tower}

    def changed(self, **values: str) -> QuantSection:
        """Return a copy with some keys changed."""
        return QuantSection.model_validate(self.model_dump() | values)

    def format_of(self, name: str) -> str:
        """Return the format of the linear layer ``name``."""
        part = part_of(name)
        return "none" if part is None else self.formats[part]

    def keeps_transposed(self, name: str) -> bool:
        """Return whether the fp8 weight of layer ``name`` is kept in both layouts."""
        return self.fp8_layouts == "two" and part_of(name) == "experts" and self.experts == "fp8"


PLAIN = QuantSection()
"""Everything in the model's own number format, on its device."""
