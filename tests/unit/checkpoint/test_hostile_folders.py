"""Model folders that lack files or lie about them: the file is named, in every command, and nothing is read past it."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from cogtune.checkpoint.fingerprint import model_fingerprint, tower_fingerprint
from cogtune.checkpoint.load import load_model
from cogtune.checkpoint.model_files import INDEX_NAME, read_header, shard_files
from cogtune.cli.main import main
from cogtune.demo.base import BASE
from cogtune.errors import CheckpointError

SECOND = "model-00002-of-00002.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(BASE, tmp_path / "m"))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    root = tmp_path / "d"
    for name in ("images", "labels"):
        (root / name).mkdir(parents=True)
    for number in range(2):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(root / "images" / f"{number}.png")
        turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
        (root / "labels" / f"{number}.json").write_text(json.dumps({"conversations": turns}))
    return root


@pytest.mark.parametrize("command", ["train", "predict", "data cache", "merge", "chat"])
def test_every_command_names_a_missing_shard(
    folder: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    (folder / SECOND).unlink()
    adapter = Path(__file__).parents[2] / "golden" / "saved-0.1.0" / "adapter"
    flags = {
        "train": ("--data", data, "--output", tmp_path / "o"),
        "predict": ("--data", data, "--output", tmp_path / "p.jsonl"),
        "data cache": ("--data", data, "--data.cache_dir", tmp_path / "c"),
        "merge": ("--adapter", adapter, "--output", tmp_path / "merged"),
        "chat": ("--query", "q"),
    }[command]
    assert main([*command.split(), "--model", str(folder), *map(str, flags)]) == 2
    shown = capsys.readouterr().err
    assert "error[checkpoint-shards]" in shown
    assert SECOND in shown


@pytest.mark.parametrize("read", [shard_files, model_fingerprint, tower_fingerprint, load_model])
def test_every_reader_names_a_missing_shard(folder: Path, read: Callable[[Path], Any]) -> None:
    (folder / SECOND).unlink()
    with pytest.raises(CheckpointError, match=f"1 of 2 shards are missing: {SECOND}"):
        read(folder)


@pytest.mark.parametrize("kind", ["pipe", "device", "loop", "folder"])
@pytest.mark.parametrize("name", [SECOND, INDEX_NAME, "config.json"])
def test_special_files_are_no_model_files(folder: Path, kind: str, name: str) -> None:
    (folder / name).unlink()
    if kind == "pipe":
        os.mkfifo(folder / name)
    elif kind == "folder":
        (folder / name).mkdir()
    else:
        (folder / name).symlink_to({"device": "/dev/zero", "loop": name}[kind])
    with pytest.raises(CheckpointError):
        load_model(folder)


INDEXES = ["", "[]", "{}", '{"weight_map": 5}', '{"weight_map": {"a": 5}}', '{"weight_map": [["a"]]}', "[" * 100_000]


@pytest.mark.parametrize("text", INDEXES, ids=range(len(INDEXES)))
def test_an_index_that_is_none(folder: Path, text: str) -> None:
    (folder / INDEX_NAME).write_text(text)
    with pytest.raises(CheckpointError) as caught:
        load_model(folder)
    assert caught.value.code in ("checkpoint-index", "unsafe-name", "checkpoint-tensors", "checkpoint-shards")


def safetensors(header: Any, payload: int = 16) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(payload)


ENTRY = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}
HEADERS: dict[str, Any] = {
    "a list": [],
    "a number": 5,
    "no entry": {"a": 5},
    "an entry without a shape": {"a": {"dtype": "F32", "data_offsets": [0, 16]}},
    "an unknown format": {"a": ENTRY | {"dtype": "F99"}},
    "a format that is a list": {"a": ENTRY | {"dtype": ["F32"]}},
    "a shape that is no list": {"a": ENTRY | {"shape": 4}},
    "a negative shape": {"a": ENTRY | {"shape": [-2, -2]}},
    "a shape of fractions": {"a": ENTRY | {"shape": [2.0, 2.0]}},
    "a shape that does not fit": {"a": ENTRY | {"shape": [2, 3]}},
    "offsets that go back": {"a": ENTRY | {"data_offsets": [16, 0]}},
    "one offset": {"a": ENTRY | {"data_offsets": [16]}},
    "tensors that overlap": {"a": ENTRY, "b": ENTRY},
    "a gap": {"a": ENTRY | {"shape": [2], "data_offsets": [8, 16]}},
    "too short": {"a": ENTRY | {"shape": [4, 4], "data_offsets": [0, 64]}},
    "too long": {"a": ENTRY | {"shape": [2], "data_offsets": [0, 8]}},
    "deep": b"[" * 100_000,
    "not UTF-8": b"\xff\xff",
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_header_that_lies_is_refused(tmp_path: Path, name: str) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(safetensors(HEADERS[name]))
    with pytest.raises(CheckpointError, match=r"model\.safetensors") as caught:
        read_header(file)
    assert caught.value.code == "checkpoint-truncated"


@pytest.mark.parametrize("content", [b"", b"123", struct.pack("<Q", 2**63), struct.pack("<Q", 200_000_000)])
def test_a_length_that_lies_is_refused(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)
    os.truncate(file, max(len(content), 300_000_000 if content[:1] == b"\x00" else 0))  # a sparse file takes no room
    with pytest.raises(CheckpointError) as caught:
        read_header(file)
    assert caught.value.code == "checkpoint-truncated"


def test_a_right_header_is_read(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    other = {"dtype": "U8", "shape": [], "data_offsets": [16, 17]}
    file.write_bytes(safetensors({"__metadata__": {"format": "pt"}, "b": other, "a": ENTRY}, 17))
    assert read_header(file) == {"a": ENTRY, "b": other}
