"""Merge an adapter into a full model block by block, without a GPU and without loading the model.

Every shard is written with the base's header, so names, shapes, dtypes and layout are the published ones. Tensors that
the adapter does not change are copied byte for byte, and so are all other files (licences, tokenizer, configuration).
Memory holds a few blocks of rows and one pair of the adapter's factors.

The result is written to a hidden folder next to ``output``; its index is written last, then the folder is renamed. A
killed merge leaves neither an index nor the final name, so it cannot be loaded, and the next merge removes it.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO

import torch

from cogtune.adapters.adapter_folder import WEIGHTS_NAME, find_adapter, find_base, read_adapter
from cogtune.adapters.attach import expected_shapes
from cogtune.adapters.merge_arithmetic import Changes, read_changes
from cogtune.adapters.model_layout import (
    PUBLISHED,
    TRANSFORMERS,
    check_layout,
    is_copied,
    tokenizer_folder,
    write_model_files,
)
from cogtune.adapters.plain_weights import PlainFile, PlainWeights
from cogtune.adapters.provenance import (
    FORMAT_KEYS,
    PROVENANCE_NAME,
    changed_settings,
    read_provenance,
    write_provenance,
)
from cogtune.adapters.rounding import NEAREST, STOCHASTIC, Survival, generator_for, round_stochastic
from cogtune.adapters.safetensors_rows import CHUNK, DTYPES, SafetensorsFile
from cogtune.adapters.targets import region
from cogtune.checkpoint.model_files import INDEX_NAME, PICKLED_INDEX_NAME, check_folder, load_model_config, whole_folder
from cogtune.checkpoint.stream import StoredTensor
from cogtune.errors import AdapterError, CheckpointError, ConfigError, DiskFullError, OutputFolderError
from cogtune.language import tr
from cogtune.processing.model_folder import copy_files
from cogtune.system import files
from cogtune.system.file_errors import explained
from cogtune.system.locks import Lock, lock_beside

BLOCK_BYTES = 32 * 2**20
"""Size of a block of rows in float32."""
MOST_KEPT = 0.9
"""Share of the update below which a merge warns."""

# Other formats of the unmerged weights; next to merged shards they could be loaded by mistake.
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".bin.index.json")
_NOT_COPIED = {".git", ".cache"}


@dataclass(frozen=True)
class MergeReport:
    """Results of a merge.

    Attributes:
        changed, copied: counts of tensors.
        notes: sentences for the user.
        kept: the share of the adapter's update that the stored weights keep after rounding, by region.
        warnings: sentences about what was lost.
    """

    output: Path
    changed: int
    copied: int
    bytes: int
    notes: tuple[str, ...]
    kept: dict[str, float] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


def merge(
    adapter: str | Path,
    output: str | Path,
    base: str | Path | None = None,
    progress: Callable[[str], None] = lambda line: None,
    *,
    rounding: str = NEAREST,
    layout: str = PUBLISHED,
    tokenizer: str | Path | None = None,
) -> MergeReport:
    """Merge ``adapter`` into ``base`` and write the full model to the new folder ``output``.

    Works on a block of rows at a time, in float32, without a GPU; memory stays far below one shard.

    Example:
        >>> report = cogtune.merge(adapter="output", output="merged")
        >>> print(report.changed, "tensors,", report.bytes / 1e9, "GB")
        >>> generator = cogtune.load_generator("merged")

    Args:
        adapter: a PEFT LoRA or DoRA folder, or the output folder of a training.
        output: the new folder; it must not exist.
        base: a model folder with safetensors shards, or a name on the hub; None: the one the adapter names.
        progress: gets a line per shard.
        rounding: ``nearest``, as peft rounds, or ``stochastic``, which keeps small updates; see `adapters.rounding`.
        layout: ``published``, or ``transformers`` for transformers' Auto classes; see `adapters.model_layout`.
        tokenizer: the folder of the tokenizer, for a base without one; None: the one that the training used.

    Raises:
        ConfigError: another rounding or layout.
        CheckpointError: the base is not a complete model folder, or has links to files outside it.
        AdapterError: the adapter cannot be merged, is for another base, or makes a tensor that is not finite.
        OutputFolderError: ``output`` exists, cannot be written, or another process writes it.
        DiskFullError: not enough space, before or while writing; nothing is left behind.
    """
    if rounding not in (NEAREST, STOCHASTIC):
        raise ConfigError(
            tr("rounding is {rounding}; it is nearest or stochastic", rounding=rounding), code="config-value"
        )
    check_layout(layout)
    adapter, output = find_adapter(adapter), Path(output)
    base = whole_folder(find_base(adapter) if base is None else base)
    _require_new(output, base)
    with lock_beside(output, tr("choose another --output"), progress) as lock:
        _require_new(output, base)  # another merge may have finished meanwhile
        return _merge(base, adapter, output, progress, lock, (rounding, layout, tokenizer))


def _merge(
    base: Path,
    adapter: Path,
    output: Path,
    progress: Callable[[str], None],
    lock: Lock,
    form: tuple[str, str, str | Path | None],
) -> MergeReport:
    rounding, layout, given = form
    check_folder(base)
    weights = PlainWeights(base)
    shards = weights.shards
    others, left_out = _other_files(base, shards)
    others = [name for name in others if is_copied(name, layout)]
    left_out = [name for name in left_out if name != PICKLED_INDEX_NAME or not weights.changed]
    for name in [*shards, *others]:
        _require_own(base, name)
    files_of = read_adapter(adapter)
    wanted = expected_shapes(load_model_config(base), files_of)
    changes, provenance = read_changes(files_of, _tensors(weights), wanted), read_provenance(adapter)
    tokenizer = tokenizer_folder(base, given, provenance)
    # what the merged folder has itself: the tokenizer, and plain numbers instead of the base's 4 bits
    own = {"model.tokenizer"} if tokenizer is not None else set()
    own |= set(FORMAT_KEYS) if weights.packed else set()
    if provenance is not None and own:
        kept = {key: value for key, value in provenance.settings.items() if key not in own}
        provenance = replace(provenance, settings=kept)
    notes = _notes(base, files_of.base, left_out)
    if provenance is not None and (changed_keys := changed_settings(provenance)):
        notes.append(
            tr(
                "{provenance_name} in it names the training's settings, and answering takes them: {settings}",
                provenance_name=PROVENANCE_NAME,
                settings=changed_keys,
            )
        )
    if weights.packed:
        notes.append(
            tr(
                "the base's {count} 4-bit weights are dequantised: the merged model has plain numbers and is larger,"
                " and loads without bitsandbytes",
                count=len(weights.packed),
            )
        )
    survival = Survival()
    size = weights.size() + sum((base / name).stat().st_size for name in others)
    with _partial(output, size, notes) as folder:
        changed = copied = 0
        for name in others:
            if name != INDEX_NAME and (name != PROVENANCE_NAME or provenance is None):  # that training's, the latest
                _copy(base / name, folder / name)
        if provenance is not None:
            write_provenance(folder, provenance)
        if layout == TRANSFORMERS:
            write_model_files(base, folder, provenance, tokenizer)
        elif tokenizer is not None:
            copy_files(tokenizer, folder)
        if weights.changed:
            weights.write_plain_files(folder)
        for number, shard in enumerate(shards, start=1):
            lock.require()
            with weights.open(shard) as source, SafetensorsFile(adapter / WEIGHTS_NAME) as factors:
                count = _write_shard(source, folder / weights.target(shard), changes, factors, (rounding, survival))
            changed, copied = changed + count, copied + len(source.tensors) - count
            progress(
                tr(
                    "{shard} ({number} of {shards}): {count} of {tensors} tensors changed",
                    shard=weights.target(shard),
                    number=number,
                    shards=len(shards),
                    count=count,
                    tensors=len(source.tensors),
                )
            )
        if INDEX_NAME in others and not weights.changed:
            _copy(base / INDEX_NAME, folder / INDEX_NAME)
    kept = survival.shares()
    return MergeReport(output, changed, copied, size, tuple(notes), kept, tuple(_warnings(kept, rounding)))


def _warnings(kept: dict[str, float], rounding: str) -> Iterator[str]:
    for region_name, share in kept.items():
        if share < MOST_KEPT and rounding == NEAREST:
            yield tr(
                "rounding keeps only {share:.0%} of the update in {region}: it is small compared with the weights;"
                " --rounding stochastic keeps nearly all, or answer with the adapter unmerged",
                share=share,
                region=region_name,
            )
        elif share < MOST_KEPT:
            yield tr(
                "rounding keeps only {share:.0%} of the update in {region}; answer with the adapter unmerged",
                share=share,
                region=region_name,
            )


def _tensors(weights: PlainWeights) -> dict[str, tuple[str, tuple[int, ...]]]:
    found: dict[str, tuple[str, tuple[int, ...]]] = {}
    for shard in weights.shards:
        with weights.open(shard) as source:
            found |= {name: (tensor.dtype, tensor.shape) for name, tensor in source.tensors.items()}
    return found


def _write_shard(
    source: SafetensorsFile | PlainFile,
    target: Path,
    changes: Changes,
    factors: SafetensorsFile,
    rounding: tuple[str, Survival],
) -> int:
    """Write one shard; return how many of its tensors changed."""
    changed = 0
    with target.open("xb") as stream:
        stream.write(source.prefix())
        for name, tensor in source.tensors.items():
            if name in changes:
                changed += 1
                _write_changed(stream, source, tensor, changes, factors, rounding)
            else:
                for chunk in source.chunks(tensor):
                    stream.write(chunk)
    files.sync(target)
    return changed


def _write_changed(
    stream: BinaryIO,
    source: SafetensorsFile | PlainFile,
    tensor: StoredTensor,
    changes: Changes,
    factors: SafetensorsFile,
    rounding: tuple[str, Survival],
) -> None:
    way, survival = rounding
    dtype = DTYPES[tensor.dtype]
    change = changes.weights.get(tensor.name)
    generator = generator_for(tensor.name) if way == STOCHASTIC and dtype.itemsize == 2 else None
    step = max(1, BLOCK_BYTES // (4 * max(tensor.width, 1)))
    for first in range(0, tensor.rows, step):
        last = min(first + step, tensor.rows)
        copy = changes.copies.get(tensor.name)
        rows = source.read(tensor.name, first, last) if copy is None else factors.read(copy, first, last)
        if tensor.name in changes.replaced:
            wide = factors.read(changes.replaced[tensor.name], first, last).float()
        elif change is not None:
            wide = change.apply(rows, first, factors)
        else:
            wide = changes.biases[tensor.name].apply_bias(rows, first, factors)
        narrow = (wide.to(dtype) if generator is None else round_stochastic(wide, dtype, generator)).contiguous()
        survival.add(_region(tensor.name), rows, wide, narrow)
        if not bool(torch.isfinite(narrow).all()):
            raise AdapterError(
                tr(
                    "{name}: not finite after merging (rows {first} to {last}, stored as {dtype})",
                    name=tensor.name,
                    first=first,
                    last=last - 1,
                    dtype=tensor.dtype,
                ),
                hint=tr(
                    "the adapter holds NaN or values too large for that format; use an earlier checkpoint of the run"
                ),
                code="adapter-non-finite",
            )
        stream.write(narrow.view(torch.uint8).numpy().tobytes())


def _region(name: str) -> str:
    """Return the region of a tensor as training reports it; its module where it is in none."""
    module = name.rpartition(".")[0]
    found = region(module)
    return module if found == "other" else found


def _other_files(base: Path, shards: list[str]) -> tuple[list[str], list[str]]:
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


def _require_own(base: Path, name: str) -> None:
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


def _notes(base: Path, recorded: str | None, left_out: list[str]) -> list[str]:
    notes = []
    if recorded and Path(recorded).name != base.resolve().name and Path(recorded).resolve() != base.resolve():
        notes.append(
            tr(
                "the adapter names {recorded} as its base, this base is {base}; names and shapes match, but cogtune"
                " cannot tell whether it is the same model",
                recorded=recorded,
                base=base,
            )
        )
    if left_out:
        notes.append(
            tr("not copied, as they hold weights without the adapter: {left_out}", left_out=", ".join(left_out))
        )
    return notes


def _require_new(output: Path, base: Path) -> None:
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise OutputFolderError(
            tr("{output}: exists already", output=output), hint=tr("choose another --output; nothing is overwritten")
        )
    if not base.is_dir():
        raise CheckpointError(
            tr("{base}: no such model folder", base=base),
            hint=tr("pass the base model's folder"),
            code="checkpoint-missing",
        )
    if output.resolve().is_relative_to(base.resolve()):
        raise OutputFolderError(
            tr("{output}: lies inside the base model", output=output), hint=tr("choose an --output outside it")
        )


@contextmanager
def _partial(output: Path, size: int, notes: list[str]) -> Iterator[Path]:
    """Yield a hidden folder that is renamed to ``output`` if the block succeeds, and deleted if it fails."""
    with explained(
        output, kept=tr("the unfinished folder was removed"), then=tr("{size:.1f} GB are needed", size=size / 1e9)
    ):
        leftover = files.partial_path(output)
        if files.remove_unfinished(leftover):
            notes.append(tr("removed {leftover}, left by an interrupted merge", leftover=leftover))
        with files.growing_folder(output, durable=True) as folder:
            _require_space(folder, size)
            yield folder


def _require_space(folder: Path, size: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < size:
        raise DiskFullError(
            tr(
                "{parent}: {free:.1f} GB free; the merged model needs {size:.1f} GB",
                parent=folder.parent,
                free=free / 1e9,
                size=size / 1e9,
            ),
            hint=tr("free some space, or choose an --output on another disk"),
        )


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with source.open("rb") as reader, target.open("xb") as writer:
        shutil.copyfileobj(reader, writer, CHUNK)
    shutil.copymode(source, target)
    files.sync(target)
