"""``cogtune bench make-checkpoint``: a random checkpoint in the published layout, for measurements at full size.

Names, shapes, number format, shards, index and configuration equal those of the published folder; the weights are
random, so its answers are meaningless. Values are made on the GPU if there is one; host memory holds one shard. The
index is written last: a folder without it does not load.

The tokenizer is byte-level: it has the published vocabulary's size and special token ids, but not its words.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from cogtune.checkpoint.model_files import INDEX_NAME
from cogtune.checkpoint.random import (
    fill_random,
    published_config,
    published_first_config,
    published_video_config,
    tiny_config,
    tiny_first_config,
    tiny_video_config,
    write_published_config,
)
from cogtune.configuration.model import CogVLM2Config
from cogtune.errors import DiskFullError, OutputFolderError
from cogtune.language import tr
from cogtune.model.modeling import CogVLM2ForCausalLM
from cogtune.processing.tokenizer import write_byte_tokenizer
from cogtune.system import files
from cogtune.system.file_errors import explained
from cogtune.system.locks import lock_beside

SHARD_LIMIT = 5 * 10**9
PRESETS: dict[str, Callable[[], CogVLM2Config]] = {
    "full": published_config,
    "video": published_video_config,
    "first": published_first_config,
    "tiny": tiny_config,
    "tiny-video": tiny_video_config,
    "tiny-first": tiny_first_config,
}

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Written:
    """Result; ``seconds`` includes flushing to disk."""

    folder: Path
    bytes: int
    tensors: int
    shards: int
    seconds: float


def plan_shards(config: CogVLM2Config, limit: int = SHARD_LIMIT) -> list[Shapes]:
    """Return the tensors of each shard, in module order, starting a new shard when the limit would be exceeded."""
    with torch.device("meta"):
        model = CogVLM2ForCausalLM(config)
    shards: list[Shapes] = [{}]
    filled = 0
    for name, value in model.state_dict().items():
        size = 2 * value.numel()
        if filled + size > limit and shards[-1]:
            shards.append({})
            filled = 0
        shards[-1][name] = tuple(value.shape)
        filled += size
    return shards


def make_checkpoint(
    folder: Path,
    *,
    preset: str = "full",
    device: torch.device,
    seed: int = 0,
    progress: Callable[[str], None] = lambda line: None,
) -> Written:
    """Write one of `PRESETS` (39, 25 and 35 GB, and below 400 kB) into the new folder ``folder``.

    Raises:
        OutputFolderError: it contains files already.
        DiskFullError: too little space, before or while writing.
    """
    config = PRESETS[preset]()
    shards = plan_shards(config, 150_000 if preset.startswith("tiny") else SHARD_LIMIT)
    total = sum(2 * math.prod(shape) for shard in shards for shape in shard.values())
    began = time.perf_counter()
    what = tr("remove the unfinished folder")
    with lock_beside(folder, tr("choose a new folder"), progress), explained(folder, then=what, late=True):
        _require_room(folder, total)
        weight_map: dict[str, str] = {}
        generator = torch.Generator(device).manual_seed(seed)
        for number, shapes in enumerate(shards, start=1):
            name = f"model-{number:05}-of-{len(shards):05}.safetensors"
            save_file(_values(shapes, config, generator), folder / name, {"format": "pt"})
            size = (folder / name).stat().st_size
            weight_map |= dict.fromkeys(shapes, name)
            progress(f"{name}: {len(shapes)} tensors, {size:,} bytes, {time.perf_counter() - began:.0f} s")
        _write_small_files(folder, config, weight_map, total)
    return Written(folder, total, len(weight_map), len(shards), time.perf_counter() - began)


def make_outline(folder: Path, *, preset: str = "full") -> Path:
    """Write one of `PRESETS` into the new folder ``folder`` with holes in place of weights, and return it.

    Every check of a folder passes, and it takes a few MB of disk. For measurements of what comes before and after
    loading; whoever loads it has to put other weights in place, because all of these are 0.
    """
    config = PRESETS[preset]()
    shards = plan_shards(config, 150_000 if preset.startswith("tiny") else SHARD_LIMIT)
    folder.mkdir(parents=True)
    weight_map: dict[str, str] = {}
    for number, shapes in enumerate(shards, start=1):
        name, end, header = f"model-{number:05}-of-{len(shards):05}.safetensors", 0, dict[str, Any]()
        for tensor, shape in sorted(shapes.items()):
            begin, end = end, end + 2 * math.prod(shape)
            header[tensor] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [begin, end]}
        text = json.dumps(header).encode()
        with (folder / name).open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + end)
        weight_map |= dict.fromkeys(shapes, name)
    total = sum(2 * math.prod(shape) for shapes in shards for shape in shapes.values())
    _write_small_files(folder, config, weight_map, total)
    return folder


def _require_room(folder: Path, total: int) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise OutputFolderError(
            tr("{folder}: exists and is not an empty folder", folder=folder), hint=tr("choose a new folder")
        )
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < total + 2**28:
        raise DiskFullError(
            tr(
                "{folder}: {free:.1f} GB free; the checkpoint takes {total:.1f} GB",
                folder=folder,
                free=free / 1e9,
                total=total / 1e9,
            ),
            hint=tr("free some space, or choose another disk"),
        )


def _write_small_files(folder: Path, config: Any, weight_map: dict[str, str], total: int) -> None:
    write_published_config(folder, config)
    write_byte_tokenizer(
        folder, vocab_size=config.vocab_size, bos=config.bos_token_id, eos=config.eos_token_ids[0],
        eot=config.eos_token_ids[-1], pad=config.pad_token_id,
    )  # fmt: skip
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    for path in folder.iterdir():
        files.sync(path)
    files.sync(folder)


def _values(shapes: Shapes, config: CogVLM2Config, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Return the tensors of a shard on the CPU, each made on the generator's device."""
    found = {}
    for name, shape in sorted(shapes.items()):
        made = torch.empty(shape, dtype=torch.bfloat16, device=generator.device)
        found[name] = fill_random(made, name, config, generator).cpu()
    return found
