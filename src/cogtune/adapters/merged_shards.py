"""Writing one shard of a merged model: plain numbers block by block, or linear layers quantised one at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors.torch import save_file

from cogtune.adapters.merge_arithmetic import Changes
from cogtune.adapters.plain_weights import PlainFile
from cogtune.adapters.rounding import STOCHASTIC, Survival, generator_for, round_stochastic
from cogtune.adapters.safetensors_rows import DTYPES, SafetensorsFile
from cogtune.adapters.targets import region
from cogtune.checkpoint.quantize import stored_parts
from cogtune.checkpoint.stream import StoredTensor
from cogtune.configuration.quantization import part_of
from cogtune.errors import AdapterError
from cogtune.language import tr
from cogtune.system import files

BLOCK_BYTES = 32 * 2**20
"""Size of a block of rows in float32."""


@dataclass(frozen=True)
class ShardWriter:
    """Writes shards of a base with an adapter's ``changes``.

    Attributes:
        factors: the adapter's file.
        rounding: how sums are rounded to the base's format.
        quant: format of the linear layers of both experts and of the tower; ``none``: the base's.
        survival: counts what is left of the update.
    """

    changes: Changes
    factors: SafetensorsFile
    rounding: str
    quant: str
    survival: Survival

    def write(self, source: SafetensorsFile | PlainFile, target: Path) -> tuple[int, dict[str, int]]:
        """Write one shard; return how many of its tensors changed, and the bytes of each tensor that it holds.

        Raises:
            AdapterError: a tensor is not finite after merging.
        """
        changed = sum(name in self.changes for name in source.tensors)
        if self.quant != "none":
            held = self._quantised(source)
            save_file(held, target, metadata={"format": "pt"})
            files.sync(target)
            return changed, {name: tensor.nbytes for name, tensor in held.items()}
        with target.open("xb") as stream:
            stream.write(source.prefix())
            for name, tensor in source.tensors.items():
                if name in self.changes:
                    self._write_changed(stream, source, tensor)
                else:
                    for chunk in source.chunks(tensor):
                        stream.write(chunk)
        files.sync(target)
        return changed, {name: tensor.stop - tensor.start for name, tensor in source.tensors.items()}

    def _write_changed(self, stream: BinaryIO, source: SafetensorsFile | PlainFile, tensor: StoredTensor) -> None:
        dtype = DTYPES[tensor.dtype]
        random = self.rounding == STOCHASTIC and dtype.itemsize == 2
        generator = generator_for(tensor.name) if random else None
        for first, rows, wide in self._blocks(source, tensor):
            narrow = (wide.to(dtype) if generator is None else round_stochastic(wide, dtype, generator)).contiguous()
            self.survival.add(_region(tensor.name), rows, wide, narrow)
            _require_finite(tensor, narrow, first)
            stream.write(narrow.view(torch.uint8).numpy().tobytes())

    def _quantised(self, source: SafetensorsFile | PlainFile) -> dict[str, torch.Tensor]:
        """Return the shard's tensors. What is quantised is the exact sum, so that no rounding comes before."""
        held: dict[str, torch.Tensor] = {}
        for name, tensor in source.tensors.items():
            packs = is_packed(name, tensor.shape)
            if name in self.changes:
                blocks = list(self._blocks(source, tensor))
                whole = torch.cat([wide for _, _, wide in blocks])
                _require_finite(tensor, whole.to(DTYPES[tensor.dtype]), 0)
            else:
                whole = source.read(name)
            if packs:
                held |= stored_parts(self.quant, name, whole.float())
            else:
                held[name] = whole.to(DTYPES[tensor.dtype]) if name in self.changes else whole
        return held

    def _blocks(
        self, source: SafetensorsFile | PlainFile, tensor: StoredTensor
    ) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        """Yield a changed tensor's blocks of rows: the first row, the base's values, the exact sum (float32)."""
        changes, factors = self.changes, self.factors
        change, copy = changes.weights.get(tensor.name), changes.copies.get(tensor.name)
        step = max(1, BLOCK_BYTES // (4 * max(tensor.width, 1)))
        for first in range(0, tensor.rows, step):
            last = min(first + step, tensor.rows)
            rows = source.read(tensor.name, first, last) if copy is None else factors.read(copy, first, last)
            if tensor.name in changes.replaced:
                wide = factors.read(changes.replaced[tensor.name], first, last).float()
            elif change is not None:
                wide = change.apply(rows, first, factors)
            else:
                wide = changes.biases[tensor.name].apply_bias(rows, first, factors)
            yield first, rows, wide


def is_packed(name: str, shape: tuple[int, ...]) -> bool:
    """Return whether a tensor is the weight of a linear layer that a quantised folder stores packed."""
    return len(shape) == 2 and name.endswith(".weight") and part_of(name) is not None


def _region(name: str) -> str:
    """Return the region of a tensor as training reports it; its module where it is in none."""
    module = name.rpartition(".")[0]
    found = region(module)
    return module if found == "other" else found


def _require_finite(tensor: StoredTensor, stored: torch.Tensor, first: int) -> None:
    if bool(torch.isfinite(stored).all()):
        return
    raise AdapterError(
        tr(
            "{name}: not finite after merging (rows {first} to {last}, stored as {dtype})",
            name=tensor.name,
            first=first,
            last=first + stored.shape[0] - 1,
            dtype=tensor.dtype,
        ),
        hint=tr("the adapter holds NaN or values too large for that format; use an earlier checkpoint of the run"),
        code="adapter-non-finite",
    )
