"""Going on: bit by bit the same run, or a refusal that names what differs."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from cogtune.checkpoint import resume_state as checkpoints
from cogtune.errors import CheckpointError, OutputFolderError, Stopped
from cogtune.evaluate.run_folder import read_metrics
from cogtune.train.loop import Loop
from cogtune.train.run import train
from tests.support.training import make_config, write_data


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data") / "pictures", 8)


def adapter_bytes(output: Path) -> bytes:
    return (output / "adapter" / "adapter_model.safetensors").read_bytes()


def losses(output: Path) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in read_metrics(output) if line["kind"] == "train"]


def stop_after(monkeypatch: pytest.MonkeyPatch, step: int, number: int = signal.SIGTERM) -> None:
    """Send this process a signal during optimiser step number ``step`` (from 1)."""
    original = Loop._train

    def train_and_signal(self: Loop, batches: Any) -> Any:
        if self.progress.step + 1 == step:
            os.kill(os.getpid(), number)
        return original(self, batches)

    monkeypatch.setattr(Loop, "_train", train_and_signal)


@pytest.mark.usefixtures("terminal")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_a_signal_saves_and_the_same_command_ends_in_the_same_bytes(
    tiny_checkpoint: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, code: int
) -> None:
    """With dropout, and in the middle of an epoch, of an accumulation and of a window of the log."""
    values = {
        "train__accumulation": 2,
        "train__epochs": 3,
        "lora__dropout": 0.2,
        "log__steps": 3,
        "data__validation_share": 0.3,
    }
    train(make_config(tiny_checkpoint, data, tmp_path / "whole", **values))
    config = make_config(tiny_checkpoint, data, tmp_path / "stopped", **values)
    with monkeypatch.context() as patch:
        stop_after(patch, 4, number)
        with pytest.raises(Stopped, match="step 4") as caught:
            train(config)
    assert caught.value.exit_code == code
    assert checkpoints.find_latest(tmp_path / "stopped")[0] == tmp_path / "stopped" / "checkpoint-4"
    train(config)
    assert adapter_bytes(tmp_path / "stopped") == adapter_bytes(tmp_path / "whole")
    assert losses(tmp_path / "stopped") == losses(tmp_path / "whole")
    for name in ("optimizer.safetensors", "rng.safetensors"):
        assert (tmp_path / "stopped" / "last" / name).read_bytes() == (tmp_path / "whole" / "last" / name).read_bytes()


def test_a_finished_run_says_so_and_more_epochs_go_on(
    tiny_checkpoint: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    train(make_config(tiny_checkpoint, data, output))
    before = adapter_bytes(output)
    capsys.readouterr()
    train(make_config(tiny_checkpoint, data, output, log__steps=5, train__save_steps=7))
    assert "this run is finished" in capsys.readouterr().out
    assert adapter_bytes(output) == before
    result = train(make_config(tiny_checkpoint, data, output, train__epochs=2))
    said = capsys.readouterr().out
    assert "continuing the run" in said
    assert "schedule is recomputed" in said
    assert result.steps == 16
    assert adapter_bytes(output) != before
    with pytest.raises(OutputFolderError, match=r"train\.epochs"):
        train(make_config(tiny_checkpoint, data, output))


def test_another_run_in_the_folder_is_refused_by_its_keys(tiny_checkpoint: Path, data: Path, tmp_path: Path) -> None:
    from cogtune.checkpoint.random import make_tiny

    output = tmp_path / "out"
    train(make_config(tiny_checkpoint, data, output, train__max_steps=1))
    other_data = write_data(tmp_path / "other", 5)
    other_base = make_tiny(tmp_path / "base", seed=1)
    before = sorted(path.name for path in output.iterdir())
    for key, values in {
        "train.lr": {"train__lr": 2e-3},
        "lora.rank": {"lora__rank": 2},
        "train.seed": {"train__seed": 1},
        "data.max_input_len": {"data__max_input_len": 100},
        "global batch": {"train__batch_size": 2},
        "data.path": {"data__path": [str(other_data)]},
        "model.path": {"model__path": str(other_base)},
    }.items():
        with pytest.raises(OutputFolderError, match=key) as caught:
            train(make_config(tiny_checkpoint, data, output, **{"train__max_steps": 1, **values}))
        assert caught.value.exit_code == 2
        assert "--output" in (caught.value.hint or "")
    assert sorted(path.name for path in output.iterdir()) == before


def test_same_rows_in_other_micro_batches_are_the_same_run(tiny_checkpoint: Path, data: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    train(make_config(tiny_checkpoint, data, output, train__batch_size=4, train__max_steps=1))
    shape = {"train__batch_size": 2, "train__accumulation": 2}
    changed = make_config(tiny_checkpoint, data, output, train__max_steps=2, eval__batch_size=3, **shape)
    assert train(changed).steps == 2


def test_a_moved_base_and_data_set_are_the_same(tiny_checkpoint: Path, data: Path, tmp_path: Path) -> None:
    import shutil

    output = tmp_path / "out"
    train(make_config(tiny_checkpoint, data, output, train__max_steps=1))
    base = shutil.copytree(tiny_checkpoint, tmp_path / "moved")
    copy = shutil.copytree(data, tmp_path / "elsewhere" / data.name)
    assert train(make_config(base, copy, output, train__max_steps=2)).steps == 2


def test_a_foreign_folder_is_left_alone(tiny_checkpoint: Path, data: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("three years of work")
    with pytest.raises(OutputFolderError, match="not the output of a cogtune run"):
        train(make_config(tiny_checkpoint, data, tmp_path))
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputFolderError, match="not a folder"):
        train(make_config(tiny_checkpoint, data, tmp_path / "file"))


def test_restart_makes_a_numbered_sibling(tiny_checkpoint: Path, data: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    train(make_config(tiny_checkpoint, data, output, train__max_steps=1))
    for number in (2, 3):
        config = make_config(
            tiny_checkpoint, data, output, train__max_steps=1, train__restart=True, train__lr=1e-4 * number
        )
        assert train(config).output == tmp_path / f"out-{number}"
    assert len(losses(output)) == 1


def test_resume_starts_a_new_folder_from_a_checkpoint(
    tiny_checkpoint: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    train(make_config(tiny_checkpoint, data, first, train__save_steps=4))
    before = adapter_bytes(first)
    same = make_config(tiny_checkpoint, data, second, train__resume=str(first / "checkpoint-4"))
    train(same)
    assert adapter_bytes(second) == before  # from the middle to the same end
    assert [step for step, _ in losses(second)] == [5, 6, 7, 8]
    capsys.readouterr()
    train(same)
    assert "finished" in capsys.readouterr().out
    values = {"train__resume": str(first), "train__lr": 1e-5, "train__epochs": 2}
    slower = make_config(tiny_checkpoint, data, tmp_path / "third", **values)
    assert train(slower).steps == 16  # an output folder stands for its last checkpoint
    assert "changed: train.lr" in capsys.readouterr().out
    with pytest.raises(OutputFolderError, match="holds a run already"):
        train(make_config(tiny_checkpoint, data, first, train__resume=str(first / "checkpoint-4")))
    with pytest.raises(OutputFolderError, match=r"lora\.rank"):
        train(make_config(tiny_checkpoint, data, tmp_path / "fourth", train__resume=str(first), lora__rank=2))
    with pytest.raises(OutputFolderError, match="is at step 8 already"):
        train(make_config(tiny_checkpoint, data, tmp_path / "fourth", train__resume=str(first)))
    assert not (tmp_path / "fourth").exists()


def rewrite_state(checkpoint: Path, *path: str, value: Any) -> None:
    """Set one value of ``state.json``, and have the manifest agree."""
    state = json.loads((checkpoint / "state.json").read_text())
    inner = state
    for name in path[:-1]:
        inner = inner[name]
    inner[path[-1]] = value
    content = json.dumps(state if path != ("",) else value).encode()
    (checkpoint / "state.json").write_bytes(content)
    manifest = json.loads((checkpoint / "MANIFEST.json").read_text())
    manifest["files"]["state.json"] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (checkpoint / "MANIFEST.json").write_text(json.dumps(manifest))


def test_resume_takes_links_and_renamed_folders_and_refuses_what_no_run_writes(
    tiny_checkpoint: Path, data: Path, tmp_path: Path
) -> None:
    first = tmp_path / "first"
    train(make_config(tiny_checkpoint, data, first, train__save_steps=1, train__max_steps=2))
    shutil.copytree(first / "checkpoint-1", tmp_path / "renamed")
    (tmp_path / "link").symlink_to(tmp_path / "renamed")

    def resumed(path: Path, output: str, **values: Any) -> int:
        keys = {"train__resume": str(path), "train__max_steps": 3}
        return train(make_config(tiny_checkpoint, data, tmp_path / output, **keys), **values).steps

    assert resumed(first / "last", "from-last") == 3
    assert [step for step, _ in losses(tmp_path / "from-last")] == [3]
    assert resumed(tmp_path / "link", "from-link") == 3
    assert [step for step, _ in losses(tmp_path / "from-link")] == [2, 3]
    with pytest.raises(CheckpointError, match="MANIFEST") as caught:
        resumed(first / "adapter", "no")
    assert f"--adapter {first / 'adapter'}" in str(caught.value.hint)
    wrong: list[tuple[Any, ...]] = [
        ("progress", "step", "7"),
        ("progress", "rows_taken", -1),
        ("progress", None),
        ("run", {}),
        ("run", "identity", "keys", []),
        ("run", "batch_size", 2.5),
        ("", [1]),
    ]
    for *path, value in wrong:
        shutil.copytree(first / "checkpoint-1", tmp_path / "wrong")
        rewrite_state(tmp_path / "wrong", *path, value=value)
        with pytest.raises(CheckpointError, match=r"state\.json"):
            resumed(tmp_path / "wrong", "no", dry_run=True)
        shutil.rmtree(tmp_path / "wrong")
    assert not (tmp_path / "no").exists()


def test_a_corrupt_checkpoint_is_skipped_with_a_warning(
    tiny_checkpoint: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train(make_config(tiny_checkpoint, data, whole))
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 7)
        with pytest.raises(Stopped):
            train(make_config(tiny_checkpoint, data, broken, train__save_steps=3))
    content = bytearray((broken / "checkpoint-7" / "optimizer.safetensors").read_bytes())
    content[-1] ^= 1
    (broken / "checkpoint-7" / "optimizer.safetensors").write_bytes(content)
    (broken / "checkpoint-6" / "MANIFEST.json").unlink()
    capsys.readouterr()
    train(make_config(tiny_checkpoint, data, broken, train__save_steps=3))
    said = capsys.readouterr().out
    assert "warning: 2 unusable checkpoints skipped" in said
    assert "sha256" in said
    assert "checkpoint-3" in said
    assert adapter_bytes(broken) == adapter_bytes(whole)
    assert losses(broken) == losses(whole)
