"""The first hour, as the README orders it: doctor, download, check, preview, plan, train, chat; and no network needed
for what was not asked to be fetched."""

from __future__ import annotations

import json
import re
import socket

import pytest

from cogtune.cli.main import main
from tests.support.data_folders import dialogue, write_folder
from tests.support.fake_hub import FakeHub, serving

PICTURES = 800


@pytest.fixture
def everything_refused(monkeypatch):
    """Any connection is an error, as on a machine without a network."""

    def refuse(self, address):
        raise AssertionError(f"connects to {address}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def test_the_first_hour(tiny_checkpoint, tmp_path, monkeypatch, capsys):
    for name in ("HF_HUB_OFFLINE", "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    records = {f"{i:04d}": dialogue("What is it?", f"It is number {i % 7}.") for i in range(PICTURES)}
    write_folder(tmp_path / "my-data", records)

    def run(*arguments: str, code: int = 0) -> str:
        assert main(list(arguments)) == code, capsys.readouterr()
        return capsys.readouterr().out

    assert "torch" in run("doctor", "--offline")

    files = {file.name: file.read_bytes() for file in tiny_checkpoint.iterdir() if file.is_file()}
    with serving(FakeHub(files)) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        assert "files fetched" in run("download", "model", "--output", "cogvlm2")

    checked = json.loads(run("data", "check", "my-data", "--model", "cogvlm2", "--json"))
    assert str(PICTURES) in json.dumps(checked)
    assert "It is number 0." in run("data", "preview", "my-data", "--model", "cogvlm2", "--count", "1", "--width", "0")
    same = ("--model", "cogvlm2", "--data", "my-data", "--train.output", "output")
    assert "GiB" in run("plan", *same, "--card", "24GiB")
    run("train", *same, "--data.workers", "0", "--train.max_steps", "2", "--train.batch_size", "2")
    assert (tmp_path / "output" / "adapter" / "adapter_model.safetensors").is_file()
    picture = str(tmp_path / "my-data" / "images" / "0000.jpg")
    asked = ("--image", picture, "--query", "What is it?", "--max-new-tokens", "4")
    answer = run("chat", "--adapter", "output/adapter", *asked)
    assert answer.strip() or answer == "\n"


def test_from_init_to_a_merged_model_on_a_card_of_24_gib(tiny_checkpoint, tmp_path, monkeypatch, capsys):
    """init's comments, the plan and the run speak of the same rows; every next command that is named works."""
    monkeypatch.chdir(tmp_path)
    write_folder(tmp_path / "my-data", {f"{i:04d}": dialogue("What is it?", f"A {i % 7}.") for i in range(60)})

    def run(*arguments: str) -> str:
        assert main(list(arguments)) == 0, capsys.readouterr()
        return capsys.readouterr().out

    made = run("init", "my-data", "--model", str(tiny_checkpoint), "--card", "24GiB", "--output", "run.yaml")
    assert "next: cogtune plan run.yaml --card 24GiB, then cogtune train run.yaml" in made
    planned = run("plan", "run.yaml", "--card", "24GiB")
    assert "24.0 GiB card" in planned
    rows = int(re.search(r"data +(\d+) rows", planned)[1])
    assert abs(int(re.search(r"# (\d+) rows of", made)[1]) - rows) <= 3  # a hash decides which are held back
    run("train", "run.yaml", "--train.max_steps", "2", "--data.workers", "0")
    assert f"in {rows} rows" in (tmp_path / "output" / "run.log").read_text()
    asked = ("--image", "my-data/images/0001.jpg", "--query", "What?", "--max-new-tokens", "4")
    answer = run("chat", "--adapter", "output/adapter", *asked)
    run("predict", "--adapter", "output/adapter", "--data", "my-data", "--output", "a.jsonl", "--max-new-tokens", "2")
    assert len((tmp_path / "a.jsonl").read_text().splitlines()) >= 60
    run("merge", "--adapter", "output/adapter", "--output", "merged")
    assert isinstance(run("chat", "--model", "merged", *asked), str)
    assert answer


def test_nothing_connects_anywhere(tiny_checkpoint, tmp_path, everything_refused, capsys):
    data = write_folder(tmp_path / "data", {f"{i:04d}": dialogue("What is it?", "A cat.") for i in range(4)})
    output = tmp_path / "output"
    base = ["--model", str(tiny_checkpoint), "--data", str(data)]
    train = ["train", *base, "--output", str(output), "--data.workers", "0", "--train.max_steps", "1"]
    assert main(train) == 0
    answers = str(tmp_path / "answers.jsonl")
    adapter = ["--adapter", str(output / "adapter")]
    assert main(["predict", *base, *adapter, "--output", answers, "--max-new-tokens", "2"]) == 0
    merged = str(tmp_path / "merged")
    assert main(["merge", "--model", str(tiny_checkpoint), *adapter, "--output", merged]) == 0
    assert main(["data", "check", str(data), "--model", str(tiny_checkpoint)]) == 0
    assert main(["plan", *base, "--card", "24GiB"]) == 0
