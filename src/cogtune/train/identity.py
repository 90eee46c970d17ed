"""Fingerprints of what a run reads, so that a folder knows its run again, wherever base and data lie meanwhile."""

from __future__ import annotations

import hashlib
import struct
from pathlib import Path

from cogtune.configuration.identity import identity
from cogtune.configuration.run import RunConfig
from cogtune.data.split import DataSplit
from cogtune.train.folder import RunIdentity

_PROBES = 16
_PROBE_BYTES = 4096


def run_identity(config: RunConfig, base: Path, data: DataSplit) -> RunIdentity:
    """What must not change for a run to go on in its folder."""
    fingerprints = {
        "model.path": base_fingerprint(base),
        "data.path": data.report.fingerprint,
        "data.validation": data.validation_report.fingerprint if data.validation_report is not None else "",
        "lora.start_from": _folder_digest(config.lora.start_from) if config.lora.start_from is not None else "",
    }
    return RunIdentity(identity(config), fingerprints)


def base_fingerprint(folder: Path) -> str:
    """Digest of a model folder's configuration, of its shards' headers and of samples of their content.

    Reading all of 39 GB would take minutes at every start; another model differs in every tensor, so sixteen places of
    each shard tell.
    """
    if not folder.is_dir():  # a name on the hub
        return str(folder)
    digest = hashlib.sha256()
    for name in ("config.json", "tokenizer.json"):
        if (folder / name).is_file():
            digest.update(name.encode() + (folder / name).read_bytes())
    for shard in sorted(folder.glob("*.safetensors")):
        size = shard.stat().st_size
        digest.update(f"{shard.name} {size}\n".encode())
        with shard.open("rb") as file:
            start = file.read(8)
            header = file.read(min(struct.unpack("<Q", start)[0], size)) if len(start) == 8 else b""
            digest.update(header)
            content = size - 8 - len(header)
            for probe in range(_PROBES):
                file.seek(8 + len(header) + content * probe // _PROBES)
                digest.update(file.read(_PROBE_BYTES))
    return digest.hexdigest()


def _folder_digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.glob("adapter_*")):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()
