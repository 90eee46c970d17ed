"""The Python page as a reader types it: every block runs, in order, on the tiny model."""

from __future__ import annotations

import importlib.util
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from cogtune.demo.base import BASE
from tests.docs.pages import ROOT, blocks
from tests.support.data_folders import write_image
from tests.support.training import write_data

PAGE = ROOT / "docs" / "guides" / "python.md"


def test_every_block_of_the_python_page_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A block that is marked ``needs=PACKAGE`` is left out where the package is not installed."""
    shutil.copytree(BASE, tmp_path / "cogvlm2")
    write_data(tmp_path / "my-data", 4)
    write_image(tmp_path / "photo.jpg")
    (tmp_path / "run.yaml").write_text("train: {lr: 1e-4}\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    names: dict[str, Any] = {}
    ran = 0
    for block in blocks(PAGE.read_text(encoding="utf-8")):
        needed = block.info.removeprefix("needs=")
        if block.language != "python" or (needed and importlib.util.find_spec(needed) is None):
            continue
        source = "\n" * (block.line - 1) + block.body  # so that a traceback names the page's line
        exec(compile(source, str(PAGE), "exec"), names)
        ran += 1
    assert ran >= 16
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert "config-unknown-key unknown key `train.learning_rate` did you mean `train.lr`?" in capsys.readouterr().out
    result = names["result"]
    assert result.adapter == Path("output/adapter")
    assert result.loss > 0
    assert (tmp_path / "own-adapter" / "adapter_config.json").is_file()
    assert (tmp_path / "trainer" / "adapter" / "adapter_config.json").is_file()
    assert (tmp_path / "merged" / "config.json").is_file()
    assert "auto_map" not in (tmp_path / "for-transformers" / "config.json").read_text()
    assert names["prompt"].startswith("<|begin_of_text|>")
