"""Which frozen parts are kept in fewer bits, and how a layer gets there once it is loaded.

Quantising happens where the layer is, on the GPU while the model streams in: a layer's weights are there in full
precision for a moment, so the peak is the quantised model and one layer.
"""

from __future__ import annotations

import importlib.util

import torch
from torch import nn

from cogtune.configuration.quantization import QuantSection
from cogtune.errors import SetupError
from cogtune.model.quantized.host_embedding import HostEmbedding

_FROM_BITSANDBYTES = ("nf4", "int8")


def require_packages(quant: QuantSection) -> None:
    """Raise SetupError where a format needs a package that is not installed."""
    needed = [form for form in _FROM_BITSANDBYTES if form in quant.formats.values()]
    if needed:
        require_bitsandbytes(f"{needed[0]} weights")


def convert(quant: QuantSection, name: str, layer: nn.Module) -> nn.Module:
    """The complete layer called ``name`` in the model in its format: itself, or a module that computes about the same
    from fewer bits."""
    if name == "model.embed_tokens":
        assert isinstance(layer, nn.Embedding)
        return HostEmbedding(layer.weight.data) if quant.embedding == "host" else layer
    form = quant.format_of(name)
    if type(layer) is not nn.Linear or form == "none":
        return layer
    return quantize_linear(layer, form, keep_transposed=quant.keeps_transposed(name))


def device_for(quant: QuantSection, name: str, device: torch.device) -> torch.device:
    """Where the tensor ``name`` goes in a model on ``device``."""
    on_host = quant.embedding == "host" and name == "model.embed_tokens.weight"
    return torch.device("cpu") if on_host else device


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
