"""Merge an adapter into a full model block by block, without a GPU and without loading the model.

Every shard is written with the base's header, so names, shapes, dtypes and layout are the published ones. Tensors that
the adapter does not change are copied byte for byte, and so are all other files (licences, tokenizer, configuration).
Memory holds a few blocks of rows and one pair of the adapter's factors.

The result is written to a hidden folder next to ``output``; its index is written last, then the folder is renamed. A
killed merge leaves neither an index nor the final name, so it cannot be loaded, and the next merge removes it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from cogtune.adapters.adapter_folder import WEIGHTS_NAME, find_adapter, find_base, read_adapter
from cogtune.adapters.attach import expected_shapes
from cogtune.adapters.base_files import copy_file, other_files, require_own
from cogtune.adapters.merge_arithmetic import read_changes
from cogtune.adapters.merged_shards import ShardWriter, is_packed
from cogtune.adapters.model_layout import (
    PUBLISHED,
    TRANSFORMERS,
    check_layout,
    is_copied,
    tokenizer_folder,
    write_model_files,
)
from cogtune.adapters.plain_weights import PlainWeights
from cogtune.adapters.provenance import (
    FORMAT_KEYS,
    PROVENANCE_NAME,
    changed_settings,
    read_provenance,
    write_provenance,
)
from cogtune.adapters.rounding import NEAREST, STOCHASTIC, Survival
from cogtune.adapters.safetensors_rows import SafetensorsFile
from cogtune.checkpoint.model_files import INDEX_NAME, PICKLED_INDEX_NAME, check_folder, load_model_config, whole_folder
from cogtune.checkpoint.quantize import require_packages
from cogtune.configuration.quantization import EIGHT_BIT, QuantSection, written_format
from cogtune.errors import CheckpointError, ConfigError, DiskFullError, OutputFolderError
from cogtune.language import tr
from cogtune.processing.model_folder import copy_files
from cogtune.system import files
from cogtune.system.file_errors import explained
from cogtune.system.locks import Lock, lock_beside

_CONFIG = "config.json"
_BYTES_PACKED = {"nf4": 0.53, "int8": 1.01, "fp8": 1.01}
"""Bytes a weight, with its scales."""
MOST_KEPT = 0.9
"""Share of the update below which a merge warns."""


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
    quant: str = "none",
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
        quant: ``nf4``, ``int8`` or ``fp8``: the exact sums of linear layers are stored so; memory holds one shard.

    Raises:
        ConfigError, SetupError: another rounding, layout or format; or the format needs a package that is missing.
        CheckpointError: the base is not a complete model folder, or has links to files outside it.
        AdapterError: the adapter cannot be merged, is for another base, or makes a tensor that is not finite.
        OutputFolderError: ``output`` exists, cannot be written, or another process writes it.
        DiskFullError: not enough space, before or while writing; nothing is left behind.
    """
    if rounding not in (NEAREST, STOCHASTIC):
        raise ConfigError(
            tr("rounding is {rounding}; it is nearest or stochastic", rounding=rounding), code="config-value"
        )
    _check_quant(quant, rounding, layout)
    check_layout(layout)
    adapter, output = find_adapter(adapter), Path(output)
    base = whole_folder(find_base(adapter) if base is None else base)
    _require_new(output, base)
    with lock_beside(output, tr("choose another --output"), progress) as lock:
        _require_new(output, base)  # another merge may have finished meanwhile
        return _merge(base, adapter, output, progress, lock, (rounding, layout, tokenizer, quant))


def _merge(
    base: Path,
    adapter: Path,
    output: Path,
    progress: Callable[[str], None],
    lock: Lock,
    form: tuple[str, str, str | Path | None, str],
) -> MergeReport:
    rounding, layout, given, quant = form
    check_folder(base)
    weights = PlainWeights(base)
    shards = weights.shards
    others, left_out = other_files(base, shards)
    others = [name for name in others if is_copied(name, layout)]
    left_out = [name for name in left_out if name != PICKLED_INDEX_NAME or not weights.changed]
    for name in [*shards, *others]:
        require_own(base, name)
    files_of = read_adapter(adapter)
    wanted = expected_shapes(load_model_config(base), files_of)
    changes, provenance = read_changes(files_of, _tensors(weights), wanted), read_provenance(adapter)
    tokenizer = tokenizer_folder(base, given, provenance)
    # what the merged folder has itself: the tokenizer, and plain numbers instead of the base's 4 bits
    own = {"model.tokenizer"} if tokenizer is not None else set()
    own |= set(FORMAT_KEYS) if weights.packed or quant != "none" else set()
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
    if quant != "none":
        notes.append(
            tr(
                "the linear layers of experts and tower are stored in {quant}: answers are those of quant.experts and"
                " quant.tower {quant}",
                quant=quant,
            )
        )
    elif weights.packed:
        notes.append(
            tr(
                "the base's {count} 4-bit weights are dequantised: the merged model has plain numbers and is larger,"
                " and loads without bitsandbytes",
                count=len(weights.packed),
            )
        )
    survival = Survival()
    size = sum((base / name).stat().st_size for name in others)
    size += weights.size() if quant == "none" else _packed_size(weights, quant)
    with _partial(output, size, notes) as folder:
        changed = copied = 0
        for name in others:
            if name != INDEX_NAME and (name != PROVENANCE_NAME or provenance is None):  # that training's, the latest
                copy_file(base / name, folder / name)
        if provenance is not None:
            write_provenance(folder, provenance)
        if layout == TRANSFORMERS:
            write_model_files(base, folder, provenance, tokenizer)
        elif tokenizer is not None:
            copy_files(tokenizer, folder)
        if weights.changed:
            weights.write_plain_files(folder)
        places: dict[str, tuple[str, int]] = {}
        for number, shard in enumerate(shards, start=1):
            lock.require()
            target = weights.target(shard)
            with weights.open(shard) as source, SafetensorsFile(adapter / WEIGHTS_NAME) as factors:
                writer = ShardWriter(changes, factors, rounding, quant, survival)
                count, held = writer.write(source, folder / target)
            changed, copied = changed + count, copied + len(source.tensors) - count
            places |= {name: (target, each) for name, each in held.items()}
            progress(
                tr(
                    "{shard} ({number} of {shards}): {count} of {tensors} tensors changed",
                    shard=target,
                    number=number,
                    shards=len(shards),
                    count=count,
                    tensors=len(source.tensors),
                )
            )
        if quant != "none":
            _write_packed_files(folder, places, quant)
            size = sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
        elif INDEX_NAME in others and not weights.changed:
            copy_file(base / INDEX_NAME, folder / INDEX_NAME)
    kept = survival.shares()
    return MergeReport(output, changed, copied, size, tuple(notes), kept, tuple(_warnings(kept, rounding)))


def _check_quant(quant: str, rounding: str, layout: str) -> None:
    known = ("none", "nf4", *EIGHT_BIT)
    if quant not in known:
        raise ConfigError(
            tr("quant is {quant}; it is {known}", quant=quant, known=tr(" or ").join(known)), code="config-value"
        )
    if quant != "none" and rounding != NEAREST:
        raise ConfigError(
            tr("rounding {rounding} is to the base's number format, and quant {quant} stores another one",
               rounding=rounding, quant=quant),
            hint=tr("leave out one of them; with quant the exact sum is quantised"),
            code="config-contradiction",
        )  # fmt: skip
    if quant != "none" and layout == "transformers":
        raise ConfigError(
            tr("layout transformers is for transformers' Auto classes, and they do not read weights in {quant}",
               quant=quant),
            hint=tr("leave out one of them; cogtune alone loads quantised weights"),
            code="config-contradiction",
        )  # fmt: skip
    require_packages(QuantSection.model_validate({"experts": quant}))


def _packed_size(weights: PlainWeights, quant: str) -> int:
    """Return the bytes of the shards with their linear layers in ``quant``, a little generously."""
    found = 0
    for shard in weights.shards:
        with weights.open(shard) as source:
            for name, tensor in source.tensors.items():
                packs = is_packed(name, tensor.shape)
                each = _BYTES_PACKED[quant] * tensor.rows * tensor.width if packs else tensor.stop - tensor.start
                found += int(each) + 4096
    return found


def _write_packed_files(folder: Path, places: dict[str, tuple[str, int]], quant: str) -> None:
    """Write the index of a folder with quantised layers, and say their format in its configuration."""
    if len({shard for shard, _ in places.values()}) > 1:
        index = {
            "metadata": {"total_size": sum(size for _, size in places.values())},
            "weight_map": {name: shard for name, (shard, _) in sorted(places.items())},
        }
        files.write_json(folder / INDEX_NAME, index, indent=2, durable=True)
    config = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
    files.write_json(folder / _CONFIG, config | {"quantization_config": written_format(quant)}, indent=2, durable=True)


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
