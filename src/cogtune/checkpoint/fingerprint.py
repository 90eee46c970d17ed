"""Telling models and adapters apart by content, so that an output knows what made it, wherever that lies now."""

from __future__ import annotations

import hashlib
from pathlib import Path

from cogtune.checkpoint.load import read_header, shard_files

_PROBE = 1024
_SMALL_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json")


def model_fingerprint(path: str | Path) -> str:
    """Digest of a model folder: its small files, its shards' headers, and a kilobyte from the middle of every tensor.

    Reading all of 39 GB would take minutes at every start; a tuned model differs from its base in nearly every element
    of the tensors it changes, so one place in each tells. A name on the hub stands for itself.

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
        header = read_header(folder / shard)
        size = (folder / shard).stat().st_size
        payload = max((entry["data_offsets"][1] for entry in header.values()), default=0)
        with (folder / shard).open("rb") as file:
            for name, entry in sorted(header.items()):
                first, last = entry["data_offsets"]
                digest.update(f"{name} {entry['dtype']} {entry['shape']}\n".encode())
                file.seek(size - payload + max(first, (first + last - _PROBE) // 2))
                digest.update(file.read(min(_PROBE, last - first)))
    return digest.hexdigest()


def adapter_fingerprint(folder: str | Path) -> str:
    """Digest of an adapter folder's own files."""
    digest = hashlib.sha256()
    for path in sorted(Path(folder).glob("adapter_*")):
        digest.update(path.name.encode() + b"\0")
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
