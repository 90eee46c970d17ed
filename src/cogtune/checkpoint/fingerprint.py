"""Fingerprints of models and adapters by content, so that an output identifies what produced it after files have
moved."""

from __future__ import annotations

import hashlib
from pathlib import Path

from cogtune.checkpoint.model_files import shard_files, tensors_of
from cogtune.checkpoint.stream import StoredTensor
from cogtune.configuration.shapes import TOWER
from cogtune.errors import CheckpointError
from cogtune.language import tr

_PROBE = 1024
_TOWER_PROBE = 4096
_TOWER_PROBES = 8
_SMALL_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json")


def model_fingerprint(path: str | Path) -> str:
    """Return a digest of a model folder: its small files, its shards' headers, and a kilobyte from the middle of every
    tensor.

    Reading all 39 GB would take minutes at every start. Fine-tuning changes nearly every element of the tensors it
    touches, so one sample per tensor is enough. A name on the hub is its own fingerprint.

    Raises:
        CheckpointError: a folder without readable shards.
    """
    folder = Path(path)
    if not folder.is_dir():
        return f"hub:{path}"
    digest = hashlib.sha256()
    for name in _SMALL_FILES:
        if (folder / name).is_file():
            digest.update(name.encode() + b"\0" + (folder / name).read_bytes())
    for shard in sorted(shard_files(folder)):
        with (folder / shard).open("rb") as file:
            for tensor in sorted(tensors_of(folder / shard), key=lambda tensor: tensor.name):
                size = tensor.stop - tensor.start
                digest.update(_described(tensor))
                file.seek(tensor.start + max(0, (size - _PROBE) // 2))
                digest.update(file.read(min(_PROBE, size)))
    return digest.hexdigest()


def tower_fingerprint(folder: str | Path) -> str:
    """Return a digest of the frozen vision tower's weights (patch embedding, transformer, convolution) in a model
    folder.

    It covers names, dtypes, shapes, small tensors completely, and eight blocks of 4 KiB spread evenly over every larger
    tensor. This detects another checkpoint, a tower that was trained, converted, quantised or merged (nearly every
    element changes), and tensors that were truncated or swapped. It does not detect a change of a few elements between
    the blocks. Reading all 8.6 GB at every start would take longer than computing the features of dozens of pictures.

    Raises:
        CheckpointError: a folder without readable shards, or whose shards hold no tower.
    """
    root, digest, found = Path(folder), hashlib.sha256(), 0
    tensors = [tensor for shard in shard_files(root) for tensor in tensors_of(root / shard)]
    for tensor in sorted(tensors, key=lambda tensor: (tensor.name, tensor.file.name)):
        if not tensor.name.startswith(TOWER):
            continue
        found += 1
        digest.update(_described(tensor))
        with tensor.file.open("rb") as file:
            for offset, length in _blocks(tensor.stop - tensor.start):
                file.seek(tensor.start + offset)
                digest.update(file.read(length))
    if not found:
        raise CheckpointError(
            tr("{root}: its shards hold no vision tower ({tower}...)", root=root, tower=TOWER[1]),
            hint=tr("give a CogVLM2 model folder in the published layout"),
            code="checkpoint-tensors",
        )
    return digest.hexdigest()


def _described(tensor: StoredTensor) -> bytes:
    return f"{tensor.name} {tensor.dtype} {list(tensor.shape)}\n".encode()


def _blocks(size: int) -> list[tuple[int, int]]:
    """Return offset and length of the blocks of a tensor that are read."""
    if size <= 2 * _TOWER_PROBE * _TOWER_PROBES:
        return [(0, size)]
    step = (size - _TOWER_PROBE) / (_TOWER_PROBES - 1)
    return [(round(number * step), _TOWER_PROBE) for number in range(_TOWER_PROBES)]


def adapter_fingerprint(folder: str | Path) -> str:
    """Return a digest of an adapter folder's own files."""
    digest = hashlib.sha256()
    for path in sorted(Path(folder).glob("adapter_*")):
        digest.update(path.name.encode() + b"\0")
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
