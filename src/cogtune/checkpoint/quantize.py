"""Which frozen parts are kept in fewer bits, and how a layer gets there once it is loaded.

Quantising happens where the layer is, on the GPU while the model streams in: a layer's weights are there in full
precision for a moment, so the peak is the quantised model and one layer.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import get_args

import torch
from torch import nn

from cogtune.configuration.quantization import Formats
from cogtune.configuration.run_config import QuantSection
from cogtune.errors import ConfigError, SetupError
from cogtune.model.quantized.host_embedding import HostEmbedding

FORMATS = {name: get_args(field.annotation) for name, field in QuantSection.model_fields.items()}
"""The formats each part has."""
_FROM_BITSANDBYTES = ("nf4", "int8")


@dataclass(frozen=True)
class Quantization(Formats):
    """Number formats of the frozen linear layers by part, and the layers in them."""

    @classmethod
    def of(cls, quant: QuantSection) -> Quantization:
        """From a configuration's ``quant`` section."""
        return cls.from_section(quant)

    def check(self) -> None:
        """Raise ConfigError for a format that a part does not have, SetupError where one needs a missing package."""
        for part, known in FORMATS.items():
            if (form := getattr(self, part)) not in known:
                raise ConfigError(f"quant.{part} is {form!r}; it is one of {', '.join(known)}", code="config-value")
        asked = {self.experts, self.tower, self.glu_adapter, self.head}
        needed = [name for name in _FROM_BITSANDBYTES if name in asked]
        if needed:
            require_bitsandbytes(f"{needed[0]} weights")

    def format_of(self, path: str) -> str:
        """The format of the module called ``path`` in the model, if it is a linear layer."""
        if path == "lm_head":
            return self.head
        if path.startswith("model.vision.linear_proj."):
            return self.glu_adapter
        if path.startswith("model.vision.transformer."):
            return self.tower
        return self.experts if path.startswith("model.layers.") else "none"

    def convert(self, path: str, layer: nn.Module) -> nn.Module:
        """``layer`` in its format: itself, or a module that computes about the same from fewer bits."""
        if path == "model.embed_tokens":
            assert isinstance(layer, nn.Embedding)
            return HostEmbedding(layer.weight.data) if self.embedding == "host" else layer
        form = self.format_of(path)
        if type(layer) is not nn.Linear or form == "none":
            return layer
        trained_through = path.startswith("model.layers.")
        return quantize_linear(layer, form, keep_transposed=trained_through and self.fp8_layouts == "two")

    def device_for(self, name: str, device: torch.device) -> torch.device:
        """Where the tensor ``name`` goes in a model on ``device``."""
        on_host = self.embedding == "host" and name == "model.embed_tokens.weight"
        return torch.device("cpu") if on_host else device


PLAIN = Quantization()
"""Everything in the number format of the model, on its device."""


def quantize_linear(layer: nn.Linear, form: str, *, keep_transposed: bool = False) -> nn.Module:
    """A frozen layer in ``form`` (nf4, int8 or fp8), made on the device where ``layer`` is. ``keep_transposed`` is
    fp8's second layout."""
    if form == "fp8":
        from cogtune.model.quantized.fp8 import Fp8Linear

        bias = None if layer.bias is None else layer.bias.data
        return Fp8Linear.from_weight(layer.weight.data, bias, keep_transposed=keep_transposed)
    from cogtune.model.quantized import bnb_linear  # it imports bitsandbytes

    return bnb_linear.to_nf4(layer) if form == "nf4" else bnb_linear.to_int8(layer)


def require_bitsandbytes(what: str) -> None:
    """Raise SetupError, with the line to type, where bitsandbytes is not installed."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise SetupError(
            f"{what} need bitsandbytes, which is not installed",
            hint='pip install "cogtune[quant]"',
            code="no-bitsandbytes",
        )


def mark_for_adapters(model: nn.Module) -> None:
    """Tell peft, which looks for these names, that layers of bitsandbytes are among the model's."""
    kinds = {type(module).__name__ for module in model.modules()}
    model.is_loaded_in_4bit = "FourBitLinear" in kinds  # type: ignore[assignment]
    model.is_loaded_in_8bit = "Int8Linear" in kinds  # type: ignore[assignment]
