"""Linear layers stored in 4 bits, in bitsandbytes' serialised layout.

Each has ``X.weight`` (the packed codes), ``X.weight.absmax``, ``X.weight.quant_map``, with double quantisation
``X.weight.nested_absmax`` and ``X.weight.nested_quant_map``, and ``X.weight.quant_state.bitsandbytes__fp4`` (or nf4):
JSON as bytes. A layer is built when all of them have been read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping

import torch

from cogtune.checkpoint.place import Builder
from cogtune.checkpoint.quantize import require_bitsandbytes
from cogtune.errors import CheckpointError
from cogtune.language import tr

_STATE = ".quant_state.bitsandbytes__"


def find(names: Collection[str]) -> set[str]:
    """Return the names of the weights that are stored packed (``X.weight``)."""
    return {name.partition(_STATE)[0] for name in names if _STATE in name}


def owner(name: str, weights: Collection[str]) -> str | None:
    """Return the packed weight that the tensor ``name`` belongs to, or None."""
    if name in weights:
        return name
    weight, behind, _ = name.partition(".weight.")
    return f"{weight}.weight" if behind and f"{weight}.weight" in weights else None


class Collector:
    """Collects the tensors of packed layers and builds each layer when it is complete.

    Args:
        tensors: names of all tensors that will come.
        shapes: of the whole weights that are packed, by name.
    """

    def __init__(self, tensors: Iterable[str], builder: Builder, shapes: Mapping[str, torch.Size]) -> None:
        if shapes:
            require_bitsandbytes(tr("the folder's 4-bit weights"))
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
            layer = from_stored(parts, self._shapes[weight], parts[""].device)
        except (KeyError, ValueError) as error:
            raise CheckpointError(
                tr("{weight}: its 4-bit parts do not make this layer: {error}", weight=weight, error=error),
                hint=tr("check that config.json belongs to these shards and that every shard is complete"),
                code="checkpoint-tensors",
            ) from error
        self._builder.replace(weight.removesuffix(".weight"), layer)
