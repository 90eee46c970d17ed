"""A run that fails says why and keeps the last good state: the same command again ends as if nothing had happened."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest
import torch

from cogtune.checkpoint import resume_state as checkpoints
from cogtune.errors import DiskFullError, NonFiniteError, OutOfMemoryError
from cogtune.system import files
from cogtune.train import batches, loop
from cogtune.train.engines.single import SingleEngine
from cogtune.train.run import train
from tests.support.training import make_config, write_data


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data") / "pictures", 8)


@pytest.fixture(scope="module")
def whole(tiny_checkpoint: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The adapter of a run to which nothing happened."""
    output = tmp_path_factory.mktemp("whole") / "out"
    train(make_config(tiny_checkpoint, data, output, train__save_steps=3))
    return adapter_bytes(output)


def adapter_bytes(output: Path) -> bytes:
    return (output / "adapter" / "adapter_model.safetensors").read_bytes()


def rerun_ends_well(tiny_checkpoint: Path, data: Path, output: Path, whole: bytes) -> None:
    found, skipped = checkpoints.find_latest(output)
    assert found == output / "checkpoint-3"
    assert not skipped
    train(make_config(tiny_checkpoint, data, output, train__save_steps=3))
    assert adapter_bytes(output) == whole


def test_a_loss_that_is_not_finite_stops_before_weights_are_touched(
    tiny_checkpoint: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: bytes
) -> None:
    original, weights, poisoned = batches.to_device, [], []

    def poison(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
        arguments = original(batch, device)
        if len(weights) == 4:
            poisoned.extend(batch["record_ids"])
            arguments["pixel_values"] = torch.full_like(arguments["pixel_values"], float("nan"))
        return arguments

    step = SingleEngine.step

    def count(self: SingleEngine) -> Any:
        result = step(self)
        weights.append([parameter.detach().clone() for parameter in self.parameters.values()])
        count.engine = self  # type: ignore[attr-defined]
        return result

    config = make_config(tiny_checkpoint, data, tmp_path / "out", train__save_steps=3, train__epochs=1)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "to_device", poison)
        patch.setattr(SingleEngine, "step", count)
        with pytest.raises(NonFiniteError) as caught:
            train(config)
    assert caught.value.exit_code == 1
    assert f"record {poisoned[0]};" in caught.value.message
    now = count.engine.parameters.values()  # type: ignore[attr-defined]
    assert all(torch.equal(value, before) for value, before in zip(now, weights[-1], strict=True))
    rerun_ends_well(tiny_checkpoint, data, tmp_path / "out", whole)


def test_a_gradient_that_is_not_finite_stops_too(
    tiny_checkpoint: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoil(self: SingleEngine, scaled: torch.Tensor) -> None:
        scaled.backward()  # type: ignore[no-untyped-call]
        next(iter(self.parameters.values())).grad.fill_(float("inf"))  # type: ignore[union-attr]

    monkeypatch.setattr(SingleEngine, "backward", spoil)
    with pytest.raises(NonFiniteError, match="gradient's norm is inf although the loss is finite; the step had record"):
        train(make_config(tiny_checkpoint, data, tmp_path / "out"))


def test_a_full_disk_while_saving(
    tiny_checkpoint: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: bytes
) -> None:
    output, write = tmp_path / "out", files.write_file

    def fill(path: Path, content: bytes) -> None:
        if "checkpoint-6" in path.parent.name:
            path.write_bytes(content[: len(content) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(files, "write_file", fill)
        with pytest.raises(DiskFullError, match="checkpoint-6") as caught:
            train(make_config(tiny_checkpoint, data, output, train__save_steps=3))
    assert caught.value.exit_code == 1
    assert not list(output.glob(".*"))
    assert "disk-full" in (output / "run.log").read_text()
    rerun_ends_well(tiny_checkpoint, data, output, whole)


def test_running_out_of_memory(
    tiny_checkpoint: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: bytes
) -> None:
    output, backward = tmp_path / "out", SingleEngine.backward
    calls: list[int] = []

    def exhaust(self: SingleEngine, scaled: torch.Tensor) -> None:
        calls.append(1)
        if len(calls) == 5:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")
        backward(self, scaled)

    with monkeypatch.context() as patch:
        patch.setattr(SingleEngine, "backward", exhaust)
        with pytest.raises(OutOfMemoryError, match="while training") as caught:
            train(make_config(tiny_checkpoint, data, output, train__save_steps=3))
    assert "gradient_checkpointing" in (caught.value.hint or "")
    rerun_ends_well(tiny_checkpoint, data, output, whole)


def test_out_of_memory_while_loading(
    tiny_checkpoint: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def exhaust(*args: Any, **options: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("cogtune.train.model_setup.load_model", exhaust)
    with pytest.raises(OutOfMemoryError, match="while loading the model"):
        train(make_config(tiny_checkpoint, data, tmp_path / "out"))


def test_float16_that_never_fits_ends_with_advice(
    tiny_checkpoint: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "_MOST_SKIPPED_IN_A_ROW", 3)
    backward = SingleEngine.backward

    def overflow(self: SingleEngine, scaled: torch.Tensor) -> None:
        backward(self, scaled)
        next(iter(self.parameters.values())).grad.fill_(float("inf"))  # type: ignore[union-attr]

    monkeypatch.setattr(SingleEngine, "backward", overflow)
    with pytest.raises(NonFiniteError, match="4 steps in a row") as caught:
        train(make_config(tiny_checkpoint, data, tmp_path / "out", model__dtype="float16"))
    assert "bfloat16" in (caught.value.hint or "")
