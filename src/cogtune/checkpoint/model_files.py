"""Contents of a model folder: find and check configuration, shards and tensors without reading weights."""

from __future__ import annotations

import json
import math
import os
import re
import struct
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from transformers import GenerationConfig

from cogtune.checkpoint.stream import StoredTensor, find_stored
from cogtune.checkpoint.torch_file import read_torch_file
from cogtune.configuration.architectures import refuse_adapter, refuse_foreign
from cogtune.configuration.config_json import GENERATION_KEYS, known_part, read_object
from cogtune.configuration.model import CogVLM2Config
from cogtune.errors import CheckpointError
from cogtune.language import phrase, tr
from cogtune.system.names import inside
from cogtune.system.reading import open_file, read_text

_BYTES = {
    "F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "BF16": 2, "F16": 2, "I16": 2, "U16": 2, "I8": 1,
    "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
}  # fmt: skip
"""Bytes of a value, by the name of its format in a safetensors file."""
_LONGEST_HEADER = 100_000_000
"""The safetensors library's own limit, in bytes."""
INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
PICKLED_INDEX_NAME = "pytorch_model.bin.index.json"
PICKLED_NAME = "pytorch_model.bin"
_LAYOUTS = ((INDEX_NAME, SINGLE_NAME), (PICKLED_INDEX_NAME, PICKLED_NAME))
"""Index and single file of a folder's weights; the first that is there is read."""
ROUTES = phrase(
    "fetch it with `cogtune download model --output cogvlm2` (from Hugging Face) or `cogtune"
    " download model --source modelscope --output cogvlm2`, then pass that folder"
)


def load_model_config(path: str | Path) -> CogVLM2Config:
    """Return the model configuration of a folder or hub id.

    Raises:
        CheckpointError: no such folder, no ``config.json`` in it, one that is not valid, or another architecture's.
    """
    folder = Path(path)
    refuse_adapter(folder)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise CheckpointError(
            tr("{folder}: no config.json; expected a model folder", folder=folder),
            hint=tr(ROUTES),
            code="checkpoint-config",
        )
    _require_found(path)
    refuse_foreign(path)
    if folder.is_dir():
        return CogVLM2Config.from_file(folder / "config.json")
    try:
        return CogVLM2Config.from_pretrained(path)
    except CheckpointError:
        raise
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(
            tr("{path}: config.json cannot be read: {error}", path=path, error=error),
            hint=tr(ROUTES),
            code="checkpoint-config",
        ) from error


def read_generation_config(folder: Path) -> GenerationConfig | None:
    """Return the checkpoint's own settings for answers, of which only `GENERATION_KEYS` are taken; None: it has none.

    Raises:
        CheckpointError: not readable, or a value that is none.
    """
    file = folder / "generation_config.json"
    if not file.is_file():
        return None
    values = known_part(read_object(file), GENERATION_KEYS, file)
    try:
        return GenerationConfig.from_dict(values)
    except (ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(
            tr("{file}: transformers refuses it: {error}", file=file, error=error),
            hint=tr("copy it from the published checkpoint"),
            code="checkpoint-config",
        ) from error


def reading_rules(model: str | Path) -> dict[str, Any]:
    """Return what reading data has to know of the model: `read_sources`' ``max_images`` and ``clips``.

    Raises:
        CheckpointError: as `load_model_config`.
    """
    config = load_model_config(model)
    return {"max_images": config.max_images, "clips": config.numbered_images}


def whole_folder(model: str | Path) -> Path:
    """Return the model's folder. A hub id is downloaded completely, licences included, unless it is cached.

    Raises:
        CheckpointError: neither a folder nor a hub repository that can be read.
    """
    folder = Path(model).expanduser()
    refuse_adapter(folder)
    if folder.is_dir():
        return folder
    _require_found(model)
    try:
        return Path(snapshot_download(str(model)))
    except (OSError, HFValidationError) as error:
        raise CheckpointError(
            tr(
                "{model}: neither a folder here nor a hub repository that can be read ({error:.300})",
                model=model,
                error=str(error).strip(),
            ),
            hint=tr("check name and network, or download the model and give its folder"),
            code="checkpoint-missing",
        ) from error


def shard_files(folder: Path) -> dict[str, list[str]]:
    """Map each weight file's name to the names of the tensors it should hold (empty for a single file without an
    index). Where a folder has safetensors files and ``.bin`` files, it is the former.

    Raises:
        CheckpointError: neither an index nor a single weight file, an index that is not valid JSON or names a file
            outside ``folder``, or a shard that is missing.
    """
    shards = _listed_shards(folder)
    missing = sorted(name for name in shards if not (folder / name).is_file())
    if missing:
        present = _present(folder)
        other = next((name for name in present if name in _LAYOUTS[1] and INDEX_NAME in present), None)
        raise CheckpointError(
            tr(
                "{folder}: {count} of {files} shards are missing: {names}",
                folder=folder,
                count=len(missing),
                files=len(shards),
                names=", ".join(missing[:8]),
            ),
            hint=tr(ROUTES)
            if other is None
            else tr("fetch them; or move {index} away, and {other} is read instead", index=INDEX_NAME, other=other),
            code="checkpoint-shards",
        )
    return shards


def unread_weights(folder: Path) -> list[str]:
    """Return the weight files of a folder that nothing reads, because it has others that come first."""
    read = shard_files(folder)
    return [name for name in _weight_files(folder) if name not in read]


def _weight_files(folder: Path) -> list[str]:
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    return [name for name in names if re.fullmatch(r"(model.*\.safetensors|pytorch_model.*\.bin)", name)]


def _present(folder: Path) -> list[str]:
    return [name for layout in _LAYOUTS for name in layout if (folder / name).is_file()]


def _listed_shards(folder: Path) -> dict[str, list[str]]:
    first = next(iter(_present(folder)), None)
    if first is None:
        raise _no_weights(folder)
    if first in (SINGLE_NAME, PICKLED_NAME):
        return {first: []}
    index = folder / first
    try:
        weight_map: dict[str, str] = dict(json.loads(read_text(index))["weight_map"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(
            tr("{index}: not a weight index: {error}", index=index, error=error),
            hint=tr(ROUTES),
            code="checkpoint-index",
        ) from error
    shards: dict[str, list[str]] = {}
    for name, file in weight_map.items():
        inside(folder, file, named_by=index, error=CheckpointError)
        shards.setdefault(file, []).append(name)
    return shards


def _no_weights(folder: Path) -> CheckpointError:
    expected = tr(
        "expected {index_name} with its shards, or {single_name}, or {pickled_index} or {pickled}",
        index_name=INDEX_NAME,
        single_name=SINGLE_NAME,
        pickled_index=PICKLED_INDEX_NAME,
        pickled=PICKLED_NAME,
    )
    if not folder.is_dir() or not (found := _weight_files(folder)):
        return CheckpointError(
            tr("{folder}: no weights; {expected}", folder=folder, expected=expected),
            hint=tr(ROUTES),
            code="checkpoint-shards",
        )
    index = INDEX_NAME if found[0].endswith(".safetensors") else PICKLED_INDEX_NAME
    return CheckpointError(
        tr(
            "{folder}: {count} weight files ({name}...) without the index that says what they should hold; {expected}",
            folder=folder,
            count=len(found),
            name=found[0],
            expected=expected,
        ),
        hint=tr("copy {index} from where the files came from", index=index),
        code="checkpoint-shards",
    )


def read_header(file: Path) -> dict[str, dict[str, Any]]:
    """Return names, dtypes, shapes and byte ranges of a safetensors file, without reading its payload.

    Raises:
        CheckpointError: not a safetensors file, or shorter than its header says.
    """
    with open_file(file) as stream:
        size = os.fstat(stream.fileno()).st_size
        prefix = stream.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
        if length + 8 > size or length > _LONGEST_HEADER:
            raise _truncated(file, size, None)
        try:
            header: dict[str, dict[str, Any]] = json.loads(stream.read(length))
            header.pop("__metadata__", None)
            payload = _payload(header)
        except (ValueError, AttributeError, TypeError, KeyError, RecursionError) as error:
            raise _truncated(file, size, None) from error
    if 8 + length + payload != size:
        raise _truncated(file, size, 8 + length + payload)
    return header


def _payload(header: dict[str, dict[str, Any]]) -> int:
    """Return the bytes of a file's tensors, after checking that they are contiguous and fit their shapes.

    Raises:
        ValueError, TypeError, KeyError: they do not.
    """
    end = 0
    for entry in sorted(header.values(), key=lambda entry: entry["data_offsets"]):
        first, last = entry["data_offsets"]
        shape = entry["shape"]
        if any(type(size) is not int or size < 0 for size in (first, last, *shape)):
            raise ValueError("a shape or an offset that is no size")
        if first != end or last - first != _BYTES[entry["dtype"]] * math.prod(shape):
            raise ValueError("tensors that overlap, leave gaps, or do not fit their shapes")
        end = last
    return end


def tensors_of(file: Path) -> list[StoredTensor]:
    """Return the tensors of a safetensors file, or of a file that ``torch.save`` wrote, in the order of their bytes.

    Raises:
        CheckpointError: as `read_header` and `read_torch_file`.
    """
    return find_stored(file, read_header(file)) if file.suffix == ".safetensors" else read_torch_file(file)


def check_folder(folder: Path) -> None:
    """Check that every shard exists, is complete and holds the tensors that the index lists.

    Raises:
        CheckpointError: a shard is missing, truncated or lacks a tensor; the message names the file.
    """
    files = shard_files(folder)
    for name, expected in files.items():
        absent = sorted(set(expected) - {tensor.name for tensor in tensors_of(folder / name)})
        if absent:
            raise CheckpointError(
                tr(
                    "{path}: the index places {absent} here, the file does not hold it",
                    path=folder / name,
                    absent=absent[0],
                ),
                hint=tr("index and shards are from different versions; fetch the folder again"),
                code="checkpoint-index",
            )


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Return every tensor of a folder by name, in the order of its shards and of their bytes."""
    found: dict[str, StoredTensor] = {}
    for shard, names in sorted(shard_files(folder).items()):
        listed = set(names)
        for tensor in tensors_of(folder / shard):
            if tensor.name not in found or tensor.name in listed:
                found[tensor.name] = tensor
    return found


def _truncated(file: Path, size: int, expected: int | None) -> CheckpointError:
    wanted = tr("a safetensors file") if expected is None else tr("{expected:,} bytes", expected=expected)
    return CheckpointError(
        tr("{file}: {size:,} bytes; expected {wanted}", file=file, size=size, wanted=wanted),
        hint=tr("the download broke off: {routes}", routes=tr(ROUTES)),
        code="checkpoint-truncated",
    )


def _require_found(path: str | Path) -> None:
    """Raise CheckpointError for a path that is neither a folder nor shaped like a hub id, before any hub is asked."""
    folder = Path(path)
    looks_like_id = str(path).count("/") == 1 and not str(path).startswith((".", "/", "~"))
    if not folder.is_dir() and not looks_like_id:
        raise CheckpointError(tr("{path}: no such model folder", path=path), hint=tr(ROUTES), code="checkpoint-missing")
