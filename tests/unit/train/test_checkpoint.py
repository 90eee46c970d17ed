"""A training checkpoint is whole or absent, and nothing unverified is ever loaded."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from cogtune.checkpoint import resume_state as checkpoints
from cogtune.checkpoint.resume_state import TrainingState
from cogtune.errors import CheckpointError, DiskFullError
from cogtune.system import files
from cogtune.system.file_errors import is_disk_full


def state(value: float = 1.0) -> TrainingState:
    rng = [{"cpu": torch.arange(5, dtype=torch.uint8)}, {"cpu": torch.arange(5, 10, dtype=torch.uint8)}]
    return TrainingState({"master/w": torch.full((2, 3), value), "exp_avg/w": torch.zeros(2, 3)}, {"step": 7}, rng)


def save(output: Path, step: int, value: float = 1.0) -> Path:
    return checkpoints.save(output, step, state(value), lambda folder: (folder / "adapter.txt").write_text("adapter"))


def manifest(folder: Path, *, files: object = None, entries: dict[str, object] | None = None) -> None:
    """Change what the manifest says."""
    values = json.loads((folder / "MANIFEST.json").read_text())
    values["files"] = files if entries is None else values["files"] | entries
    (folder / "MANIFEST.json").write_text(json.dumps(values))


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    folder = save(tmp_path, 7)
    loaded = checkpoints.load(folder)
    assert loaded.counters == {"step": 7}
    assert torch.equal(loaded.tensors["master/w"], torch.ones(2, 3))
    assert [rank["cpu"].tolist() for rank in loaded.rng] == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]
    assert (tmp_path / "last").resolve() == folder.resolve()
    assert (folder / "adapter.txt").read_text() == "adapter"


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda f: (f / "MANIFEST.json").unlink(), "MANIFEST.json is missing"),
        (lambda f: (f / "MANIFEST.json").write_text("{"), "cannot be read"),
        (lambda f: (f / "state.json").unlink(), "state.json is missing"),
        (lambda f: os.truncate(f / "optimizer.safetensors", 50), "has 50 bytes"),
        (lambda f: (f / "adapter.txt").write_text("Adapter"), "sha256"),
        (lambda f: (f / "MANIFEST.json").write_text(json.dumps({"format": 99, "files": {}})), "format 99"),
        (lambda f: manifest(f, files=[1]), "cannot be read"),
        (lambda f: manifest(f, files={"optimizer.safetensors": 7}), "does not list"),
        (lambda f: manifest(f, entries={"state.json": 7}), "cannot be read"),
        (lambda f: manifest(f, entries={"../../secret": {"bytes": 1, "sha256": "0"}}), "has a folder in it"),
        (lambda f: manifest(f, entries={"/etc/passwd": {"bytes": 1, "sha256": "0"}}), "absolute"),
        (lambda f: manifest(f, entries={"a\nb": {"bytes": 1, "sha256": "0"}}), "no file name should have"),
    ],
)
def test_a_damaged_checkpoint_is_skipped_for_the_one_before(tmp_path: Path, damage: object, says: str) -> None:
    older, newer = save(tmp_path, 5), save(tmp_path, 10)
    damage(newer)  # type: ignore[operator]
    found, skipped = checkpoints.find_latest(tmp_path)
    assert found == older
    assert len(skipped) == 1
    assert says in skipped[0]
    with pytest.raises(CheckpointError, match="checkpoint-10"):
        checkpoints.load(newer)


def test_no_checkpoint_at_all(tmp_path: Path) -> None:
    assert checkpoints.find_latest(tmp_path) == (None, [])
    assert checkpoints.find_problem(tmp_path / "checkpoint-3") == "no such folder"


@pytest.mark.parametrize("where", ["write_file", "write_adapter", "sync"])
def test_a_full_disk_leaves_earlier_checkpoints_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    older = save(tmp_path, 5)

    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    if where != "write_adapter":
        monkeypatch.setattr(files, where, full)
    with pytest.raises(DiskFullError, match="no space left") as caught:
        checkpoints.save(tmp_path, 10, state(), full if where == "write_adapter" else lambda folder: None)
    assert caught.value.exit_code == 1
    assert checkpoints.find_latest(tmp_path) == (older, [])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-5", "last"]


def test_safetensors_own_words_for_a_full_disk_are_understood() -> None:
    from safetensors import SafetensorError

    error = SafetensorError("I/O error: No space left on device (os error 28)")
    assert is_disk_full(error)
    assert not is_disk_full(ValueError("anything else"))


def test_rotation_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4, 9):
        save(tmp_path, step)
    checkpoints.rotate(tmp_path, 4, keep=2, protect=tmp_path / "checkpoint-1")
    names = sorted(path.name for path in checkpoints.list_checkpoints(tmp_path))
    assert names == ["checkpoint-1", "checkpoint-3", "checkpoint-4", "checkpoint-9"]


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    save(tmp_path, 5, 1.0)
    folder = save(tmp_path, 5, 2.0)
    assert torch.equal(checkpoints.load(folder).tensors["master/w"], torch.full((2, 3), 2.0))
    assert checkpoints.remove_leftovers(tmp_path) == 0


def test_leftovers_of_a_killed_save_are_removed(tmp_path: Path) -> None:
    folder = save(tmp_path, 5)
    (tmp_path / ".checkpoint-6.partial").mkdir()
    (tmp_path / ".last.partial").symlink_to("checkpoint-6")
    assert checkpoints.remove_leftovers(tmp_path) == 2
    assert checkpoints.find_latest(tmp_path) == (folder, [])


@pytest.mark.parametrize(
    "names", [["999999999/cpu"], ["0/cpu", "2/cpu"], ["-1/cpu"], ["0/cpu/x"], ["x/cpu"], ["0/tpu"], ["٣/cpu"], ["cpu"]]
)
def test_forged_random_numbers_are_refused(tmp_path: Path, names: list[str]) -> None:
    """A rank of 999,999,999 took 7 GB."""
    folder = save(tmp_path, 5)
    save_file({name: torch.zeros(1, dtype=torch.uint8) for name in names}, folder / "rng.safetensors")
    manifest(folder, entries={"rng.safetensors": checkpoints._digest(folder / "rng.safetensors")})
    with pytest.raises(CheckpointError, match="not the random numbers of a run"):
        checkpoints.load(folder)


@pytest.mark.parametrize(
    "name", ["checkpoint-007", "checkpoint-٣", "checkpoint-", "checkpoint-" + "9" * 30, "checkpoint-1a"]
)
def test_only_plain_numbers_name_checkpoints(tmp_path: Path, name: str) -> None:
    save(tmp_path, 5).rename(tmp_path / name)
    assert checkpoints.list_checkpoints(tmp_path) == []
    checkpoints.rotate(tmp_path, 10**40, keep=1, protect=None)
    assert (tmp_path / name).is_dir()


def test_a_link_under_a_checkpoints_name_is_not_removed(tmp_path: Path) -> None:
    """Somebody keeps one on another disk."""
    elsewhere = save(tmp_path / "a", 1).rename(tmp_path / "elsewhere")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "checkpoint-1").symlink_to(elsewhere)
    save(tmp_path / "out", 2)
    checkpoints.rotate(tmp_path / "out", 2, keep=1, protect=None)
    assert checkpoints.find_problem(tmp_path / "out" / "checkpoint-1") is None
