"""`cogtune predict` as it is typed: a file of records that continues, and refuses to become a mixture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cogtune.cli.main import main
from tests.support.adapters import write_adapter
from tests.support.data_folders import dialogue, write_folder, write_label


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_folder(
        tmp_path / "data",
        {"a": [dialogue("a0?", "A0", "a1?", "A1"), dialogue("b0?", "B0")], "c": dialogue("c0?", "C0", "c1?", "C1")},
    )


def predict(base: Path, data: Path, output: Path, *more: object) -> int:
    chosen = ["--model", base, "--data", data, "--output", output, "--max-new-tokens", 6, "--device", "cpu", *more]
    return main(["predict", *map(str, chosen)])


def records(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]


def test_batches_of_any_size_give_the_same_file_and_an_interrupted_one_is_continued(
    tiny_checkpoint: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert predict(tiny_checkpoint, data, tmp_path / "one.jsonl", "--batch-size", 1) == 0
    assert predict(tiny_checkpoint, data, tmp_path / "all.jsonl", "--batch-size", 8) == 0
    whole = (tmp_path / "all.jsonl").read_bytes()
    assert (tmp_path / "one.jsonl").read_bytes() == whole
    assert [line["reference"] for line in records(tmp_path / "all.jsonl")] == ["A0", "A1", "B0", "C0", "C1"]
    assert set(records(tmp_path / "all.jsonl")[0]) == {"id", "image", "turn", "question", "answer", "reference"}
    (tmp_path / "all.jsonl").write_bytes(whole[: len(whole) // 2])
    capsys.readouterr()
    assert predict(tiny_checkpoint, data, tmp_path / "all.jsonl", "--batch-size", 2) == 0
    assert (tmp_path / "all.jsonl").read_bytes() == whole
    assert "continuing after 2 answers" in capsys.readouterr().out
    assert predict(tiny_checkpoint, data, tmp_path / "all.jsonl") == 0
    assert "complete, 5 answers; nothing to do" in capsys.readouterr().out


def test_another_adapter_setting_or_data_is_refused_by_name(
    tiny_checkpoint: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "answers.jsonl"
    adapter = write_adapter(tiny_checkpoint, tmp_path / "adapter", size=0.3)
    assert predict(tiny_checkpoint, data, output, "--adapter", adapter) == 0
    before = output.read_bytes()
    for more, named in [
        ([], "adapter: "),
        (["--adapter", adapter, "--own-history"], "own-history: false there, true now"),
        (["--adapter", adapter, "--temperature", "0.5"], "sample: false there, true now"),
        (["--adapter", adapter, "--model.template", "vqa"], "model.template: null there, vqa now"),
    ]:
        capsys.readouterr()
        assert predict(tiny_checkpoint, data, output, *more) == 2
        assert named in capsys.readouterr().err
    write_label(data / "labels" / "c.json", dialogue("c0?", "C0"))
    assert predict(tiny_checkpoint, data, output, "--adapter", adapter) == 2
    assert "data: " in capsys.readouterr().err
    assert output.read_bytes() == before
    own = tmp_path / "own.jsonl"
    assert predict(tiny_checkpoint, data, own, "--adapter", adapter, "--own-history", "--temperature", "0.5") == 0
    assert len(records(own)) == 4


def test_bad_data_is_exit_2_or_skipped(
    tiny_checkpoint: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (data / "labels" / "c.json").write_text("{")
    output = tmp_path / "answers.jsonl"
    assert predict(tiny_checkpoint, data, output) == 2
    assert "c.json" in capsys.readouterr().err
    assert not output.exists()
    assert predict(tiny_checkpoint, data, output, "--data.on_bad", "skip", "--data.max_bad_share", "0.5") == 0
    assert [line["question"] for line in records(output)] == ["a0?", "a1?", "b0?"]
    assert "left out" in capsys.readouterr().out
    assert predict(tiny_checkpoint, tmp_path / "no", output) == 2
    assert predict(tiny_checkpoint, data, output, "--data.on_bad", "perhaps") == 2
    assert "data.on_bad" in capsys.readouterr().err


def test_a_trainings_file_and_keys_say_what_flags_say(
    tiny_checkpoint: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Keys that only training has are ignored; typed here, they are refused."""
    assert predict(tiny_checkpoint, data, tmp_path / "flags.jsonl", "--model.template", "vqa") == 0
    file = tmp_path / "run.yaml"
    file.write_text(
        f"model: {{path: {tiny_checkpoint}, template: vqa}}\ndata: {{path: {data}, turns: one_random}}\n"
        "lora: {rank: 2}\ntrain: {output: nowhere}\ngenerate: {max_new_tokens: 6, device: cpu, batch_size: 2}\n"
    )
    assert main(["predict", str(file), "--output", str(tmp_path / "file.jsonl")]) == 0
    assert (tmp_path / "file.jsonl").read_bytes() == (tmp_path / "flags.jsonl").read_bytes()
    assert main(["predict", str(file), "--output", str(tmp_path / "file.jsonl"), "--temperature", "0.5"]) == 2
    assert "sample: false there, true now" in capsys.readouterr().err
    assert main(["predict", str(file), "--output", str(tmp_path / "x.jsonl"), "--data.turns", "all"]) == 2
    assert "it belongs to another command: `cogtune train --help`" in capsys.readouterr().err
