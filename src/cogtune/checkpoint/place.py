"""Fill a model on the meta device tensor by tensor: cast, place, quantise, and pass complete units to an engine."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn

from cogtune.checkpoint.quantize import convert
from cogtune.configuration.quantization import PLAIN, QuantSection
from cogtune.distributed.shards import note_whole_numel, whole_numel
from cogtune.model.modeling import DecoderLayer
from cogtune.model.quantized.host_embedding import HostEmbedding
from cogtune.model.vision import GLUAdapter, PatchEmbedding, VisionLayer

UNITS = (DecoderLayer, VisionLayer, PatchEmbedding, GLUAdapter)
"""Module classes that are passed to the placement when complete, as are the embedding and the head."""
_NAMED_UNITS = ("embed_tokens", "lm_head")


class Placement(Protocol):
    """Decides each tensor's device, and processes each unit when it is complete (and quantised)."""

    def device_for(self, name: str) -> torch.device:
        """Return the device of the model's tensor ``name``."""
        ...

    def finish(self, unit_name: str, module: nn.Module) -> None:
        """Process a complete unit, for example shard it."""
        ...


@runtime_checkable
class Cutting(Protocol):
    """A placement that keeps a shard of each tensor."""

    def prepare(self, model: nn.Module) -> None:
        """Resize the model's tensors, on the meta device, to this process's shard."""
        ...

    def read(self, name: str, whole: Any) -> torch.Tensor:
        """Return the shard of ``whole``, which is sliced like a tensor and reads only that slice."""
        ...


class Builder:
    """Fills ``root``, whose tensors are named ``prefix`` + their names in it."""

    def __init__(
        self,
        root: nn.Module,
        prefix: str,
        dtype: torch.dtype,
        quantization: QuantSection | None,
        placement: Placement | None,
    ) -> None:
        self._root, self._prefix, self.dtype, self._placement = root, prefix, dtype, placement
        self.quantization = quantization or PLAIN
        names = list(root.state_dict())
        self._layers = Counter(name.rpartition(".")[0] for name in names)  # module path -> number of missing tensors
        self._units = find_units(root)
        self._unit_of = {name: unit for name in names if (unit := self._find_unit(name)) is not None}
        self._left = Counter(self._unit_of.values())

    def add(self, name: str, value: torch.Tensor) -> None:
        """Store a tensor, which is on its device already, in its module."""
        name = name.removeprefix(self._prefix)
        path, _, key = name.rpartition(".")
        module = self._root.get_submodule(path)
        put(module, key, value.to(self.dtype) if value.is_floating_point() else value)
        self.added(name, path)

    def replace(self, path: str, layer: nn.Module) -> None:
        """Replace a linear layer by one that was stored quantised; its bias is a tensor of its own and is added
        separately."""
        path = path.removeprefix(self._prefix)
        layer.bias = self._root.get_submodule(path).bias
        self._root.set_submodule(path, layer)
        self.added(f"{path}.weight", path)

    def added(self, name: str, path: str) -> None:
        """Count a tensor as filled, and process the layer and the unit that it completes."""
        self._layers[path] -= 1
        if self._layers[path] == 0:
            self._complete_layer(path)
        unit = self._unit_of.get(name)
        if unit is None:
            return
        self._left[unit] -= 1
        module = self._root.get_submodule(unit)
        if self._left[unit] == 0 and self._placement is not None and not isinstance(module, HostEmbedding):
            self._placement.finish(self._prefix + unit, module)

    def _complete_layer(self, path: str) -> None:
        layer = self._root.get_submodule(path)
        changed = convert(self.quantization, self._prefix + path, layer)
        if changed is not layer:
            self._root.set_submodule(path, changed)

    def _find_unit(self, name: str) -> str | None:
        parts = name.split(".")
        paths = (".".join(parts[:depth]) for depth in range(1, len(parts)))
        return next((path for path in paths if path in self._units), None)


def find_units(root: nn.Module) -> set[str]:
    """Return the names of the units in a model."""
    return {
        name
        for name, module in root.named_modules()
        if isinstance(module, UNITS) or name.rpartition(".")[2] in _NAMED_UNITS
    }


def put(module: nn.Module, key: str, value: torch.Tensor) -> None:
    """Replace a parameter or buffer; the recorded number of whole values stays with a parameter."""
    old = getattr(module, key)
    if not isinstance(old, nn.Parameter):
        module.register_buffer(key, value)
        return
    new = nn.Parameter(value, requires_grad=old.requires_grad and value.is_floating_point())
    note_whole_numel(new, whole_numel(old))
    setattr(module, key, new)


def require_filled(root: nn.Module) -> None:
    """Assert that every tensor is filled. Names were compared before anything was read, so a failure is a bug."""
    tensors: Iterable[tuple[str, torch.Tensor]] = [*root.named_parameters(), *root.named_buffers()]
    empty = [name for name, value in tensors if value.is_meta]
    assert not empty, f"not filled: {empty[:8]}"
