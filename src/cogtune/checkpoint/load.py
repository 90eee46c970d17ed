"""Load a base model: straight to its device and dtype, tensor by tensor, and only the parts that are used.

The folder is checked first (`checkpoint.model_files`). The model is created on the meta device. Tensors are put into it
as they are read (`checkpoint.stream`), quantised if asked, and passed unit by unit to an engine that shards them
(`checkpoint.place`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from cogtune.checkpoint import stored_4bit
from cogtune.checkpoint.model_files import (
    check_folder,
    load_model_config,
    read_generation_config,
    shard_files,
    stored_tensors,
    unread_weights,
    whole_folder,
)
from cogtune.checkpoint.place import Builder, Cutting, Placement, require_filled
from cogtune.checkpoint.quantize import device_for, mark_for_adapters, require_packages
from cogtune.checkpoint.stream import StoredTensor, stream
from cogtune.configuration.quantization import PLAIN, QuantSection
from cogtune.configuration.shapes import TOWER, VISION
from cogtune.language import tr
from cogtune.model.modeling import CogVLM2ForCausalLM
from cogtune.model.pretrained import require_exact
from cogtune.model.vision import VisionModel

log = logging.getLogger("cogtune")

_told: set[str] = set()

Progress = Callable[[int, int], None]
"""Told the bytes that were read and all that will be."""


class _Count:
    """Counts the bytes of tensors that were read."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self._progress, self._done, self._total = progress, 0, total
        self._tell()

    def add(self, tensor: StoredTensor) -> None:
        self._done += tensor.stop - tensor.start
        self._tell()

    def _tell(self) -> None:
        if self._progress is not None:
            self._progress(self._done, self._total)


def load_model(
    path: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    rope_precision: str | None = None,
    vision_tower: bool = True,
    quantization: QuantSection | None = None,
    placement: Placement | None = None,
    progress: Progress | None = None,
) -> CogVLM2ForCausalLM:
    """Return the base model on ``device`` in ``dtype``, in evaluation mode.

    Args:
        path: a folder in the published layout, or a hub id (downloaded completely, unless it is in the hub's cache).
        rope_precision: "float32" overrides the configuration's; None and "checkpoint" leave it.
        vision_tower: False: patch embedding, transformer and convolution are neither created nor read, and the model
            takes ``image_features``.
        quantization: formats of frozen parts, quantised on ``device`` as they arrive.
        placement: decides each tensor's device instead of ``device``, and receives every unit when it is complete.
        progress: called with the bytes read so far and all that will be read, first with 0.

    Raises:
        CheckpointError: the folder does not fit the model; the message names files and tensors.
        SetupError: quantisation needs a missing package or another GPU.
    """
    quantization = quantization or PLAIN
    require_packages(quantization)
    folder, config = _folder(path), load_model_config(path)
    if rope_precision == "float32":
        config.rope_precision = rope_precision
    vision: Any = config.vision_config
    config.dtype = vision.dtype = dtype
    config.name_or_path = str(path)  # adapters name it as their base
    with torch.device("meta"):
        model = CogVLM2ForCausalLM(config)
    if not vision_tower:
        model.model.vision.drop_tower()
    _fill(model, "", folder, dtype, torch.device(device), quantization, placement, progress)
    model.model.remember_rotary()
    generation = read_generation_config(folder)
    if generation is not None:
        model.generation_config = generation
    mark_for_adapters(model)
    loaded: CogVLM2ForCausalLM = model.eval()
    return loaded


def load_tower(
    path: str | Path,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    quantization: QuantSection | None = None,
    placement: Placement | None = None,
) -> VisionModel:
    """Return patch embedding, transformer and convolution only: `VisionModel.features` works, its ``forward`` does not.

    ``placement``: as in `load_model`.

    Raises:
        CheckpointError, SetupError: as `load_model`.
    """
    quantization = quantization or PLAIN
    require_packages(quantization)
    folder, config = _folder(path), load_model_config(path)
    with torch.device("meta"):
        vision = VisionModel(config)
    for name in ("linear_proj", "boi", "eoi"):
        delattr(vision, name)
    _fill(vision, VISION, folder, dtype, torch.device(device), quantization, placement)
    return vision.eval()


def _folder(path: str | Path) -> Path:
    """Return the model's folder, after checking it."""
    load_model_config(path)  # report its errors first
    folder = whole_folder(path)
    check_folder(folder)
    unread = unread_weights(folder)
    if unread and str(folder) not in _told:
        _told.add(str(folder))
        read = next(iter(shard_files(folder)))
        log.warning(
            "%s",
            tr("{folder}: {read} is read, {unread} beside it is not", folder=folder, read=read, unread=unread[0]),
        )
    return folder


def _fill(
    root: nn.Module,
    prefix: str,
    folder: Path,
    dtype: torch.dtype,
    device: torch.device,
    quantization: QuantSection,
    placement: Placement | None,
    progress: Progress | None = None,
) -> None:
    """Read the tensors of ``root`` (called ``prefix`` in the model) from ``folder``."""
    stored = stored_tensors(folder)
    wanted = {prefix + name: tuple(value.shape) for name, value in root.state_dict().items()}
    layers = stored_4bit.find(stored)
    stored_4bit.check_asked(str(folder), stored, quantization)
    plain = {name: tensor for name, tensor in stored.items() if stored_4bit.owner(name, layers) is None}
    require_exact(str(folder), _compare(wanted, plain, layers, whole=_is_skipped(wanted)))
    cutting = placement if isinstance(placement, Cutting) else None
    if cutting is not None:
        cutting.prepare(root)

    def place(name: str) -> torch.device:
        return device_for(quantization, name, device if placement is None else placement.device_for(name))

    builder = Builder(root, prefix, dtype, quantization, placement)
    chosen = [t for name, t in stored.items() if name in wanted or stored_4bit.owner(name, layers) in wanted]
    count = _Count(progress, sum(tensor.stop - tensor.start for tensor in chosen))
    if cutting is not None:
        _read_parts(builder, cutting, chosen, place, count)
    else:
        shapes = {name: torch.Size(wanted[name]) for name in layers & wanted.keys()}
        collector = stored_4bit.Collector([tensor.name for tensor in chosen], builder, shapes)
        for tensor, value in stream(chosen, place):
            if not collector.take(tensor.name, value):
                builder.add(tensor.name, value)
            count.add(tensor)
    require_filled(root)


def _is_skipped(wanted: dict[str, tuple[int, ...]]) -> Callable[[str], bool]:
    """Return a predicate for stored tensors that belong to parts left out of a model with the ``wanted`` tensors."""
    tower = any(name.startswith(TOWER[0]) for name in wanted)
    rest = "lm_head.weight" in wanted

    def is_skipped(name: str) -> bool:
        in_tower = name.startswith(TOWER)
        return not (tower if in_tower else rest)

    return is_skipped


def _compare(
    wanted: dict[str, tuple[int, ...]], stored: dict[str, StoredTensor], layers: set[str], whole: Callable[[str], bool]
) -> dict[str, Any]:
    """Return missing, unexpected and mismatched tensors in the form of transformers' loading report."""
    return {
        "missing_keys": wanted.keys() - stored.keys() - layers,
        "unexpected_keys": [name for name in (stored.keys() | layers) - wanted.keys() if not whole(name)],
        "mismatched_keys": [
            (name, stored[name].shape, shape)
            for name, shape in wanted.items()
            if name in stored and stored[name].shape != shape
        ],
    }


def _read_parts(
    builder: Builder,
    cutting: Cutting,
    tensors: list[StoredTensor],
    place: Callable[[str], torch.device],
    count: _Count,
) -> None:
    """Read only this process's shard of each tensor."""
    for file in dict.fromkeys(tensor.file for tensor in tensors):
        with _sliced(file) as source:
            for tensor in tensors:
                if tensor.file == file:
                    part = cutting.read(tensor.name, source(tensor.name))
                    builder.add(tensor.name, part.contiguous().to(place(tensor.name)))
                    count.add(tensor)


@contextmanager
def _sliced(file: Path) -> Iterator[Callable[[str], Any]]:
    """Yield a function that returns a tensor of a file by name, of which only the slices taken are read."""
    if file.suffix == ".safetensors":
        with safe_open(str(file), framework="pt") as source:
            yield source.get_slice
    else:  # `check_folder` has looked at what its pickle imports
        yield torch.load(file, map_location="cpu", mmap=True, weights_only=True).__getitem__
