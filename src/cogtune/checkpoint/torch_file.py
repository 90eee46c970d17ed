"""Tensors of a ``.bin`` file that ``torch.save`` wrote, as ranges of its bytes.

Such a file is a zip of one pickle, which names and shapes the tensors, and one uncompressed member per storage. So a
tensor is read like one of a safetensors file (`checkpoint.stream`), and no tensor is read to list them.

Files from strangers are not executed. Before the pickle is read, every name it would import is compared with the few
that tensors need. Then torch's weights-only unpickler reads it with storages on the meta device, which takes no memory
for them, whatever sizes it claims. What it says is compared with the zip's own directory.
"""

from __future__ import annotations

import os
import pickletools
import struct
import zipfile
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import torch

from cogtune.checkpoint.stream import DTYPES, StoredTensor
from cogtune.errors import CheckpointError
from cogtune.language import phrase, tr
from cogtune.system.reading import open_file

_MOST_PICKLE = 16 * 2**20
"""Bytes of the pickle; that of the published 4-bit model is about 1 MB."""
_MOST_MEMBERS = 2**18
_ALLOWED = {
    "collections OrderedDict",
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter",
    *(f"torch {kind}Storage" for kind in ("Double", "Float", "Half", "BFloat16", "Long", "Int", "Short", "Char",
                                          "Byte", "Bool")),
}  # fmt: skip
"""What a file of tensors imports, as the pickle's instructions spell it."""
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_LOCAL_HEADER = struct.Struct("<4s22xHH")

_FETCH = phrase("fetch the file again from a source that you trust")
_SAFE = phrase(
    "do not open it with torch.load; take a folder of safetensors files, or fetch it again from a source that you trust"
)
_REWRITE = phrase(
    "write it again: `torch.save(torch.load(FILE, weights_only=True), FILE)`, or take a folder of safetensors files"
)


def read_torch_file(file: Path) -> list[StoredTensor]:
    """Return the tensors of a file that ``torch.save`` wrote, in byte order, without executing anything in it.

    Raises:
        CheckpointError: cut off, of another format, or holding anything but whole contiguous tensors by name.
    """
    try:
        found = file.stat()
    except OSError as error:
        raise _refused(file, str(error.strerror), tr(_FETCH), code="checkpoint-read") from error
    return list(_read(file, found.st_size, found.st_mtime_ns))


@lru_cache(maxsize=64)
def _read(file: Path, size: int, changed: int) -> tuple[StoredTensor, ...]:
    """Read once what every step of a command asks for: ``size`` and ``changed`` identify the file's content."""
    try:
        with open_file(file) as stream:
            members = _members(file, stream)
            stream.seek(0)
            table = torch.load(stream, map_location="meta", weights_only=True)
        return tuple(sorted(_tensors(file, table, members), key=lambda tensor: (tensor.start, tensor.name)))
    except CheckpointError:
        raise
    except OSError as error:
        raise _refused(file, error.strerror or str(error), tr(_FETCH), code="checkpoint-read") from error
    except Exception as error:  # a malformed pickle makes zipfile and torch's unpickler raise anything
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise _refused(
            file, tr("neither zip nor pickle can be read without executing anything: {reason:.200}", reason=reason),
            tr(_FETCH),
        ) from error  # fmt: skip


def _members(file: Path, stream: BinaryIO) -> dict[int, int]:
    """Check the zip and its pickle, and return the sizes of its storages by their first byte in the file."""
    if not zipfile.is_zipfile(stream):
        raise _no_zip(file, stream)
    with zipfile.ZipFile(stream) as archive:
        listed = archive.infolist()
        pickles = [member for member in listed if member.filename.rpartition("/")[2] == "data.pkl"]
        _check_members(file, listed, pickles)
        _check_imports(file, archive.read(pickles[0]))
    root = pickles[0].filename.removesuffix("data.pkl")
    return dict(_storages(file, stream, [member for member in listed if member.filename.startswith(f"{root}data/")]))


def _check_members(file: Path, listed: list[zipfile.ZipInfo], pickles: list[zipfile.ZipInfo]) -> None:
    names = {member.filename.rpartition("/")[2] for member in listed}
    if "constants.pkl" in names:
        raise _refused(file, tr("a TorchScript program, not weights"), tr(_SAFE), code="unsafe-pickle")
    if len(pickles) != 1 or len(listed) > _MOST_MEMBERS:
        raise _refused(file, tr("a zip that torch.save did not write: no single data.pkl in it"), tr(_FETCH))
    packed = next((member.filename for member in listed if member.compress_type != zipfile.ZIP_STORED), None)
    if packed is not None:
        raise _refused(file, tr("{name} in it is compressed; torch.save compresses nothing", name=packed), tr(_REWRITE))
    if pickles[0].file_size > _MOST_PICKLE:
        raise _refused(
            file,
            tr("its pickle takes {size:,} bytes; names and shapes take at most {most:,}", size=pickles[0].file_size,
               most=_MOST_PICKLE),
            tr(_SAFE),
            code="unsafe-pickle",
        )  # fmt: skip


def _check_imports(file: Path, program: bytes) -> None:
    """Refuse a pickle that would import, or call by a computed name, anything but what tensors need."""
    for instruction, argument, _ in pickletools.genops(program):
        if instruction.name in ("STACK_GLOBAL", "INST", "EXT1", "EXT2", "EXT4"):
            named = tr("something by a name that it computes ({instruction})", instruction=instruction.name)
        elif instruction.name == "GLOBAL" and argument not in _ALLOWED:
            named = str(argument).replace(" ", ".")
        else:
            continue
        raise _refused(
            file,
            tr("its pickle would import {named}, which no tensor needs; nothing was executed", named=named),
            tr(_SAFE),
            code="unsafe-pickle",
        )


def _storages(file: Path, stream: BinaryIO, members: list[zipfile.ZipInfo]) -> Iterator[tuple[int, int]]:
    end = os.fstat(stream.fileno()).st_size
    for member in members:
        stream.seek(member.header_offset)
        signature, name, extra = _LOCAL_HEADER.unpack(stream.read(_LOCAL_HEADER.size))
        start = member.header_offset + _LOCAL_HEADER.size + name + extra
        if signature != b"PK\3\4" or start + member.file_size > end:
            raise _refused(
                file, tr("{name} in it goes beyond the file's end", name=member.filename), tr(_FETCH),
                code="checkpoint-truncated",
            )  # fmt: skip
        yield start, member.file_size


def _tensors(file: Path, table: Any, members: Mapping[int, int]) -> Iterator[StoredTensor]:
    if not isinstance(table, dict) or not all(isinstance(name, str) for name in table):
        raise _refused(file, tr("it holds no table of tensors by name, but {kind}", kind=type(table).__name__),
                       tr(_REWRITE))  # fmt: skip
    for name, value in table.items():
        if not isinstance(value, torch.Tensor):
            raise _refused(
                file,
                tr("{name} in it is no tensor, but {kind}", name=name, kind=type(value).__name__),
                tr("a file of weights holds tensors by name, as model.state_dict() gives them; take such a file"),
            )
        if value.dtype not in _NAMES or value.layout != torch.strided or not value.is_contiguous():
            raise _refused(file, tr("{name} in it is no contiguous tensor of a known dtype", name=name), tr(_REWRITE))
        storage: Any = value.untyped_storage()
        first, size = int(value.storage_offset()) * value.element_size(), value.numel() * value.element_size()
        begin: int = getattr(storage, "_checkpoint_offset", -1)
        if size and members.get(begin, -1) < max(storage.nbytes(), first + size):
            raise _refused(
                file,
                tr("{name} claims {size:,} bytes that the file does not hold", name=name, size=first + size),
                tr(_FETCH),
                code="checkpoint-truncated",
            )
        start = max(begin, 0) + first
        yield StoredTensor(name, file, _NAMES[value.dtype], tuple(value.shape), start, start + size)


def _no_zip(file: Path, stream: BinaryIO) -> CheckpointError:
    stream.seek(0)
    start, size = stream.read(512), os.fstat(stream.fileno()).st_size
    if start.startswith(b"PK"):
        return _refused(file, tr("cut off after {size:,} bytes: the zip's directory is missing", size=size), tr(_FETCH),
                        code="checkpoint-truncated")  # fmt: skip
    if start.startswith(b"version https://git-lfs"):
        return _refused(file, tr("a pointer of Git LFS, not the file itself"), tr("run `git lfs pull` in the folder"),
                        code="checkpoint-truncated")  # fmt: skip
    if start[257:262] == b"ustar" or start.startswith(b"\x80"):
        return _refused(
            file,
            tr("a bare pickle or tar file, as torch wrote before 1.6; its tensors cannot be read one by one"),
            tr(_REWRITE),
        )
    return _refused(file, tr("{size:,} bytes; expected a file that torch.save wrote", size=size), tr(_FETCH),
                    code="checkpoint-truncated")  # fmt: skip


def _refused(file: Path, why: str, hint: str, *, code: str = "") -> CheckpointError:
    message = tr("{file}: {why}", file=file, why=why)
    if not code:
        return CheckpointError(message, hint=hint, code="checkpoint-pickle")
    return CheckpointError(message, hint=hint, code=code)
