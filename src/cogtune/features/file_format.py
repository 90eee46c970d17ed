"""File format of one picture's features: a safetensors file of fixed size whose header holds a digest of its content.

Shapes: Q grid cells, W tower width, G groups of W that share a scale (float8 only).
"""

from __future__ import annotations

import hashlib
import json
import struct
from dataclasses import dataclass

import torch

from cogtune.language import tr

_FORMATS = "cogtune-features-"
FORMAT = f"{_FORMATS}1"
HEADER_BYTES = 1024
_GROUP = 128
_DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "float8": torch.float8_e4m3fn,
}
_SAFETENSORS = {"bfloat16": "BF16", "float16": "F16", "float32": "F32", "float8": "F8_E4M3"}


class DamagedError(Exception):
    """A file whose content was not written by `pack`: truncated, overwritten, or under another name."""


@dataclass(frozen=True)
class Layout:
    """Shape [cells, width] and dtype of stored features; all files of one layout have the same size."""

    cells: int
    width: int
    stored: str

    @property
    def groups(self) -> int:
        """Scales per cell: one per 128 channels, or one for all if 128 does not divide the width."""
        return self.width // _GROUP if self.width % _GROUP == 0 else 1

    @property
    def payload_bytes(self) -> int:
        return self.cells * self.width * _DTYPES[self.stored].itemsize

    @property
    def scale_bytes(self) -> int:
        return self.cells * self.groups * 4 if self.stored == "float8" else 0

    @property
    def file_bytes(self) -> int:
        return HEADER_BYTES + self.payload_bytes + self.scale_bytes


def pack(features_QW: torch.Tensor, layout: Layout, name: str) -> bytes:
    """Return the file's bytes. The digest includes ``name``, so that a file under a wrong name is detected."""
    if tuple(features_QW.shape) != (layout.cells, layout.width):
        raise ValueError(f"features of shape {tuple(features_QW.shape)}, expected {(layout.cells, layout.width)}")
    if layout.stored == "float8":
        values, scales = quantise(features_QW, layout.groups)
        payload = _bytes(values) + _bytes(scales)
    else:
        payload = _bytes(features_QW.to(_DTYPES[layout.stored]))
    return _header(layout, name, _digest(layout, name, payload)) + payload


def unpack(content: bytearray, layout: Layout, name: str) -> torch.Tensor:
    """Return features [Q, W] in the stored dtype (float32 for float8), sharing memory with ``content``.

    Raises:
        DamagedError: the bytes are not those that `pack` returned for this layout and name.
    """
    if len(content) != layout.file_bytes:
        raise DamagedError(
            tr("{content:,} bytes, expected {file_bytes:,}", content=len(content), file_bytes=layout.file_bytes)
        )
    payload = memoryview(content)[HEADER_BYTES:]
    if content[:HEADER_BYTES] != _header(layout, name, _digest(layout, name, payload)):
        raise DamagedError(tr("its digest is not that of its content"))
    shape = (layout.cells, layout.width)
    count = layout.cells * layout.width
    values = torch.frombuffer(content, dtype=_DTYPES[layout.stored], count=count, offset=HEADER_BYTES).view(shape)
    if layout.stored != "float8":
        return values
    scales = torch.frombuffer(content, dtype=torch.float32, offset=HEADER_BYTES + layout.payload_bytes)
    return dequantise(values, scales.view(layout.cells, layout.groups))


def name_in(head: bytes) -> str | None:
    """Return the name in the first `HEADER_BYTES` of a file, or None if `pack` did not make the file."""
    try:
        metadata = json.loads(head[8:HEADER_BYTES])["__metadata__"]
        name = metadata["name"] if str(metadata["format"]).startswith(_FORMATS) else None
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return name if isinstance(name, str) else None


def is_blank(head: bytes) -> bool:
    """Return whether a file is empty or all zeros, as after a power failure."""
    return not head.strip(b"\0")


def quantise(features_QW: torch.Tensor, groups: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return float8_e4m3 values [Q, W] and float32 scales [Q, G]; each group's largest magnitude maps to float8's
    largest."""
    wide = features_QW.float().unflatten(1, (groups, -1))
    scales = wide.abs().amax(-1) / torch.finfo(torch.float8_e4m3fn).max
    scales = torch.where(scales > 0, scales, torch.ones_like(scales))
    return (wide / scales[..., None]).flatten(1).to(torch.float8_e4m3fn), scales


def dequantise(values_QW: torch.Tensor, scales_QG: torch.Tensor) -> torch.Tensor:
    """Return float32 features [Q, W]."""
    return (values_QW.float().unflatten(1, (scales_QG.shape[1], -1)) * scales_QG[..., None]).flatten(1)


def relative_error(features_QW: torch.Tensor, layout: Layout) -> float:
    """Return ||stored - features|| / ||features|| of one picture."""
    wide = features_QW.double()
    if layout.stored == "float8":
        back = dequantise(*quantise(features_QW, layout.groups)).double()
    else:
        back = features_QW.to(_DTYPES[layout.stored]).double()
    norm = float(wide.norm())
    return float((back - wide).norm()) / norm if norm else 0.0


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def _digest(layout: Layout, name: str, payload: bytes | memoryview) -> str:
    digest = hashlib.sha256(f"{FORMAT}\0{name}\0{layout.cells}\0{layout.width}\0{layout.stored}\0".encode())
    digest.update(payload)
    return digest.hexdigest()


def _header(layout: Layout, name: str, digest: str) -> bytes:
    """Return the header, padded with spaces, as the format allows, to a size that does not depend on the content."""
    end = layout.payload_bytes
    described: dict[str, object] = {
        "__metadata__": {"format": FORMAT, "name": name, "sha256": digest},
        "features": {
            "dtype": _SAFETENSORS[layout.stored],
            "shape": [layout.cells, layout.width],
            "data_offsets": [0, end],
        },
    }
    if layout.scale_bytes:
        offsets = [end, end + layout.scale_bytes]
        described["scales"] = {"dtype": "F32", "shape": [layout.cells, layout.groups], "data_offsets": offsets}
    text = json.dumps(described, separators=(",", ":")).encode().ljust(HEADER_BYTES - 8)
    return struct.pack("<Q", HEADER_BYTES - 8) + text
