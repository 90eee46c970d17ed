"""SIGKILL at any moment, also inside a save: the same command again ends in the same bytes."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cogtune.configuration.load import load_config
from cogtune.train.run import train
from tests.support.training import write_data

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data") / "pictures", 8)


@pytest.mark.slow
def test_killed_between_any_two_writes(tiny_checkpoint: Path, data: Path, tmp_path: Path) -> None:
    """Every 17th of the points before and after each write, flush, rename, link, deletion and optimiser step."""
    command = [sys.executable, "-m", "tests.support.killed_runs", tiny_checkpoint, data, tmp_path, "17"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-2000:]
    points = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(points) >= 8
    assert all(point["ended"] == -signal.SIGKILL for point in points)
    assert any(point["partial"] for point in points), "no point fell inside a save"
    assert [point for point in points if not point["same"]] == []


def test_the_command_line_killed_and_repeated(
    tiny_checkpoint: Path, data: Path, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    values = {"train.max_steps": "20", "train.save_steps": "1", "data.validation_share": "0"}
    flags = [word for key, value in values.items() for word in (f"--{key}", value)]
    paths = ["--model", str(tiny_checkpoint), "--data", str(data), "--output", str(tmp_path / "killed")]
    command = [sys.executable, "-m", "cogtune", "train", *paths, *flags]
    run = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while len(list((tmp_path / "killed").glob("checkpoint-*"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    run.kill()
    assert run.wait() == -signal.SIGKILL
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert again.returncode == 0, again.stderr[-2000:]
    assert "continuing the run" in again.stdout
    whole = {"model.path": str(tiny_checkpoint), "data.path": str(data), "train.output": str(tmp_path / "whole")}
    train(load_config(None, whole | values))
    name = Path("adapter") / "adapter_model.safetensors"
    assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    record_property("run killed and repeated, its adapter", "bit-identical")
