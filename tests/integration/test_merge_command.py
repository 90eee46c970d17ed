"""`cogtune merge` as it is typed: what comes out answers as base and adapter do."""

from __future__ import annotations

import json
from pathlib import Path
from unittest.mock import ANY

import pytest
import torch

from cogtune.checkpoint.fingerprint import adapter_fingerprint
from cogtune.checkpoint.random import make_tiny
from cogtune.cli.main import main
from tests.support.adapters import write_adapter
from tests.support.data_folders import dialogue, write_folder, write_image


def test_the_merged_model_answers_as_the_adapter_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = make_tiny(tmp_path / "base", dtype=torch.float32)  # in bfloat16 a near tie could fall the other way
    run = tmp_path / "run"
    write_adapter(base, run / "adapter", size=0.1)
    picture = write_image(tmp_path / "picture.png")

    def ask(*model: object) -> str:
        flags = ["--image", picture, "--query", "what?", "--greedy", "--max-new-tokens", 12, "--device", "cpu"]
        capsys.readouterr()
        assert main([str(word) for word in ["chat", *model, *flags]]) == 0
        return capsys.readouterr().out

    # without --model: the base that the adapter names
    assert main(["merge", "--adapter", str(run), "--output", str(tmp_path / "merged")]) == 0
    assert "tensors merged" in capsys.readouterr().out
    answer = ask("--model", tmp_path / "merged")
    assert answer == ask("--model", base, "--adapter", run)
    assert answer != ask("--model", base)


def test_stored_answers_are_asked_again_directly_and_through_the_server(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = make_tiny(tmp_path / "base", dtype=torch.float32)  # in bfloat16 a near tie could fall the other way
    write_adapter(base, tmp_path / "run" / "adapter", size=0.1)
    data = write_folder(tmp_path / "data", {"a": [dialogue("a0?", "A0", "a1?", "A1"), dialogue("b0?", "B0")]})
    stored = tmp_path / "stored.jsonl"
    words = ["--model", base, "--adapter", tmp_path / "run", "--data", data, "--output", stored, "--max-new-tokens", 6]
    assert main(["predict", *map(str, words), "--device", "cpu"]) == 0

    def merged(name: str) -> tuple[int, str]:
        capsys.readouterr()
        words = ["merge", "--adapter", tmp_path / "run", "--output", tmp_path / name, "--check", stored]
        code = main([str(word) for word in words])
        return code, capsys.readouterr().out

    assert merged("same") == (0, ANY)
    code, said = merged("again")
    assert "2 of 2 stored answers are given again, directly and served" in said
    lines = stored.read_text(encoding="utf-8").splitlines()
    changed = json.loads(lines[0]) | {"answer": "something else"}
    stored.write_text("\n".join([json.dumps(changed), *lines[1:]]) + "\n", encoding="utf-8")
    code, said = merged("other")
    assert code == 1
    assert "1 of 2 stored answers are not given again" in said
    assert "merged: a0?" in said
    assert "served: a0?" in said
    assert (tmp_path / "other" / "config.json").is_file()
    stored.with_name("stored.jsonl.meta.json").unlink()
    assert merged("without settings")[0] != 0


def test_wrong_input_is_exit_2_and_nothing_is_written(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = write_adapter(tiny_checkpoint, tmp_path / "adapter", targets=["language_expert_dense"])
    other = make_tiny(tmp_path / "other", hidden_size=32, num_attention_heads=2, num_multi_query_heads=1)
    before = sorted(path.name for path in tmp_path.iterdir())
    for message, model, given, output in [
        ("error[adapter-base]", other, adapter, "merged"),
        ("error[adapter-missing]", tiny_checkpoint, other, "merged"),
        ("error[checkpoint-missing]", tmp_path / "no", adapter, "merged"),
        ("error[output]", tiny_checkpoint, adapter, "other"),
    ]:
        arguments = ["merge", "--model", model, "--adapter", given, "--output", tmp_path / output]
        assert main([str(word) for word in arguments]) == 2
        assert message in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_file_to_check_with_is_looked_at_before_the_merge(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = write_adapter(tiny_checkpoint, tmp_path / "adapter", targets=["language_expert_dense"])
    stored = tmp_path / "stored.jsonl"
    meta = stored.with_name("stored.jsonl.meta.json")
    words = ["--model", tiny_checkpoint, "--adapter", adapter, "--output", tmp_path / "merged", "--check", stored]
    own = adapter_fingerprint(adapter)
    for decides, said in (
        (None, "no such file"),
        ({"adapter": own}, "cannot be read"),
        ({"adapter": None, "max-new-tokens": 4}, f"those of out/checkpoint-9, not of the adapter in {adapter}"),
        ({"adapter": "none", "max-new-tokens": 4, "made_with": None}, "those of the base model"),
        (
            {"adapter": "none", "max-new-tokens": 4, "made_with": {"adapter": str(adapter)}},
            "before that adapter changed",
        ),
        ({"adapter": own, "max-new-tokens": 4, "choices": ["yes", "no"]}, "chosen among --choices"),
    ):
        if decides is not None:
            made = decides.pop("made_with", {"adapter": "out/checkpoint-9"})
            meta.write_text(json.dumps({"decides": decides, "made_with": made}), encoding="utf-8")
        assert main(["merge", *map(str, words)]) == 2
        told = capsys.readouterr().err
        assert said in told
        assert ("merge that one" in told) == ("checkpoint-9" in said)
        assert not (tmp_path / "merged").exists()
