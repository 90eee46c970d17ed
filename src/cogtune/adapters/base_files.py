"""The files of a base beside its weights, which a merge copies."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from cogtune.adapters.safetensors_rows import CHUNK
from cogtune.errors import CheckpointError
from cogtune.language import tr
from cogtune.system import files

# Other formats of the unmerged weights; next to merged shards they could be loaded by mistake.
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".bin.index.json")
_NOT_COPIED = {".git", ".cache"}


def other_files(base: Path, shards: list[str]) -> tuple[list[str], list[str]]:
    """Return files to copy, and weight files of other formats that are not copied; paths are relative to ``base``."""
    copied: list[str] = []
    left_out: list[str] = []
    for parent, folders, names in os.walk(base):
        folders[:] = sorted(name for name in folders if name not in _NOT_COPIED)
        for file in sorted(names):
            name = (Path(parent) / file).relative_to(base).as_posix()
            if name not in shards:
                (left_out if file.endswith(_WEIGHT_SUFFIXES) else copied).append(name)
    return copied, left_out


def require_own(base: Path, name: str) -> None:
    """Check that a copied file is inside the base folder, or in the cache of a hub that the base belongs to.

    Otherwise a symbolic link in a stranger's folder could copy any file of this machine into a model that is then
    shared.
    """
    home = base.resolve()
    try:
        path = (base / name).resolve()
    except (OSError, RuntimeError):  # a loop of links
        path = base / name
    blobs = home.parents[1] / "blobs" if home.parent.name == "snapshots" else home
    if not path.is_file() or not (path.is_relative_to(home) or path.is_relative_to(blobs)):
        what = (
            tr("a link to {path}, outside the folder", path=path)
            if path.is_file()
            else tr("neither a file nor a link to one")
        )
        raise CheckpointError(
            tr("{path}: {what}; a merge copies only files of the base itself", path=base / name, what=what),
            hint=tr("if you put the link there: cp -rL {base} COPY, and merge with --model COPY", base=base),
            code="unsafe-name",
        )


def copy_file(source: Path, target: Path) -> None:
    """Copy a file with its permissions to the new file ``target``, and wait until the disk has it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with source.open("rb") as reader, target.open("xb") as writer:
        shutil.copyfileobj(reader, writer, CHUNK)
    shutil.copymode(source, target)
    files.sync(target)
