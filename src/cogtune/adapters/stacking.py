"""Read several adapter folders for one base, to be computed beside each other (`model.stacked_adapters`)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import nn

from cogtune.adapters.adapter_folder import WEIGHTS_NAME, AdapterFolder, find_adapter, read_adapter
from cogtune.adapters.attach import expected_shapes, require_finite
from cogtune.adapters.merge_arithmetic import Change, read_changes
from cogtune.errors import AdapterError
from cogtune.language import tr
from cogtune.model.stacked_adapters import StackedAdapters, Update
from cogtune.system.terminal import typed


def stack_adapters(model: Any, folders: Mapping[str, str | Path]) -> StackedAdapters:
    """Put the adapters in ``folders`` (name -> adapter folder, or a run's output) in place on ``model``.

    Raises:
        AdapterError: no adapter there, one made for another base, with values that are not finite, or of a kind that
            cannot be computed beside others (``adapter-stack``).
    """
    wanted: dict[str, dict[str, list[int]]] = {}
    base = _layers(model)
    updates = {name: _updates(model, base, read_adapter(find_adapter(folders[name])), wanted) for name in folders}
    return StackedAdapters(model, updates)


def _layers(model: nn.Module) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return the base's tensors as `read_changes` takes them, with the shapes of unquantised weights."""
    found: dict[str, tuple[str, tuple[int, ...]]] = {}
    for path, layer in model.named_modules():
        for name, parameter in layer.named_parameters(recurse=False):
            shape = tuple(parameter.shape)
            if name == "weight" and isinstance(layer, nn.Linear):
                shape = (layer.out_features, layer.in_features)
            found[f"{path}.{name}".removeprefix(".")] = ("F32", shape)
        if isinstance(layer, nn.Linear):  # weights of quantised layers may be buffers
            found[f"{path}.weight"] = ("F32", (layer.out_features, layer.in_features))
    return found


def _updates(
    model: Any,
    base: Mapping[str, tuple[str, tuple[int, ...]]],
    adapter: AdapterFolder,
    known: dict[str, dict[str, list[int]]],
) -> dict[str, Update]:
    """Return A and scaled B of an adapter's modules. ``known``: shapes by configuration, which adapters often share."""
    key = json.dumps({name: adapter.config[name] for name in sorted(adapter.config)}, default=str)
    if key not in known:
        known[key] = expected_shapes(model.config, adapter)
    try:
        changes = read_changes(adapter, base, known[key])
    except AdapterError as error:
        if error.code != "adapter-merge":
            raise
        raise _unstackable(adapter, error.message.removeprefix(f"{adapter.folder}: ")) from error
    tensors = load_file(adapter.folder / WEIGHTS_NAME)
    require_finite(adapter.folder, tensors)
    other = [*changes.biases, *changes.replaced, *changes.copies]
    other += [name for name, change in changes.weights.items() if not _is_plain(change, tensors)]
    if other:
        raise _unstackable(adapter, tr("it changes {name} by more than a low-rank update", name=other[0]))
    return {
        change.module: (tensors[change.factors["a"]], tensors[change.factors["b"]].float() * change.scale)
        for change in changes.weights.values()
    }


def _is_plain(change: Change, tensors: Mapping[str, Any]) -> bool:
    """Return whether it is a low-rank update of a linear layer and nothing else (no DoRA, no embedding)."""
    return set(change.factors) == {"a", "b"} and all(tensors[name].dim() == 2 for name in change.factors.values())


def _unstackable(adapter: AdapterFolder, reason: str) -> AdapterError:
    return AdapterError(
        tr(
            "{folder}: only plain LoRA adapters are computed beside others ({reason})",
            folder=adapter.folder,
            reason=reason,
        ),
        hint=tr("give this adapter alone: --adapter {folder}", folder=typed(adapter.folder)),
        code="adapter-stack",
    )
