"""The one training checkpoint: engine-free, complete or absent, verified before it is used.

A run can be killed at any moment, also while it saves, so a checkpoint is built in a hidden folder, flushed to disk,
described by a manifest of digests written last, and only then renamed to its name. Older checkpoints go after that.

    checkpoint-100/
      adapter_config.json  adapter_model.safetensors   the adapter, PEFT's own files
      optimizer.safetensors   "master/<parameter>" (float32) and "<moment>/<parameter>", whatever engine wrote them
      state.json              step, position in the data, counters, best evaluation
      rng.safetensors         "<rank>/cpu" and "<rank>/cuda"
      MANIFEST.json           size and sha256 of each of these
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from safetensors.torch import save as serialize

from cogtune.errors import CheckpointError, DiskFullError

MANIFEST = "MANIFEST.json"
OPTIMIZER_FILE = "optimizer.safetensors"
STATE_FILE = "state.json"
RNG_FILE = "rng.safetensors"
FORMAT = 1
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True)
class TrainingState:
    """Everything but the adapter's own files that continuing bit by bit needs."""

    tensors: dict[str, torch.Tensor]
    """float32 masters as ``master/<parameter>`` and optimiser moments as ``<moment>/<parameter>``, on the CPU."""
    counters: dict[str, Any]
    """What JSON holds: step, position, schedule, best evaluation, identity of the run."""
    rng: list[dict[str, torch.Tensor]]
    """Generator states of each rank: ``cpu`` and, on a GPU, ``cuda`` (uint8)."""


def save(output: Path, step: int, state: TrainingState, write_adapter: Callable[[Path], None]) -> Path:
    """Write ``output/checkpoint-<step>`` so that it is either whole or absent.

    Raises:
        DiskFullError: no space; the partial folder is removed and earlier checkpoints are as they were.
    """
    final = checkpoint_path(output, step)
    with partial_folder(output, final.name) as folder:
        write_adapter(folder)
        write_file(folder / OPTIMIZER_FILE, serialize(state.tensors))
        rng = {f"{rank}/{kind}": value for rank, values in enumerate(state.rng) for kind, value in values.items()}
        write_file(folder / RNG_FILE, serialize(rng))
        write_json(folder / STATE_FILE, state.counters)
        files = {path.name: _digest(path) for path in sorted(folder.iterdir())}
        write_json(folder / MANIFEST, {"format": FORMAT, "files": files})
    link(output, "last", final.name)
    return final


def load(folder: Path) -> TrainingState:
    """Read a checkpoint after checking it against its manifest.

    Raises:
        CheckpointError: the folder is not a whole checkpoint of this format.
    """
    problem = find_problem(folder)
    if problem is not None:
        raise CheckpointError(
            f"{folder}: not a usable training checkpoint: {problem}",
            hint="give a checkpoint-N folder of an earlier run, or that run's output folder",
        )
    rng: list[dict[str, torch.Tensor]] = []
    for key, value in sorted(load_file(folder / RNG_FILE).items(), key=lambda item: int(item[0].split("/")[0])):
        rank, kind = key.split("/")
        rng.extend({} for _ in range(int(rank) + 1 - len(rng)))
        rng[int(rank)][kind] = value
    return TrainingState(load_file(folder / OPTIMIZER_FILE), read_counters(folder), rng)


def read_counters(folder: Path) -> dict[str, Any]:
    """The JSON part alone, for decisions that need no tensors."""
    counters: dict[str, Any] = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
    return counters


def find_latest(output: Path) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint of ``output``, and one line for every newer one that had to be skipped."""
    skipped: list[str] = []
    for folder in sorted(list_checkpoints(output), key=step_of, reverse=True):
        problem = find_problem(folder)
        if problem is None:
            return folder, skipped
        skipped.append(f"{folder}: {problem}")
    return None, skipped


def find_problem(folder: Path) -> str | None:
    """Why ``folder`` cannot be used, or None when every file has the digest its manifest gives."""
    if not folder.is_dir():
        return "no such folder"
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        files: dict[str, dict[str, Any]] = manifest["files"]
        written_format = manifest["format"]
    except FileNotFoundError:
        return f"incomplete: {MANIFEST} is missing"
    except (OSError, ValueError, KeyError, TypeError):
        return f"{MANIFEST} cannot be read"
    if written_format != FORMAT:
        return f"written in format {written_format}; this version reads format {FORMAT}"
    if missing := {OPTIMIZER_FILE, STATE_FILE, RNG_FILE} - files.keys():
        return f"{MANIFEST} does not list {sorted(missing)[0]}"
    for name, entry in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != entry.get("bytes"):
            return f"{name} has {path.stat().st_size} bytes; {entry.get('bytes')} were written"
        if _digest(path) != entry:
            return f"{name} is corrupt: its sha256 is not the recorded one"
    return None


def rotate(output: Path, step: int, keep: int, protect: Path | None) -> None:
    """Of the checkpoints up to ``step``, delete all but the ``keep`` newest and ``protect`` (the best one).

    Later ones can only be unusable ones that the run fell back from; it will replace them when it gets there.
    """
    newest_first = sorted((f for f in list_checkpoints(output) if step_of(f) <= step), key=step_of, reverse=True)
    for folder in newest_first[max(keep, 1) :]:
        if protect is None or folder.name != protect.name:
            _remove(folder)


def remove_leftovers(output: Path) -> int:
    """Delete what a killed save left behind; returns how many folders that were."""
    leftovers = [*output.glob(".*.partial"), *output.glob(".*.replaced")]
    for path in leftovers:
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    return len(leftovers)


def checkpoint_path(output: Path, step: int) -> Path:
    return output / f"checkpoint-{step}"


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("checkpoint-"))


def list_checkpoints(output: Path) -> list[Path]:
    return [path for path in output.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdecimal()]


@contextmanager
def partial_folder(output: Path, name: str) -> Iterator[Path]:
    """A hidden folder that becomes ``output/name`` in one rename when the block ends well, and vanishes when not."""
    folder, final, old = output / f".{name}.partial", output / name, output / f".{name}.replaced"
    try:
        for leftover in (folder, old):
            shutil.rmtree(leftover, ignore_errors=True)
        folder.mkdir(parents=True)
        yield folder
        for path in sorted(folder.iterdir()):
            sync(path)
        sync(folder)
        if final.exists():
            final.rename(old)
        folder.rename(final)
        sync(output)
        shutil.rmtree(old, ignore_errors=True)
    except BaseException as error:
        shutil.rmtree(folder, ignore_errors=True)
        if is_disk_full(error):
            raise DiskFullError(
                f"{final}: no space left while saving; earlier checkpoints are untouched",
                hint="free some space (or lower train.keep_checkpoints) and run the same command again: it continues",
            ) from error
        raise


def is_disk_full(error: BaseException) -> bool:
    """safetensors reports the system's error only in its text, hence the second test."""
    if isinstance(error, OSError) and error.errno in _DISK_FULL:
        return True
    return isinstance(error, Exception) and any(f"(os error {code})" in str(error) for code in _DISK_FULL)


def link(output: Path, name: str, target: str) -> None:
    """Point ``output/name`` at ``target`` (a name inside ``output``) in one atomic step."""
    temporary = output / f".{name}.partial"
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target, target_is_directory=True)
    temporary.replace(output / name)


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` so that a reader, or a kill, never sees half of it."""
    temporary = path.with_name(f".{path.name}.partial")
    write_file(temporary, (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode())
    sync(temporary)
    temporary.replace(path)


def write_file(path: Path, content: bytes) -> None:
    """All checkpoint bytes that are ours go through here."""
    path.write_bytes(content)


def sync(path: Path) -> None:
    """Flush a file or folder to disk, so that the rename that follows cannot overtake its content."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _digest(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _remove(folder: Path) -> None:
    """Rename first: a kill in the middle of the deletion must not leave a half-empty checkpoint under its name."""
    doomed = folder.with_name(f".{folder.name}.replaced")
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    shutil.rmtree(doomed)
