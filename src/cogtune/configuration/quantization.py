"""Number formats of the frozen weights: the ``quant`` section, used to load, plan and query a model, and what a folder
says of weights that are stored quantised.

Needs no torch. To add a quantised part, add a field here and its layers' names to `PARTS`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field

from cogtune.configuration.values import Section, Stream
from cogtune.errors import ConfigError
from cogtune.language import tr

FOUR_BIT = ("nf4", "fp4")
"""Formats of bitsandbytes with 4 bits a weight; they differ in the 16 values that the codes stand for."""

EIGHT_BIT = ("int8", "fp8")
"""Formats with 8 bits a weight and a scale per output feature."""

PARTS = {"experts": "model.layers.", "tower": "model.vision.transformer."}
"""Keys of the section that stand for a part of the model, with the prefixes of its linear layers' names."""


def part_of(name: str) -> str | None:
    """Return the part of `PARTS` that a linear layer belongs to; None: it is never quantised."""
    return next((part for part, prefix in PARTS.items() if name.startswith(prefix)), None)


class QuantSection(Section):
    """Frozen weights in fewer bits, quantised while the model loads. The published files stay as they are."""

    experts: Literal["none", "nf4", "fp4", "int8", "fp8"] = Field(
        default="none",
        description="Number format of both experts' linear layers. nf4: 4 bits, double quantised; fp4: the same with"
        " the coarser values of the published -int4 folders, which keep theirs; int8: 8 bits, a scale per output (all"
        " by bitsandbytes); fp8: 8 bits that newer cards also multiply faster. LoRA on top computes in model.dtype.",
    )
    tower: Literal["none", "nf4", "fp4", "int8", "fp8"] = Field(
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
        " so many decoder layers stay on the GPU, and as large a share of the tower's. auto: as many as fit. off: no"
        " layer waits. Answering streams the vision experts and the tower; all: the language experts too, for each"
        " token.",
    )

    @property
    def streams(self) -> bool:
        """Return whether layers may be streamed from host memory."""
        return self.stream != "off"

    @property
    def formats(self) -> dict[str, str]:
        """Return the number format of each part in `PARTS`."""
        return {"experts": self.experts, "tower": self.tower}

    def changed(self, **values: str | int) -> QuantSection:
        """Return a copy with some keys changed."""
        return QuantSection.model_validate(self.model_dump() | values)

    def format_of(self, name: str) -> str:
        """Return the format of the linear layer ``name``."""
        part = part_of(name)
        return "none" if part is None else self.formats[part]

    def keeps_transposed(self, name: str) -> bool:
        """Return whether the fp8 weight of layer ``name`` is kept in both layouts."""
        return self.fp8_layouts == "two" and part_of(name) == "experts" and self.experts == "fp8"


@dataclass(frozen=True)
class StoredFormat:
    """What ``quantization_config`` in a folder's ``config.json`` says of its linear layers.

    Attributes:
        kind: one of `FOUR_BIT` or `EIGHT_BIT`.
        nested: are the scales quantised again, to 8 bits? Else they are float32, one per block of 64 weights.
        kept: modules that are not quantised.
    """

    kind: str
    nested: bool
    kept: tuple[str, ...] = ("lm_head",)

    def holds(self, name: str) -> bool:
        """Return whether the linear layer ``name`` is stored quantised."""
        return not any(f".{module}." in f".{name}." for module in self.kept)


PUBLISHED_INT4 = StoredFormat("fp4", nested=False)
"""Of ``cogvlm2-llama3-chat-19B-int4`` and its Chinese twin."""


def stored_format(config: Mapping[str, Any]) -> StoredFormat | None:
    """Return the format in which a parsed ``config.json`` says that weights are stored; None: not quantised."""
    found = config.get("quantization_config") or {}
    if found.get("quant_method") == OWN_METHOD:
        return StoredFormat(str(found["format"]), nested=True, kept=_KEPT)
    if not found.get("load_in_4bit"):
        return None
    kept = found.get("llm_int8_skip_modules") or ("lm_head",)
    kind, nested = found.get("bnb_4bit_quant_type", "fp4"), bool(found.get("bnb_4bit_use_double_quant"))
    return StoredFormat(str(kind), nested, tuple(map(str, kept)))


OWN_METHOD = "cogtune"
"""``quant_method`` of folders in `EIGHT_BIT` formats, which `cogtune merge` writes."""
_KEPT = ("lm_head", "linear_proj")
"""Parts of the names of the linear layers in none of `PARTS`."""


def written_format(kind: str) -> dict[str, Any]:
    """Return the ``quantization_config`` of a folder whose linear layers in `PARTS` are stored in ``kind``."""
    if kind in EIGHT_BIT:
        return {"quant_method": OWN_METHOD, "format": kind}
    return {
        "quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False, "bnb_4bit_quant_type": kind,
        "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": "bfloat16", "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": list(_KEPT),
    }  # fmt: skip


def stored_by_name(model: str) -> StoredFormat | None:
    """Return the format of a published model by its name, for one whose files are not at hand."""
    return PUBLISHED_INT4 if model.rstrip("/").endswith("-int4") else None


def stored_otherwise(where: str, part: str, asked: str, stored: str) -> ConfigError:
    """Return the error for a format that was asked for where weights are stored in another one."""
    return ConfigError(
        tr("quant.{part} {asked}: the weights in {where} are stored in {stored} and stay so", part=part, asked=asked,
           where=where, stored=stored),
        hint=tr("leave quant.{part} out, or take the unquantised model", part=part),
        code="config-combination",
    )  # fmt: skip


PLAIN = QuantSection()
"""Everything in the model's own number format, on its device."""
