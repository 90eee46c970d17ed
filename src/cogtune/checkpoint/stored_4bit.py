"""Linear layers stored in 4 bits, in bitsandbytes' serialised layout.

Each has ``X.weight`` (the packed codes), ``X.weight.absmax``, ``X.weight.quant_map``, with double quantisation
``X.weight.nested_absmax`` and ``X.weight.nested_quant_map``, and ``X.weight.quant_state.bitsandbytes__fp4`` (or nf4):
JSON as bytes. A layer is built when all of them have been read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch

from cogtune.checkpoint.place import Builder
from cogtune.checkpoint.quantize import require_bitsandbytes
from cogtune.checkpoint.stream import StoredTensor, read_whole
from cogtune.configuration.quantization import QuantSection, stored_otherwise
from cogtune.errors import CheckpointError
from cogtune.language import tr

_STATE = ".quant_state.bitsandbytes__"


def find(names: Collection[str]) -> set[str]:
    """Return the names of the weights that are stored packed (``X.weight``)."""
    return {name.partition(_STATE)[0] for name in names if _STATE in name}


def kinds(names: Collection[str]) -> set[str]:
    """Return the formats of the weights that are stored packed: fp4, nf4."""
    return {name.partition(_STATE)[2] for name in names if _STATE in name}


def check_asked(where: str, names: Collection[str], quant: QuantSection) -> None:
    """Check that nothing asks for another format than that of packed weights, which are taken over as they are.

    Raises:
        ConfigError: something does.
    """
    stored = kinds(names)
    for part, form in quant.formats.items():
        if stored and form not in ("none", *stored):
            raise stored_otherwise(where, part, form, ", ".join(sorted(stored)))


def require_for(weights: Collection[str]) -> None:
    """Raise SetupError if there are packed ``weights`` and bitsandbytes is not installed."""
    if weights:
        require_bitsandbytes(tr("the folder's 4-bit weights"))


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


def dequantise(weight: str, stored: Mapping[str, StoredTensor]) -> torch.Tensor:
    """Return what a packed weight stands for, [O, I] on the CPU, in the format that it was quantised from.

    Raises:
        CheckpointError: its parts do not make a weight.
    """
    from bitsandbytes.functional import dequantize_4bit

    state, codes = read_state(weight, stored), read_whole(stored[weight]).view(torch.uint8).view(-1, 1)
    if codes.numel() != -(-state.shape.numel() // 2):
        raise _no_layer(weight, ValueError(f"{codes.numel()} bytes for {list(state.shape)}"))
    whole: torch.Tensor = dequantize_4bit(codes, state)
    return whole


class Collector:
    """Collects the tensors of packed layers and builds each layer when it is complete.

    Args:
        tensors: names of all tensors that will come.
        shapes: of the whole weights that are packed, by name.
    """

    def __init__(self, tensors: Iterable[str], builder: Builder, shapes: Mapping[str, torch.Size]) -> None:
        require_for(shapes)
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
        from cogtune.model.quantized.bnb_linear import from_stored

        try:
            layer = from_stored(parts, self._shapes[weight], self._builder.dtype)
        except (KeyError, ValueError) as error:
            raise _no_layer(weight, error) from error
        self._builder.replace(weight.removesuffix(".weight"), layer)


def _no_layer(weight: str, error: Exception) -> CheckpointError:
    return CheckpointError(
        tr("{weight}: its 4-bit parts do not make this layer: {error}", weight=weight, error=error),
        hint=tr("check that config.json belongs to these shards and that every shard is complete"),
        code="checkpoint-tensors",
    )
