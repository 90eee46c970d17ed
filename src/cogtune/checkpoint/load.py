"""Loading a base model: straight to device and number format, a tensor at a time, and only the parts that are used.

The folder is checked before any weight is read, so that every mistake has a name. The model is made on the meta device,
tensors are put into it as they are read (`checkpoint.stream`), quantised where asked, and handed on unit by unit to an
engine that shards them (`checkpoint.place`).
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from safetensors import safe_open
from torch import nn
from transformers import GenerationConfig

from cogtune.checkpoint import stored_4bit
from cogtune.checkpoint.place import Builder, Cutting, Placement, require_filled
from cogtune.checkpoint.quantize import device_for, mark_for_adapters, require_packages
from cogtune.checkpoint.stream import Stored, find_stored, stream
from cogtune.configuration.model import CogVLM2Config
from cogtune.configuration.quantization import PLAIN, QuantSection
from cogtune.configuration.shapes import TOWER, VISION
from cogtune.errors import CheckpointError, SetupError
from cogtune.model.device_map import Spread, plan_spread
from cogtune.model.modeling import CogVLM2ForCausalLM
from cogtune.model.pretrained import require_exact
from cogtune.model.vision import VisionModel

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
ROUTES = (
    "fetch it with `cogtune download model --output cogvlm2` (from Hugging Face) or `cogtune download model --source "
    "modelscope --output cogvlm2`, then pass that folder"
)


def load_config(path: str | Path) -> CogVLM2Config:
    """The model configuration of a folder or hub id.

    Raises:
        CheckpointError: no such folder, no ``config.json`` in it, or one that is not valid.
    """
    folder = Path(path)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise CheckpointError(
            f"{folder}: no config.json; expected a model folder", hint=ROUTES, code="checkpoint-config"
        )
    _require_found(path)
    try:
        return CogVLM2Config.from_pretrained(path)
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(
            f"{path}: config.json cannot be read: {error}", hint=ROUTES, code="checkpoint-config"
        ) from error


def load_model(
    path: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    rope_precision: str | None = None,
    vision_tower: bool = True,
    quantization: QuantSection | None = None,
    placement: Placement | None = None,
) -> CogVLM2ForCausalLM:
    """The base model on ``device`` in ``dtype``, in evaluation mode.

    Args:
        path: a folder in the published layout, or a hub id (fetched whole, unless it is in the hub's cache).
        rope_precision: overrides the configuration's ("checkpoint" or "float32").
        vision_tower: without it patch embedding, transformer and convolution are neither made nor read; the model then
            takes ``image_features``.
        quantization: frozen parts to keep in fewer bits; quantised on ``device`` as they arrive.
        placement: decides each tensor's device instead of ``device``, and gets every unit when it is complete.

    Raises:
        CheckpointError: anything about the folder that does not fit; the message names files and tensors.
        SetupError: a quantisation that needs a package that is missing, or another card.
    """
    quantization = quantization or PLAIN
    require_packages(quantization)
    folder, config = _folder(path), load_config(path)
    if rope_precision is not None:
        config.rope_precision = rope_precision
    vision: Any = config.vision_config
    config.dtype = vision.dtype = dtype
    config.name_or_path = str(path)  # adapters name it as their base
    with torch.device("meta"):
        model = CogVLM2ForCausalLM(config)
    if not vision_tower:
        model.model.vision.drop_tower()
    _fill(model, "", folder, dtype, torch.device(device), quantization, placement)
    model.model.remember_rotary()
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    mark_for_adapters(model)
    loaded: CogVLM2ForCausalLM = model.eval()
    return loaded


def spread_over(
    path: str | Path,
    free: Sequence[tuple[torch.device, int]],
    *,
    host: bool,
    dtype: torch.dtype,
    quantization: QuantSection,
) -> Spread:
    """A placement for `load_model` over GPUs with their free bytes, in order; ``host``: layers may wait there.

    Raises:
        SetupError: the devices cannot hold the model, or layers in fewer bits would have to wait on the host.
    """
    if quantization.embedding == "host" or (host and quantization.experts != "none"):
        what = "quant.embedding host" if quantization.embedding == "host" else f"quant.experts {quantization.experts}"
        raise SetupError(
            f"{what} does not go with these devices: layers wait in host memory only in the model's own number format, "
            "and the embedding belongs to the first of several devices",
            hint="leave it out, or use one device",
            code="config-combination",
        )
    config = load_config(path)
    with torch.device("meta"):
        model = CogVLM2ForCausalLM(config)
    sizes = {}
    for name, value in model.state_dict().items():
        form = quantization.format_of(name.rpartition(".")[0]) if value.ndim == 2 else "none"
        sizes[name] = round(value.numel() * _BYTES.get(form, dtype.itemsize))
    return plan_spread(sizes, config.num_hidden_layers, free, host=host)


_BYTES = {"nf4": 0.53, "int8": 1.01, "fp8": 1.01}
"""Of a weight with its share of the scales."""


def load_tower(
    path: str | Path,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    quantization: QuantSection | None = None,
) -> VisionModel:
    """Patch embedding, transformer and convolution alone: `VisionModel.features` works, its ``forward`` does not.

    Raises:
        CheckpointError, SetupError: as `load_model`.
    """
    quantization = quantization or PLAIN
    require_packages(quantization)
    folder, config = _folder(path), load_config(path)
    with torch.device("meta"):
        vision = VisionModel(config)
    for name in ("linear_proj", "boi", "eoi"):
        delattr(vision, name)
    _fill(vision, VISION, folder, dtype, torch.device(device), quantization, None)
    return vision.eval()


def _folder(path: str | Path) -> Path:
    """The model's folder, checked."""
    load_config(path)  # its errors are the first to be shown
    folder = whole_folder(path)
    check_folder(folder)
    return folder


def _fill(
    root: nn.Module,
    prefix: str,
    folder: Path,
    dtype: torch.dtype,
    device: torch.device,
    quantization: QuantSection,
    placement: Placement | None,
) -> None:
    """Read what ``root`` (called ``prefix`` in the model) needs from ``folder`` into it."""
    stored = stored_tensors(folder)
    wanted = {prefix + name: tuple(value.shape) for name, value in root.state_dict().items()}
    layers = stored_4bit.find(stored)
    plain = {name: tensor for name, tensor in stored.items() if stored_4bit.owner(name, layers) is None}
    require_exact(str(folder), _compare(wanted, plain, layers, whole=_is_skipped(wanted)))
    cutting = placement if isinstance(placement, Cutting) else None
    if cutting is not None:
        cutting.prepare(root)

    def place(name: str) -> torch.device:
        return device_for(quantization, name, device if placement is None else placement.device_for(name))

    builder = Builder(root, prefix, dtype, quantization, placement)
    chosen = [t for name, t in stored.items() if name in wanted or stored_4bit.owner(name, layers) in wanted]
    if cutting is not None:
        _read_parts(builder, cutting, chosen, place)
    else:
        shapes = {name: torch.Size(wanted[name]) for name in layers & wanted.keys()}
        collector = stored_4bit.Collector([tensor.name for tensor in chosen], builder, shapes)
        for tensor, value in stream(chosen, place):
            if not collector.take(tensor.name, value):
                builder.add(tensor.name, value)
    require_filled(root)


def _is_skipped(wanted: dict[str, tuple[int, ...]]) -> Callable[[str], bool]:
    """Which of the folder's tensors a model with these is allowed not to have: parts that were left out."""
    tower = any(name.startswith(TOWER[0]) for name in wanted)
    rest = "lm_head.weight" in wanted

    def is_skipped(name: str) -> bool:
        in_tower = name.startswith(TOWER)
        return not (tower if in_tower else rest)

    return is_skipped


def _compare(
    wanted: dict[str, tuple[int, ...]], stored: dict[str, Stored], layers: set[str], whole: Callable[[str], bool]
) -> dict[str, Any]:
    """What is missing, left over and of another shape, in the form of transformers' report."""
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
    builder: Builder, cutting: Cutting, tensors: list[Stored], place: Callable[[str], torch.device]
) -> None:
    """Only the part of each tensor that this process keeps is read."""
    for file in dict.fromkeys(tensor.file for tensor in tensors):
        with safe_open(str(file), framework="pt") as source:
            for tensor in tensors:
                if tensor.file == file:
                    part = cutting.read(tensor.name, source.get_slice(tensor.name))
                    builder.add(tensor.name, part.contiguous().to(place(tensor.name)))


def stored_tensors(folder: Path) -> dict[str, Stored]:
    """Every tensor of a folder by name, in the order of its shards and of their bytes."""
    found: dict[str, Stored] = {}
    for shard, names in sorted(shard_files(folder).items()):
        listed = set(names)
        for tensor in find_stored(folder / shard, read_header(folder / shard)):
            if tensor.name not in found or tensor.name in listed:
                found[tensor.name] = tensor
    return found


def whole_folder(model: str | Path) -> Path:
    """The model's folder; a hub id is fetched whole, licences included (from the cache, where it is there).

    Raises:
        CheckpointError: neither.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    _require_found(model)
    try:
        return Path(snapshot_download(str(model)))
    except (OSError, HFValidationError) as error:
        raise CheckpointError(
            f"{model}: neither a folder here nor a hub repository that can be read ({str(error).strip():.300})",
            hint="check name and network, or download the model and give its folder",
            code="checkpoint-missing",
        ) from error


def shard_files(folder: Path) -> dict[str, list[str]]:
    """Shard file name -> names of the tensors it should hold (empty for a single file without an index).

    Raises:
        CheckpointError: neither an index nor a single weight file, or an index that is not valid JSON.
    """
    index = folder / INDEX_NAME
    if index.is_file():
        try:
            weight_map: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{index}: not a weight index: {error}", hint=ROUTES, code="checkpoint-index"
            ) from error
        files: dict[str, list[str]] = {}
        for name, file in weight_map.items():
            files.setdefault(file, []).append(name)
        return files
    if (folder / SINGLE_NAME).is_file():
        return {SINGLE_NAME: []}
    raise CheckpointError(
        f"{folder}: no weights; expected {INDEX_NAME} with its shards, or {SINGLE_NAME}",
        hint=ROUTES,
        code="checkpoint-shards",
    )


def read_header(file: Path) -> dict[str, dict[str, Any]]:
    """Names, dtypes, shapes and byte ranges of a safetensors file, without its payload.

    Raises:
        CheckpointError: not a safetensors file, or shorter than its header says.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        prefix = stream.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
        if length + 8 > size:
            raise _truncated(file, size, None)
        try:
            header: dict[str, dict[str, Any]] = json.loads(stream.read(length))
        except ValueError as error:
            raise _truncated(file, size, None) from error
    header.pop("__metadata__", None)
    payload = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if 8 + length + payload != size:
        raise _truncated(file, size, 8 + length + payload)
    return header


def check_folder(folder: Path) -> None:
    """Every shard is there, complete, and holds what the index says.

    Raises:
        CheckpointError: naming the file.
    """
    files = shard_files(folder)
    missing = sorted(name for name in files if not (folder / name).is_file())
    if missing:
        raise CheckpointError(
            f"{folder}: {len(missing)} of {len(files)} shards are missing: {', '.join(missing[:8])}",
            hint=ROUTES,
            code="checkpoint-shards",
        )
    for name, expected in files.items():
        absent = sorted(set(expected) - set(read_header(folder / name)))
        if absent:
            raise CheckpointError(
                f"{folder / name}: the index places {absent[0]} here, the file does not hold it",
                hint="index and shards are from different versions; fetch the folder again",
                code="checkpoint-index",
            )


def _truncated(file: Path, size: int, expected: int | None) -> CheckpointError:
    wanted = "a safetensors file" if expected is None else f"{expected:,} bytes"
    return CheckpointError(
        f"{file}: {size:,} bytes; expected {wanted}",
        hint=f"the download broke off: {ROUTES}",
        code="checkpoint-truncated",
    )


def _require_found(path: str | Path) -> None:
    """A path that is neither a folder nor shaped like a hub id is a typing mistake; say so before asking any hub."""
    folder = Path(path)
    looks_like_id = str(path).count("/") == 1 and not str(path).startswith((".", "/", "~"))
    if not folder.is_dir() and not looks_like_id:
        raise CheckpointError(f"{path}: no such model folder", hint=ROUTES, code="checkpoint-missing")
