"""YAML of strangers and of tired people: numbers are what they look like, and nothing odd is a traceback or hangs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from cogtune.cli.main import main
from cogtune.configuration.load import load_config
from cogtune.configuration.yaml_text import describe, parse_value, read_mapping
from cogtune.errors import ConfigError

NUMBERS = {
    "0100": 100, "010": 10, "08": 8, "-007": -7, "+09": 9, "0": 0, "00": 0, "0x1F": 31, "-0x10": -16, "1_000": 1000,
    "01.5": 1.5, "1e-4": 1e-4, "012e1": 120.0, "1:30": "1:30", "2024-01-01": "2024-01-01", "0b1": "0b1", "0o17": "0o17",
}  # fmt: skip


@pytest.mark.parametrize(("text", "value"), NUMBERS.items())
def test_numbers_are_what_they_look_like(text: str, value: Any) -> None:
    found = parse_value(text)
    assert found == value
    assert type(found) is type(value)


def test_a_flag_and_a_file_read_the_same_number(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("train.max_steps: 0100\n")
    needed = {"model": "m", "data": "d", "output": "o"}
    assert load_config(file, needed).train.max_steps == 100
    assert load_config(None, needed | {"train.max_steps": "0100"}).train.max_steps == 100


def doubling(levels: int) -> str:
    inner = "&b0 [x,x,x,x,x,x,x,x,x,x]"
    for level in range(1, levels):
        inner = f"&b{level} [{inner}," + ",".join([f"*b{level - 1}"] * 9) + "]"
    return inner


ODD = {
    "aliases": f"lora.rank: {doubling(40)}\n",
    "an alias inside itself": "lora.rank: &a [*a]\n",
    "depth": "lora.extra: " + "[" * 2000 + "]" * 2000 + "\n",
    "unfinished depth": "lora.extra: " + "[" * 5000,
    "a date that is none": "train.seed: !!timestamp x\n",
    "a number that is none": "train.lr: !!float abc\n",
    "a whole number that is none": "train.seed: !!int 1.5x\n",
    "bytes that are none": "train.seed: !!binary 5\n",
    "a set": "train.seed: !!set {a, b}\n",
    "pairs": "train.seed: !!pairs [a]\n",
    "5000 digits": "train.seed: " + "9" * 5000 + "\n",
    "4000 digits": "train.seed: " + "9" * 4000 + "\n",
    "a Python object": "train.seed: !!python/object/apply:os.system [ls]\n",
    "a tag of its own": "train.seed: !mine 5\n",
    "a list as a key": "? [a, b]\n: 1\n",
    "two documents": "a: 1\n---\nb: 2\n",
    "control characters": "train.seed: '\x07'\n",
    "a tab": "train:\n\tseed: 1\n",
    "a merge of a number": "train: {<<: 5}\n",
    "an alias of nothing": "train.seed: *nobody\n",
}  # fmt: skip


@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize("suffix", [".yaml", ".json"])
def test_odd_files_are_refused(
    tmp_path: Path, name: str, suffix: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / f"c{suffix}"
    file.write_text(ODD[name] if suffix == ".yaml" else "[" * 50_000 if name == "depth" else "9" * 5000)
    assert main(["train", str(file), "--model", "m", "--data", "d", "--output", "o"]) == 2
    shown = capsys.readouterr().err
    assert "error[config" in shown
    assert len(shown) < 1000


@pytest.mark.parametrize("value", ["&a [*a]", doubling(9), "[" * 2000, "!!float x", "9" * 5000])
def test_odd_flags_are_refused(value: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--model", "m", "--data", "d", "--output", "o", "--lora.rank", value]) == 2
    assert "error[config" in (shown := capsys.readouterr().err)
    assert len(shown) < 7000


def test_an_alias_is_still_an_alias(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("a: &x {b: [1, 2]}\nc: {<<: *x, d: *x}\n")
    assert read_mapping(file) == {"a": {"b": [1, 2]}, "c": {"b": [1, 2], "d": {"b": [1, 2]}}}


def test_a_large_value_is_described_shortly() -> None:
    nested: list[Any] = ["x"] * 10
    for _ in range(40):
        nested = [nested] * 10
    for value in (nested, {"a": nested}, 10**5000, "x" * 10**6):
        assert len(describe(value)) < 100
    assert describe([1, "a"]) == "list [1, 'a']"


@pytest.mark.parametrize("kind", ["pipe", "device", "loop", "folder"])
def test_a_special_file_is_refused(tmp_path: Path, kind: str) -> None:
    file = tmp_path / "c.yaml"
    if kind == "pipe":
        os.mkfifo(file)
    elif kind == "folder":
        file.mkdir()
    else:
        file.symlink_to({"device": "/dev/zero", "loop": file.name}[kind])
    said = "a folder, and a configuration file was expected" if kind == "folder" else "cannot read"
    with pytest.raises(ConfigError, match=rf"c\.yaml: {said}"):
        read_mapping(file)


def test_a_shells_stream_is_read(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.write(writing, b"train.lr: 1e-3\n")
    os.close(writing)
    assert read_mapping(f"/dev/fd/{reading}") == {"train.lr": 1e-3}
    os.close(reading)
