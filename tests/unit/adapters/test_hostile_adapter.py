"""An adapter of NaN answers nothing: every command that takes one says so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from cogtune.cli.main import main
from tests.support.adapters import write_adapter


@pytest.mark.parametrize("value", ["nan", "inf"])
@pytest.mark.parametrize("command", ["chat", "predict", "train", "merge"])
def test_values_that_are_not_finite_are_refused(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str, value: str
) -> None:
    adapter = write_adapter(tiny_checkpoint, tmp_path / "a")
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    name = sorted(tensors)[1]
    tensors[name][0, 0] = float(value)
    save_file(tensors, file, metadata={"format": "pt"})
    data = tmp_path / "d.jsonl"
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    data.write_text("\n".join(json.dumps({"image": None, "conversations": turns}) for _ in range(4)))
    flags = {
        "chat": ("--adapter", adapter, "--query", "hello"),
        "predict": ("--adapter", adapter, "--data", data, "--output", tmp_path / "p.jsonl"),
        "train": ("--lora.start_from", adapter, "--data", data, "--output", tmp_path / "o", "--data.workers", "0"),
        "merge": ("--adapter", adapter, "--output", tmp_path / "m"),
    }[command]
    assert main([command, "--model", str(tiny_checkpoint), *map(str, flags)]) == 2
    assert "error[adapter-non-finite]" in capsys.readouterr().err
