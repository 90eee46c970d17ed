"""A base's weight files as safetensors files of plain numbers, read in rows: what a merge adds to and copies from.

A safetensors file is that already. The tensors of a ``.bin`` file lie in another order and without that header, and a
layer that is stored quantised is several tensors: both get the header that such a file has, and the layer one weight,
dequantised one layer at a time to the format that its quantisation was made from.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch

from cogtune.adapters.safetensors_rows import CHUNK, SafetensorsFile, read_rows
from cogtune.checkpoint import stored_4bit
from cogtune.checkpoint.model_files import INDEX_NAME, shard_files, stored_tensors, tensors_of
from cogtune.checkpoint.stream import DTYPES, StoredTensor
from cogtune.system import files

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class PlainWeights:
    """The weights of a model folder, file by file.

    Attributes:
        changed: does a copy of the folder differ from it besides the adapter's changes (other files, plain numbers)?
        packed: names of the weights that are stored quantised.
    """

    def __init__(self, base: Path) -> None:
        self.base, self._stored = base, stored_tensors(base)
        self.packed = stored_4bit.find(self._stored)
        self.shards = sorted(shard_files(base))
        self.changed = bool(self.packed) or any(not name.endswith(".safetensors") for name in self.shards)
        if self.packed:
            stored_4bit.require_for(self._stored)

    def open(self, shard: str) -> SafetensorsFile | PlainFile:
        """Return the open file ``shard``."""
        if not self.changed:
            return SafetensorsFile(self.base / shard)
        return PlainFile(self.base / shard, self._stored, self.packed)

    def target(self, shard: str) -> str:
        """Return the name of its copy: the published name of a safetensors file."""
        name = shard.removesuffix(".bin").removesuffix(".safetensors")
        return f"{name.replace('pytorch_model', 'model')}.safetensors"

    def index(self) -> str:
        """Return the text of the copy's weight index."""
        places: dict[str, str] = {}
        size = 0
        for shard in self.shards:
            with self.open(shard) as source:
                places |= dict.fromkeys(source.tensors, self.target(shard))
                size += sum(tensor.stop - tensor.start for tensor in source.tensors.values())
        return (
            json.dumps({"metadata": {"total_size": size}, "weight_map": dict(sorted(places.items()))}, indent=2) + "\n"
        )

    def write_plain_files(self, folder: Path) -> None:
        """Write what differs besides the weights themselves: the index, and a configuration of plain numbers."""
        if len(self.shards) > 1:
            (folder / INDEX_NAME).write_text(self.index(), encoding="utf-8")
            files.sync(folder / INDEX_NAME)
        if self.packed:
            file = folder / "config.json"
            config = json.loads(file.read_text(encoding="utf-8"))
            config.pop("quantization_config", None)
            file.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
            files.sync(file)

    def size(self) -> int:
        """Return the bytes of the copies."""
        found = 0
        for shard in self.shards:
            with self.open(shard) as source:
                found += len(source.prefix()) + sum(tensor.stop - tensor.start for tensor in source.tensors.values())
        return found


class PlainFile:
    """A weight file of any kind in the form of `SafetensorsFile`; its tensors lie as their copies will.

    Raises:
        CheckpointError: as `tensors_of`; or the parts of a quantised layer do not make one.
    """

    def __init__(self, path: Path, stored: Mapping[str, StoredTensor], packed: set[str]) -> None:
        self.path, self._stored, self._packed = path, stored, packed
        self._last: tuple[str, torch.Tensor] | None = None
        self.tensors: dict[str, StoredTensor] = {}
        end = 0
        for tensor in tensors_of(path):
            owner = stored_4bit.owner(tensor.name, packed)
            if stored[tensor.name].file != path or (owner is not None and owner != tensor.name):
                continue
            if owner is not None:
                dtype, shape = stored_4bit.whole_form(owner, stored)
                tensor = replace(tensor, dtype=_NAMES[dtype], shape=shape)
            size = DTYPES[tensor.dtype].itemsize * tensor.rows * tensor.width
            self.tensors[tensor.name] = replace(tensor, start=end, stop=end + size)
            end += size

    def __enter__(self) -> PlainFile:
        return self

    def __exit__(self, *error: object) -> None:
        self._last = None

    def prefix(self) -> bytes:
        """Return the header of the copy."""
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        for name, tensor in self.tensors.items():
            offsets = [tensor.start, tensor.stop]
            header[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": offsets}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    def chunks(self, tensor: StoredTensor) -> Iterator[bytes]:
        """Yield a tensor's bytes in chunks."""
        if tensor.name in self._packed:
            yield self._dequantised(tensor.name).view(torch.uint8).numpy().tobytes()
            return
        stored = self._stored[tensor.name]
        with stored.file.open("rb", buffering=0) as file:
            file.seek(stored.start)
            for start in range(stored.start, stored.stop, CHUNK):
                yield file.read(min(CHUNK, stored.stop - start))

    def read(self, name: str, first: int = 0, last: int | None = None) -> torch.Tensor:
        """Return rows ``first`` to ``last`` (exclusive) of a tensor in its own dtype: [rows, ...]."""
        if name in self._packed:
            return self._dequantised(name)[first:last]
        stored = self._stored[name]
        with stored.file.open("rb", buffering=0) as file:
            return read_rows(file, stored, first, last)

    def _dequantised(self, name: str) -> torch.Tensor:
        if self._last is None or self._last[0] != name:
            self._last = (name, stored_4bit.dequantise(name, self._stored))
        return self._last[1]
