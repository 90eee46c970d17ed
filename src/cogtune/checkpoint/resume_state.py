"""The training checkpoint: independent of the engine, written atomically, verified before use.

A run can be killed at any moment, also while it saves. So a checkpoint is built in a hidden folder, flushed to disk and
described by a manifest of digests that is written last; then the folder is renamed. Older checkpoints are deleted after
that.

    checkpoint-100/
      adapter_config.json  adapter_model.safetensors   the adapter, PEFT's own files
      optimizer.safetensors   "master/<parameter>" (float32) and "<moment>/<parameter>", the same for every engine
      state.json              step, position in the data, counters, best evaluation
      rng.safetensors         "<rank>/cpu" and "<rank>/cuda"
      MANIFEST.json           size and sha256 of each of these
"""

from __future__ import annotations

import errno
import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as serialize

from cogtune.errors import CheckpointError, DiskFullError
from cogtune.language import phrase, tr
from cogtune.system import files
from cogtune.system.file_errors import is_disk_full
from cogtune.system.names import name_problem
from cogtune.system.terminal import typed

MANIFEST = "MANIFEST.json"
OPTIMIZER_FILE = "optimizer.safetensors"
STATE_FILE = "state.json"
RNG_FILE = "rng.safetensors"
FORMAT = 1
_ANOTHER = phrase("give a checkpoint-N folder of an earlier run, or that run's output folder")
_NAME = re.compile(r"checkpoint-(0|[1-9][0-9]{0,17})")
_LEFTOVER = re.compile(
    r"\.(checkpoint-\d+|adapter|last|best)\.(partial|replaced)"
    r"|\.(run\.json|config\.yaml|data\.json|versions\.json|metrics\.jsonl)(\..+)?\.partial"
)


@dataclass(frozen=True)
class TrainingState:
    """Everything but the adapter's own files that a bit-identical resume needs."""

    tensors: dict[str, torch.Tensor]
    """float32 masters as ``master/<parameter>`` and optimiser moments as ``<moment>/<parameter>``, on the CPU."""
    counters: dict[str, Any]
    """JSON content: step, position, schedule, best evaluation, identity of the run."""
    rng: list[dict[str, torch.Tensor]]
    """Generator states of each rank: ``cpu`` and, on a GPU, ``cuda`` (uint8)."""


def save(output: Path, step: int, state: TrainingState, write_adapter: Callable[[Path], None]) -> Path:
    """Write ``output/checkpoint-<step>`` atomically.

    Raises:
        FileExistsError: something else has that name.
        DiskFullError: no space; the partial folder is removed and earlier checkpoints are unchanged.
    """
    final = checkpoint_path(output, step)
    if final.exists() and not _is_checkpoint(final):
        raise FileExistsError(errno.EEXIST, tr("something other than a checkpoint is there"), str(final))
    with partial_folder(output, final.name) as folder:
        write_adapter(folder)
        files.write_file(folder / OPTIMIZER_FILE, serialize(state.tensors))
        rng = {f"{rank}/{kind}": value for rank, values in enumerate(state.rng) for kind, value in values.items()}
        files.write_file(folder / RNG_FILE, serialize(rng))
        files.write_json(folder / STATE_FILE, state.counters)
        digests = {path.name: _digest(path) for path in sorted(folder.iterdir()) if path.name != files.MARK}
        files.write_json(folder / MANIFEST, {"format": FORMAT, "files": digests})
    files.link(output / "last", final.name)
    return final


def load(folder: Path) -> TrainingState:
    """Read a checkpoint after verifying it against its manifest.

    Raises:
        CheckpointError: the folder is not a complete checkpoint of this format.
    """
    problem = find_problem(folder)
    if problem is not None:
        adapter = (folder / "adapter_config.json").is_file() and not (folder / MANIFEST).is_file()
        raise CheckpointError(
            tr("{folder}: not a usable training checkpoint: {problem}", folder=folder, problem=problem),
            hint=tr(
                "to train this adapter further, without the optimiser's state: --adapter {folder}; or {another}",
                folder=typed(folder),
                another=tr(_ANOTHER),
            )
            if adapter
            else tr(_ANOTHER),
        )
    try:
        return TrainingState(load_file(folder / OPTIMIZER_FILE), read_counters(folder), _read_rng(folder / RNG_FILE))
    except (OSError, SafetensorError) as error:
        message = tr(
            "{folder}: it changed while it was read ({error}); does a run still write there?",
            folder=folder,
            error=error,
        )
        raise CheckpointError(message, hint=tr(_ANOTHER)) from error


def _read_rng(file: Path) -> list[dict[str, torch.Tensor]]:
    """Return the generator states by rank. Names come from a file, so the number of states bounds the ranks."""
    found: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in load_file(file).items():
        name = re.fullmatch(r"(\d{1,9})/(cpu|cuda)", key, re.ASCII)
        if name is None:
            raise CheckpointError(
                tr("{file}: not the random numbers of a run: it holds {key!r}", file=file, key=key[:80]),
                hint=tr(_ANOTHER),
            )
        found.setdefault(int(name[1]), {})[name[2]] = value
    if sorted(found) != list(range(len(found))):
        ranks = ", ".join(str(rank) for rank in sorted(found)[:8])
        raise CheckpointError(
            tr("{file}: not the random numbers of a run: those of ranks {ranks}", file=file, ranks=ranks),
            hint=tr(_ANOTHER),
        )
    return [found[rank] for rank in range(len(found))]


def read_counters(folder: Path) -> dict[str, Any]:
    """Return the JSON part only, for decisions that need no tensors.

    Raises:
        CheckpointError: it is no JSON object.
    """
    try:
        counters = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            tr("{path}: not JSON: {error}", path=folder / STATE_FILE, error=error), hint=tr(_ANOTHER)
        ) from error
    if not isinstance(counters, dict):
        raise CheckpointError(tr("{path}: found no JSON object", path=folder / STATE_FILE), hint=tr(_ANOTHER))
    return counters


def find_latest(output: Path) -> tuple[Path | None, list[str]]:
    """Return the newest complete checkpoint of ``output``, and one line for every newer one that was skipped."""
    skipped: list[str] = []
    for folder in sorted(list_checkpoints(output), key=step_of, reverse=True):
        problem = find_problem(folder)
        if problem is None:
            return folder, skipped
        skipped.append(tr("{where}: {what}", where=folder, what=problem))
    return None, skipped


def find_problem(folder: Path) -> str | None:
    """Return why ``folder`` cannot be used, or None if every file has the digest in its manifest."""
    if not folder.is_dir():
        return tr("no such folder")
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        entries: dict[str, dict[str, Any]] = dict(manifest["files"])
        written_format = manifest["format"]
    except FileNotFoundError:
        return tr("incomplete: {manifest} is missing", manifest=MANIFEST)
    except (OSError, ValueError, KeyError, TypeError):
        return tr("{manifest} cannot be read", manifest=MANIFEST)
    if written_format != FORMAT:
        return tr(
            "written in format {written_format}; this version reads format {format}",
            written_format=written_format,
            format=FORMAT,
        )
    if missing := {OPTIMIZER_FILE, STATE_FILE, RNG_FILE} - entries.keys():
        return tr("{manifest} does not list {missing}", manifest=MANIFEST, missing=sorted(missing)[0])
    for name, entry in entries.items():
        if (wrong := name_problem(name)) is not None:
            return tr("{manifest} names {name!a}, which {wrong}", manifest=MANIFEST, name=name[:80], wrong=wrong)
        if not isinstance(entry, dict):
            return tr("{manifest} cannot be read", manifest=MANIFEST)
        path = folder / name
        if not path.is_file():
            return tr("{name} is missing", name=name)
        try:
            size = path.stat().st_size
            found = _digest(path) if size == entry.get("bytes") else None
        except OSError as error:  # also where a run that goes on has just removed it
            return tr("{name} cannot be read: {strerror}", name=name, strerror=error.strerror)
        if found is None:
            return tr("{name} has {size} bytes; {value} were written", name=name, size=size, value=entry.get("bytes"))
        if found != entry:
            return tr("{name} is corrupt: its sha256 is not the recorded one", name=name)
    return None


def rotate(output: Path, step: int, keep: int, protect: Path | None) -> None:
    """Delete checkpoints up to ``step``, except the ``keep`` newest and ``protect`` (the best one).

    Later checkpoints can only be unusable ones that a resume skipped; the run will overwrite them.
    """
    own = [folder for folder in list_checkpoints(output) if step_of(folder) <= step and _is_checkpoint(folder)]
    newest_first = sorted(own, key=step_of, reverse=True)
    for folder in newest_first[max(keep, 1) :]:
        if protect is None or folder.name != protect.name:
            files.remove_folder(folder)


def remove_leftovers(output: Path) -> int:
    """Delete the leftovers of a killed run, found by name, and return their number.

    The caller must hold the folder's lock.
    """
    leftovers = [path for path in output.iterdir() if _LEFTOVER.fullmatch(path.name)]
    for path in leftovers:
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    return len(leftovers)


def _is_checkpoint(folder: Path) -> bool:
    """Return whether ``folder`` is one of our checkpoints, complete or damaged; another program may use the same
    name."""
    return (
        folder.is_dir()
        and not folder.is_symlink()
        and any((folder / name).is_file() for name in (MANIFEST, STATE_FILE, OPTIMIZER_FILE))
    )


def checkpoint_path(output: Path, step: int) -> Path:
    return output / f"checkpoint-{step}"


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("checkpoint-"))


def list_checkpoints(output: Path) -> list[Path]:
    return [path for path in output.glob("checkpoint-*") if _NAME.fullmatch(path.name)]


@contextmanager
def partial_folder(output: Path, name: str) -> Iterator[Path]:
    """Yield a hidden folder that is renamed to ``output/name`` if the block succeeds, and deleted if it fails."""
    try:
        with files.growing_folder(output / name, replace=True, durable=True) as folder:
            yield folder
    except BaseException as error:
        if is_disk_full(error):
            raise DiskFullError(
                tr("{path}: no space left while saving; earlier checkpoints are untouched", path=output / name),
                hint=tr(
                    "free some space (or lower train.keep_checkpoints) and run the same command again: it continues"
                ),
            ) from error
        raise


def _digest(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
