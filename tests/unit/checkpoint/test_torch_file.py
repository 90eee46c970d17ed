"""Files of ``torch.save``: every tensor is where its bytes are, and a hostile file is refused unexecuted."""

from __future__ import annotations

import io
import os
import pickle
import tarfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cogtune.checkpoint.stream import DTYPES, stream
from cogtune.checkpoint.torch_file import read_torch_file
from cogtune.errors import CheckpointError


def table() -> OrderedDict[str, torch.Tensor]:
    shared = torch.randn(10, 4)
    found: OrderedDict[str, torch.Tensor] = OrderedDict()
    found["half"] = torch.randn(3, 4).half()
    found["parameter"] = torch.nn.Parameter(torch.randn(2, 2).bfloat16())
    found["bytes"] = torch.arange(5, dtype=torch.uint8).view(5, 1)
    found["nothing"] = torch.zeros(0, 3)
    found["scalar"] = torch.tensor(7, dtype=torch.int64)
    found["part"], found["whole"] = shared[2:5], shared
    return found


@pytest.mark.parametrize("wrapped", [OrderedDict, dict], ids=["ordered", "dict"])
def test_every_tensor_is_read_from_its_bytes(tmp_path: Path, wrapped: Callable[[Any], Any]) -> None:
    saved = table()
    torch.save(wrapped(saved), tmp_path / "w.bin")
    found = read_torch_file(tmp_path / "w.bin")
    assert {tensor.name for tensor in found} == saved.keys()
    assert [tensor.start for tensor in found] == sorted(tensor.start for tensor in found)
    for stored, value in stream(found, lambda name: torch.device("cpu")):
        expected = saved[stored.name]
        assert DTYPES[stored.dtype] == expected.dtype
        assert torch.equal(value, expected.detach()), stored.name


def test_a_files_content_decides_what_is_read_not_its_name(tmp_path: Path) -> None:
    """Read once per content: a file that is written again is read again."""
    torch.save({"a": torch.zeros(2)}, tmp_path / "w.bin")
    assert [tensor.name for tensor in read_torch_file(tmp_path / "w.bin")] == ["a"]
    torch.save({"b": torch.zeros(2), "c": torch.zeros(3)}, tmp_path / "w.bin")
    assert [tensor.name for tensor in read_torch_file(tmp_path / "w.bin")] == ["b", "c"]


class Runs:
    """Creates a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.mark}",)


class Calls(Runs):
    def __reduce__(self) -> Any:
        return eval, (f"open({str(self.mark)!r}, 'w')",)


class Own:
    """A class that only its own program has."""


def saved(value: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


def rewritten(change: Callable[[str, bytes], bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    """A good file whose members are changed."""
    buffer = io.BytesIO()
    source = zipfile.ZipFile(io.BytesIO(saved({"w": torch.zeros(16), "v": torch.zeros(16)})))
    with zipfile.ZipFile(buffer, "w", compression) as target:
        for name in source.namelist():
            content = change(name, source.read(name))
            target.writestr(name, content)
    return buffer.getvalue()


def huge(name: str, content: bytes) -> bytes:
    """The pickle says 2^40 values where 16 are stored."""
    if not name.endswith("data.pkl"):
        return content
    count = pickle.encode_long(2**40)
    return content.replace(b"K\x10", b"\x8a" + bytes([len(count)]) + count)


def tar() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("storages"), io.BytesIO())
    return buffer.getvalue()


def other_zip(*names: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in names:
            archive.writestr(name, b"x")
    return buffer.getvalue()


GOOD = saved({"w": torch.zeros(64, 64)})
HOSTILE: dict[str, tuple[Callable[[Path], bytes], str, str]] = {
    "a command": (lambda mark: saved({"w": Runs(mark)}), "posix.system", "unsafe-pickle"),
    "an expression": (lambda mark: saved({"w": Calls(mark)}), "eval", "unsafe-pickle"),
    "a command by a computed name": (
        lambda mark: saved({"w": Runs(mark)}, pickle_protocol=4), "a name that it computes", "unsafe-pickle",
    ),
    "a class": (lambda mark: saved({"w": Own()}), "Own", "unsafe-pickle"),
    "a whole model": (lambda mark: saved(torch.nn.Linear(2, 2)), "torch.nn.modules.linear.Linear", "unsafe-pickle"),
    "a bare pickle": (lambda mark: pickle.dumps({"w": Runs(mark)}), "a bare pickle", "checkpoint-pickle"),
    "torch before 1.6": (
        lambda mark: saved({"w": torch.zeros(2)}, _use_new_zipfile_serialization=False), "before 1.6",
        "checkpoint-pickle",
    ),
    "a tar file": (lambda mark: tar(), "tar", "checkpoint-pickle"),
    "sizes beyond the file": (lambda mark: rewritten(huge), "claims", "checkpoint-truncated"),
    "a storage cut short": (
        lambda mark: rewritten(lambda name, content: content[:8] if "data/0" in name else content), "claims",
        "checkpoint-truncated",
    ),
    "a storage left out": (
        lambda mark: rewritten(lambda name, content: content).replace(b"data/1", b"data/9"), "claims",
        "checkpoint-truncated",
    ),
    "compressed": (
        lambda mark: rewritten(lambda name, content: content, zipfile.ZIP_DEFLATED), "compressed", "checkpoint-pickle",
    ),
    "a zip cut off": (lambda mark: GOOD[: len(GOOD) // 2], "cut off after", "checkpoint-truncated"),
    "a zip with holes": (lambda mark: GOOD[:200] + bytes(300) + GOOD[500:], "", "checkpoint-pickle"),
    "another zip": (lambda mark: other_zip("notes.txt"), "no single data.pkl", "checkpoint-pickle"),
    "a TorchScript program": (lambda mark: other_zip("m/data.pkl", "m/constants.pkl"), "TorchScript", "unsafe-pickle"),
    "a pickle that ends too early": (
        lambda mark: rewritten(lambda name, content: content[:40] if name.endswith(".pkl") else content), "",
        "checkpoint-pickle",
    ),
    "a list": (lambda mark: saved([torch.zeros(2)]), "no table of tensors", "checkpoint-pickle"),
    "a table in a table": (lambda mark: saved({"model": {"w": torch.ones(2)}}), "model in it is", "checkpoint-pickle"),
    "a number": (lambda mark: saved({"w": torch.zeros(2), "step": 5}), "step in it is no", "checkpoint-pickle"),
    "a transposed tensor": (lambda mark: saved({"w": torch.zeros(2, 3).T}), "contiguous", "checkpoint-pickle"),
    "complex numbers": (lambda mark: saved({"w": torch.zeros(2, dtype=torch.cfloat)}), "Complex", "unsafe-pickle"),
    "a pointer": (lambda mark: b"version https://git-lfs.github.com/spec/v1\n", "Git LFS", "checkpoint-truncated"),
    "nothing": (lambda mark: b"", "0 bytes", "checkpoint-truncated"),
    "zeros": (lambda mark: bytes(1000), "expected a file that torch.save wrote", "checkpoint-truncated"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_file_that_is_not_tensors_is_refused_and_not_executed(tmp_path: Path, name: str) -> None:
    make, told, code = HOSTILE[name]
    (tmp_path / "w.bin").write_bytes(make(tmp_path / "executed"))
    with pytest.raises(CheckpointError, match=r"w\.bin") as caught:
        read_torch_file(tmp_path / "w.bin")
    assert not (tmp_path / "executed").exists()
    assert told in caught.value.message
    assert caught.value.code == code
    assert caught.value.hint


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "w.bin")
    with pytest.raises(CheckpointError, match="a pipe, not a file"):
        read_torch_file(tmp_path / "w.bin")
