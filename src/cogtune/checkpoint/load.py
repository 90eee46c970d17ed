"""Loading a base model: the folder is checked before any weight is read, so that every mistake has a name."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from cogtune.configuration.model import CogVLM2Config
from cogtune.configuration.run import PUBLISHED_MODEL
from cogtune.errors import CheckpointError
from cogtune.model.modeling import CogVLM2ForCausalLM

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
ROUTES = (
    f"fetch it with `hf download {PUBLISHED_MODEL} --local-dir cogvlm2` or "
    "`modelscope download --model ZhipuAI/cogvlm2-llama3-chat-19B --local_dir cogvlm2`, then pass that folder"
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
) -> CogVLM2ForCausalLM:
    """The base model on ``device`` in ``dtype``, in evaluation mode.

    Args:
        path: a folder in the published layout, or a hub id.
        rope_precision: overrides the configuration's ("checkpoint" or "float32").

    Raises:
        CheckpointError: anything about the folder that does not fit; the message names files and tensors.
    """
    folder = Path(path)
    config = load_config(path)
    if rope_precision is not None:
        config.rope_precision = rope_precision
    if folder.is_dir():
        check_folder(folder)
    placement: dict[str, Any] = {} if torch.device(device).type == "cpu" else {"device_map": {"": torch.device(device)}}
    try:
        model = CogVLM2ForCausalLM.from_pretrained(path, config=config, dtype=dtype, **placement)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{path}: the weights cannot be read: {error}", hint=ROUTES, code="checkpoint-read"
        ) from error
    loaded: CogVLM2ForCausalLM = model.eval()
    return loaded


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
