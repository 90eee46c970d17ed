"""Linear layers stored quantised. A layer is built when all of its tensors have been read.

In 4 bits they are in bitsandbytes' serialised layout: ``X.weight`` (the packed codes), ``X.weight.absmax``,
``X.weight.quant_map``, with double quantisation ``X.weight.nested_absmax`` and ``X.weight.nested_quant_map``, and
``X.weight.quant_state.bitsandbytes__fp4`` (or nf4): JSON as bytes.

In 8 bits, as `cogtune merge` writes them, they are ``X.weight`` [O, I] and a scale float32 [O]. With
``X.weight.scale.fp8`` the codes are the bits of e4m3 as uint8, and the weight is their value times the scale. With
``X.weight.scale.int8`` they are int8, and the scale is bitsandbytes': what 127 stands for.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from cogtune.checkpoint.place import Builder
from cogtune.checkpoint.quantize import require_bitsandbytes
from cogtune.checkpoint.stream import StoredTensor, read_whole
from cogtune.configuration.quantization import EIGHT_BIT, QuantSection, stored_otherwise
from cogtune.errors import CheckpointError
from cogtune.language import tr

_STATE = ".quant_state.bitsandbytes__"
_SCALE = ".scale."


def find(names: Collection[str]) -> set[str]:
    """Return the names of the weights that are stored packed (``X.weight``)."""
    return {weight for weight, _ in _marked(names)}


def kinds(names: Collection[str]) -> set[str]:
    """Return the formats of the weights that are stored packed: fp4, nf4, int8, fp8."""
    return {kind for _, kind in _marked(names)}


def _marked(names: Collection[str]) -> Iterator[tuple[str, str]]:
    """Yield each packed weight and its format, by the tensor that only such a weight has."""
    for name in names:
        for mark in (_STATE, f".weight{_SCALE}"):
            before, found, kind = name.partition(mark)
            if found:
                yield (before if mark == _STATE else f"{before}.weight"), kind


def check_asked(where: str, names: Collection[str], quant: QuantSection) -> None:
    """Check that nothing asks for another format than that of packed weights, which are taken over as they are.

    Raises:
        ConfigError: something does.
    """
    stored = kinds(names)
    for part, form in quant.formats.items():
        if stored and form not in ("none", *stored):
            raise stored_otherwise(where, part, form, ", ".join(sorted(stored)))


def require_for(names: Collection[str]) -> None:
    """Raise SetupError if there are weights of bitsandbytes' formats among the tensors and it is not installed."""
    if kinds(names) - {"fp8"}:
        require_bitsandbytes(tr("the folder's 4-bit and 8-bit weights"))


def owner(name: str, weights: Collection[str]) -> str | None:
    """Return the packed weight that the tensor ``name`` belongs to, or None."""
    if name in weights:
        return name
    weight, behind, _ = name.partition(".weight.")
    return f"{weight}.weight" if behind and f"{weight}.weight" in weights else None


def read_state(weight: str, stored: Mapping[str, StoredTensor]) -> Any:
    """Return bitsandbytes' ``QuantState`` of a packed weight, on the CPU.

    Raises:
        CheckpointError: its parts do not make one.
    """
    from bitsandbytes.functional import QuantState

    names = [name for name in stored if name.startswith(f"{weight}.")]
    parts = {name.removeprefix(f"{weight.rpartition('.')[0]}."): read_whole(stored[name]) for name in names}
    try:
        return QuantState.from_dict(parts, device=torch.device("cpu"))
    except (KeyError, ValueError, TypeError) as error:
        raise _no_layer(weight, error) from error


def whole_form(weight: str, stored: Mapping[str, StoredTensor]) -> tuple[torch.dtype, tuple[int, ...]]:
    """Return number format and shape of what a packed weight stands for.

    Raises:
        CheckpointError: its parts do not make a weight.
    """
    if _scale_of(weight, stored) is not None:
        return torch.bfloat16, stored[weight].shape
    state = read_state(weight, stored)
    return state.dtype, tuple(state.shape)


def _scale_of(weight: str, stored: Mapping[str, StoredTensor]) -> str | None:
    """Return the name of an 8-bit weight's scale; None: it is stored in 4 bits."""
    return next((f"{weight}{_SCALE}{kind}" for kind in EIGHT_BIT if f"{weight}{_SCALE}{kind}" in stored), None)


def dequantise(weight: str, stored: Mapping[str, StoredTensor]) -> torch.Tensor:
    """Return what a packed weight stands for, [O, I] on the CPU, in the format that it was quantised from.

    Raises:
        CheckpointError: its parts do not make a weight.
    """
    named = _scale_of(weight, stored)
    if named is not None:
        codes, scale = read_whole(stored[weight]), read_whole(stored[named])
        if codes.ndim != 2 or scale.shape != codes.shape[:1]:
            raise _no_layer(weight, ValueError(f"{list(scale.shape)} scales for {list(codes.shape)}"))
        if named.endswith("int8"):
            return (codes.float() * (scale / 127)[:, None]).bfloat16()
        return (codes.view(torch.float8_e4m3fn).float() * scale[:, None]).bfloat16()
    from bitsandbytes.functional import dequantize_4bit

    state, codes = read_state(weight, stored), read_whole(stored[weight]).view(torch.uint8).view(-1, 1)
    if codes.numel() != -(-state.shape.numel() // 2):
        raise _no_layer(weight, ValueError(f"{codes.numel()} bytes for {list(state.shape)}"))
    shape, state.shape = state.shape, torch.Size((state.shape.numel(),))  # flat: see `model.quantized.nf4.dequantises`
    whole: torch.Tensor = dequantize_4bit(codes, state)
    return whole.view(shape)


class Collector:
    """Collects the tensors of packed layers and builds each layer when it is complete.

    Args:
        tensors: names of all tensors that will come.
        shapes: of the whole weights that are packed, by name.
    """

    def __init__(self, tensors: Iterable[str], builder: Builder, shapes: Mapping[str, torch.Size]) -> None:
        tensors = list(tensors)
        require_for(tensors)
        self._builder, self._shapes = builder, shapes
        self._parts: dict[str, dict[str, torch.Tensor]] = {weight: {} for weight in shapes}
        self._expected = Counter(owner(name, shapes) for name in tensors)

    def take(self, name: str, value: torch.Tensor) -> bool:
        """Store ``name`` if it belongs to a packed layer, and return whether it does. The last tensor builds the
        layer."""
        weight = owner(name, self._shapes)
        if weight is None:
            return False
        parts = self._parts[weight]
        parts[name.removeprefix(weight).removeprefix(".")] = value
        if len(parts) == self._expected[weight]:
            self._make(weight, self._parts.pop(weight))
        return True

    def _make(self, weight: str, parts: dict[str, torch.Tensor]) -> None:
        path = weight.removesuffix(".weight")
        try:
            layer = self._built(path, parts, self._shapes[weight])
        except (KeyError, ValueError) as error:
            raise _no_layer(weight, error) from error
        self._builder.replace(path, layer)

    def _built(self, path: str, parts: dict[str, torch.Tensor], shape: torch.Size) -> nn.Module:
        if "scale.fp8" in parts:
            from cogtune.model.quantized.fp8 import Fp8Linear

            _require_codes(parts, "scale.fp8", shape, torch.uint8)
            keep = self._builder.quantization.keeps_transposed(path)
            return Fp8Linear.from_codes(parts[""], parts["scale.fp8"], keep_transposed=keep)
        from cogtune.model.quantized import bnb_linear

        if "scale.int8" in parts:
            _require_codes(parts, "scale.int8", shape, torch.int8)
            return bnb_linear.int8_from_codes(parts[""], parts["scale.int8"])
        return bnb_linear.from_stored(parts, shape, self._builder.dtype)


def _require_codes(parts: dict[str, torch.Tensor], scale: str, shape: torch.Size, dtype: torch.dtype) -> None:
    codes = parts[""]
    if codes.shape != shape or codes.dtype != dtype or parts[scale].shape != shape[:1]:
        raise ValueError(f"codes {list(codes.shape)} {codes.dtype} and scales {list(parts[scale].shape)}, expected"
                         f" {list(shape)} {dtype}")  # fmt: skip


def _no_layer(weight: str, error: Exception) -> CheckpointError:
    return CheckpointError(
        tr("{weight}: its quantised parts do not make this layer: {error}", weight=weight, error=error),
        hint=tr("check that config.json belongs to these shards and that every shard is complete"),
        code="checkpoint-tensors",
    )
