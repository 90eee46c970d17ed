"""Quantisation of frozen parts while a model loads.

A layer is quantised on its own device, the GPU, as the model streams in. Only one layer at a time is there in full
precision, so peak memory is the quantised model plus one layer.
"""

from __future__ import annotations

import importlib.util

import torch
from torch import nn

from cogtune.configuration.quantization import FOUR_BIT, QuantSection
from cogtune.errors import SetupError
from cogtune.language import tr
from cogtune.model.quantized.host_embedding import HostEmbedding

_FROM_BITSANDBYTES = (*FOUR_BIT, "int8")


def require_packages(quant: QuantSection) -> None:
    """Raise SetupError if a format needs a package that is not installed."""
    needed = [form for form in _FROM_BITSANDBYTES if form in quant.formats.values()]
    if needed:
        require_bitsandbytes(tr("{needed} weights", needed=needed[0]))


def convert(quant: QuantSection, name: str, layer: nn.Module) -> nn.Module:
    """Return the complete layer called ``name`` in its format: itself, or its quantised replacement."""
    if name == "model.embed_tokens":
        assert isinstance(layer, nn.Embedding)
        return HostEmbedding(layer.weight.data) if quant.embedding == "host" else layer
    form = quant.format_of(name)
    if type(layer) is not nn.Linear or form == "none":
        return layer
    return quantize_linear(layer, form, keep_transposed=quant.keeps_transposed(name))


def device_for(quant: QuantSection, name: str, device: torch.device) -> torch.device:
    """Return the device of the tensor ``name`` in a model on ``device``."""
    on_host = quant.embedding == "host" and name == "model.embed_tokens.weight"
    return torch.device("cpu") if on_host else device


def quantize_linear(layer: nn.Linear, form: str, *, keep_transposed: bool = False) -> nn.Module:
    """Quantise a frozen layer to ``form`` (nf4, fp4, int8 or fp8) on its device. ``keep_transposed``: keep fp8's
    transposed weight."""
    if form == "fp8":
        from cogtune.model.quantized.fp8 import Fp8Linear

        bias = None if layer.bias is None else layer.bias.data
        return Fp8Linear.from_weight(layer.weight.data, bias, keep_transposed=keep_transposed)
    from cogtune.model.quantized import bnb_linear  # it imports bitsandbytes

    return bnb_linear.to_four_bit(layer, form) if form in FOUR_BIT else bnb_linear.to_int8(layer)


def stored_parts(form: str, name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """Quantise the weight called ``name`` [O, I] float32 to the tensors that a folder stores; see
    `checkpoint.stored_4bit`.

    Loading them gives the layer that `quantize_linear` makes of the same weight.
    """
    if form == "fp8":
        from cogtune.model.quantized.fp8 import quantize_rows

        codes, scale = quantize_rows(weight)
        return {name: codes.view(torch.uint8), f"{name}.scale.fp8": scale[:, 0].contiguous()}
    from bitsandbytes import functional

    if form == "int8":
        codes, largest, _ = functional.int8_vectorwise_quant(weight.to(torch.float16))
        return {name: codes, f"{name}.scale.int8": largest}
    codes, state = functional.quantize_4bit(weight, quant_type=form, compress_statistics=True)
    state.dtype = torch.bfloat16  # what it is dequantised to; the codes are those of the exact weight
    return {name: codes, **{f"{name}.{key}": value for key, value in state.as_dict(packed=True).items()}}


def require_bitsandbytes(what: str) -> None:
    """Raise SetupError, with the command to type, if bitsandbytes is not installed."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise SetupError(
            tr("{what} need bitsandbytes, which is not installed", what=what),
            hint='pip install "cogtune[quant]"',
            code="no-bitsandbytes",
        )


def mark_for_adapters(model: nn.Module) -> None:
    """Set the attributes by which peft recognises a model with bitsandbytes layers."""
    kinds = {type(module).__name__ for module in model.modules()}
    model.is_loaded_in_4bit = "FourBitLinear" in kinds  # type: ignore[assignment]
    model.is_loaded_in_8bit = "Int8Linear" in kinds  # type: ignore[assignment]
