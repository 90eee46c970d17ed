"""Steps whose gradient the host looks at only during the next one: nothing but the time of looking may differ.

The optimiser is the one that makes this possible on a GPU, AdamW as one kernel; here it runs on the CPU.
"""

from __future__ import annotations

import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from cogtune.checkpoint import resume_state as checkpoints
from cogtune.errors import NonFiniteError, OutOfMemoryError, Stopped
from cogtune.evaluate.run_folder import read_metrics
from cogtune.train import batches, loop
from cogtune.train.engines import single
from cogtune.train.engines.single import SingleEngine
from cogtune.train.log import Metrics
from cogtune.train.loop import Loop
from cogtune.train.run import train
from tests.support.training import make_config, one_kernel, write_data

SPEEDS = ("samples_per_second", "tokens_per_second", "memory_gib", "host_gib", "loader_wait")
SAVED = ("adapter_model.safetensors", "optimizer.safetensors", "rng.safetensors")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data") / "pictures", 8)


@pytest.fixture(autouse=True)
def _fused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cogtune.train.model_setup.build_optimizer", one_kernel)


@pytest.fixture(scope="module")
def whole(tiny_checkpoint: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run to which nothing happened, and in which the host looked at every norm at once."""
    output = tmp_path_factory.mktemp("whole") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cogtune.train.model_setup.build_optimizer", one_kernel)
        patch.setattr(single, "skips_on_device", lambda optimizer: False)
        train(config(tiny_checkpoint, data, output))
    return output


def config(base: Path, data: Path, output: Path, **values: Any) -> Any:
    """Eight steps of a row, a checkpoint behind every third, dropout so that random numbers count too."""
    return make_config(base, data, output, **{"train__save_steps": 3, "lora__dropout": 0.2, **values})


def lines(output: Path) -> list[dict[str, Any]]:
    """The record without what differs from run to run."""
    found = [line for line in read_metrics(output) if line["kind"] not in ("start", "checkpoint")]
    return [{key: value for key, value in line.items() if key not in SPEEDS} for line in found]


def steps(output: Path) -> list[int]:
    return [line["step"] for line in read_metrics(output) if line["kind"] == "train"]


class Spoilt:
    """Makes gradients NaN behind the backward passes of some steps, and keeps what the engine had after every step."""

    def __init__(self, patch: pytest.MonkeyPatch, *numbers: int) -> None:
        self.passes, self.numbers, self.records = 0, numbers, list[list[str]]()
        self.weights: list[list[torch.Tensor]] = []
        self.counts: list[int] = []
        backward, step, to_device = SingleEngine.backward, SingleEngine.step, batches.to_device

        def spoil(engine: SingleEngine, scaled: torch.Tensor) -> None:
            backward(engine, scaled)
            self.passes += 1
            if self.passes in self.numbers:
                next(iter(engine.parameters.values())).grad.fill_(math.nan)  # type: ignore[union-attr]

        def keep(engine: SingleEngine) -> Any:
            result = step(engine)
            self.weights.append([value.detach().clone() for value in engine.parameters.values()])
            self.counts.append(engine.counters()["optimizer_steps"])
            return result

        def note(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
            self.records.append(batch["record_ids"])
            return to_device(batch, device)

        patch.setattr(SingleEngine, "backward", spoil)
        patch.setattr(SingleEngine, "step", keep)
        patch.setattr(loop, "to_device", note)

    def unchanged_by(self, number: int) -> bool:
        """Whether step ``number`` left weights and count as the step before it did."""
        now, before = self.weights[number - 1], self.weights[number - 2]
        same = all(torch.equal(value, other) for value, other in zip(now, before, strict=True))
        return same and self.counts[number - 1] == self.counts[number - 2] == number - 1


def test_an_ordinary_run_is_the_one_that_looks_at_once(
    tiny_checkpoint: Path, data: Path, tmp_path: Path, whole: Path
) -> None:
    """Every line in its order with its own norm, weights, moments and random numbers, to the bit."""
    train(config(tiny_checkpoint, data, tmp_path / "out"))
    assert lines(tmp_path / "out") == lines(whole)
    assert len({line["grad_norm"] for line in lines(whole) if line["kind"] == "train"}) == 8
    for checkpoint in ("checkpoint-6", "checkpoint-8"):
        for name in SAVED:
            found, wanted = (folder / checkpoint / name for folder in (tmp_path / "out", whole))
            assert found.read_bytes() == wanted.read_bytes(), (checkpoint, name)


def test_the_host_looks_when_the_device_has_the_next_steps_work(
    tiny_checkpoint: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or before a checkpoint (3), a validation (4) and the end (5)."""
    seen: list[str] = []

    def watch(owner: Any, name: str, word: str) -> None:
        original = getattr(owner, name)

        def watched(*args: Any, **options: Any) -> Any:
            if word != "line" or args[1] in ("train", "validation"):
                seen.append(word)
            return original(*args, **options)

        monkeypatch.setattr(owner, name, watched)

    watch(SingleEngine, "backward", "backward")
    watch(SingleEngine, "step", "step")
    watch(Metrics, "write", "line")
    watch(SingleEngine, "state", "save")
    more = {"train__max_steps": 5, "eval__steps": 4, "data__validation_share": 0.3, "eval__generate": 0}
    train(config(tiny_checkpoint, data, tmp_path / "out", **more))
    wanted = "backward step, backward line step, backward line step line save, backward step line line save, "
    wanted += "backward step line line save"  # the second of two lines together is validation's
    assert " ".join(seen) == wanted.replace(",", "")


@pytest.mark.parametrize("number", [4, 5])
def test_a_bad_gradient_is_found_in_the_next_step_and_said_of_its_own(
    tiny_checkpoint: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: Path, number: int
) -> None:
    output = tmp_path / "out"
    with monkeypatch.context() as patch:
        spoilt = Spoilt(patch, number)
        with pytest.raises(NonFiniteError) as caught:
            train(config(tiny_checkpoint, data, output))
    assert spoilt.passes == number + 1  # the device had the next step's work by then, but never its update
    assert len(spoilt.weights) == number
    (record,) = spoilt.records[number - 1]
    wanted = f"step {number}: the gradient's norm is nan although the loss is finite; the step had record {record}; "
    assert wanted in caught.value.message
    assert spoilt.unchanged_by(number)
    assert steps(output) == list(range(1, number))
    found, skipped = checkpoints.find_latest(output)
    assert (found, skipped) == (output / "checkpoint-3", [])
    train(config(tiny_checkpoint, data, output))
    assert lines(output) == lines(whole)
    assert all((output / "last" / name).read_bytes() == (whole / "last" / name).read_bytes() for name in SAVED)


@pytest.mark.parametrize(
    ("number", "latest", "more"),
    [
        (8, 6, {}),  # the last
        (6, 3, {}),  # a checkpoint is due
        (4, 3, {"eval__steps": 4, "data__validation_share": 0.3}),  # a validation is due
    ],
)
def test_nothing_is_saved_or_validated_behind_a_bad_gradient(
    tiny_checkpoint: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    latest: int,
    more: dict[str, Any],
) -> None:
    output = tmp_path / "out"
    spoilt = Spoilt(monkeypatch, number)
    monkeypatch.setattr(loop, "validate", lambda *_: pytest.fail("validated behind a bad gradient"))
    with pytest.raises(NonFiniteError, match=f"^step {number}: the gradient's norm is nan"):
        train(config(tiny_checkpoint, data, output, train__max_steps=8, **more))
    assert spoilt.passes == number  # found before anything else was begun
    assert spoilt.unchanged_by(number)
    assert checkpoints.find_latest(output)[0] == output / f"checkpoint-{latest}"
    assert steps(output) == list(range(1, number))
    assert not (output / "adapter").exists()


@pytest.mark.parametrize("bad", [False, True])
def test_a_signal_saves_no_step_that_nobody_has_looked_at(
    tiny_checkpoint: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: Path, bad: bool
) -> None:
    output, original = tmp_path / "out", Loop._train

    def train_and_signal(self: Loop, batches: Any) -> Any:
        if self.progress.step + 1 == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, batches)

    with monkeypatch.context() as patch:
        patch.setattr(Loop, "_train", train_and_signal)
        Spoilt(patch, *([5] if bad else []))
        with pytest.raises(NonFiniteError if bad else Stopped, match="step 5"):
            train(config(tiny_checkpoint, data, output))
    assert checkpoints.find_latest(output)[0] == output / ("checkpoint-3" if bad else "checkpoint-5")
    assert steps(output) == ([1, 2, 3, 4] if bad else [1, 2, 3, 4, 5])
    train(config(tiny_checkpoint, data, output))
    assert lines(output) == lines(whole)
    assert (output / "last" / SAVED[1]).read_bytes() == (whole / "last" / SAVED[1]).read_bytes()


@pytest.mark.parametrize("bad", [False, True])
def test_an_error_of_the_next_step_leaves_the_books_of_the_one_before_complete(
    tiny_checkpoint: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bad: bool
) -> None:
    output = tmp_path / "out"
    Spoilt(monkeypatch, *([4] if bad else []))
    backward, calls = SingleEngine.backward, list[int]()

    def exhaust(self: SingleEngine, scaled: torch.Tensor) -> None:
        calls.append(1)
        if len(calls) == 5:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")
        backward(self, scaled)

    monkeypatch.setattr(SingleEngine, "backward", exhaust)
    with pytest.raises(OutOfMemoryError, match="while training"):
        train(config(tiny_checkpoint, data, output))
    assert steps(output) == ([1, 2, 3] if bad else [1, 2, 3, 4])
    said = "step 4: the gradient's norm is nan; weights were not touched" in (output / "run.log").read_text()
    assert said == bad


def test_a_bad_gradient_comes_before_the_next_steps_bad_loss(
    tiny_checkpoint: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoilt = Spoilt(monkeypatch, 4)
    note = loop.to_device

    def poison(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
        arguments = note(batch, device)
        if len(spoilt.records) == 5:
            arguments["pixel_values"] = torch.full_like(arguments["pixel_values"], math.nan)
        return arguments

    monkeypatch.setattr(loop, "to_device", poison)
    with pytest.raises(NonFiniteError, match=r"^step 4: the gradient's norm is nan"):
        train(config(tiny_checkpoint, data, tmp_path / "out"))
