"""What the host waits for in a step of training on a GPU: the loss, which comes before the backward pass; no more."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from cogtune.configuration.run_config import RunConfig
from cogtune.errors import NonFiniteError
from cogtune.evaluate.run_folder import read_metrics
from cogtune.train import validation
from cogtune.train.batches import Batch, Feed, StepBatches
from cogtune.train.engines.async_scalar import AsyncScalar
from cogtune.train.engines.single import SingleEngine
from cogtune.train.optim import step_if_finite
from cogtune.train.run import train
from tests.support.training import make_config, write_data

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.alone,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

STEADY = 5  # by then nothing is done for the first time
BUSY = 400_000_000  # cycles: 0.2 s at 2 GHz, more on any slower card


def config(base: Path, folder: Path, **values: Any) -> RunConfig:
    """Twelve steps without anything between them, rows of one length."""
    data = write_data(folder / "pictures", 8, uneven=False)
    keys = {
        "model__dtype": "bfloat16",
        "train__batch_size": 2,
        "train__max_steps": 12,
        "train__save_steps": 100,
        "train__compile": False,
        **values,
    }
    return make_config(base, data, folder / "out", **keys)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_steady_step_has_no_hidden_wait(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, accumulation: int
) -> None:
    """torch raises at every copy or question that would wait for the device, from one batch to one three steps later.
    What the loop reads on purpose comes by events, which torch does not count as such."""
    original, watched = Feed.steps, list[int]()

    def steps(self: Feed, start: tuple[int, int]) -> Iterator[StepBatches]:
        for number, step in enumerate(original(self, start), 1):
            if number == STEADY:
                torch.cuda.set_sync_debug_mode("error")
            if number == STEADY + 3:
                torch.cuda.set_sync_debug_mode("default")
            watched.append(torch.cuda.get_sync_debug_mode())
            yield step

    monkeypatch.setattr(Feed, "steps", steps)
    try:
        train(config(tiny_checkpoint, tmp_path, train__accumulation=accumulation))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert watched == [0] * (STEADY - 1) + [2] * 3 + [0] * (12 - STEADY - 2)
    lines = [line for line in read_metrics(tmp_path / "out") if line["kind"] == "train"]
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert all(math.isfinite(line["grad_norm"]) and line["grad_norm"] > 0 for line in lines)


def test_validation_waits_for_its_sum_only(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, watched = validation.validation_batches, list[int]()

    def batches(*args: Any) -> Iterator[Batch]:
        for number, batch in enumerate(original(*args), 1):
            if number == 2:
                torch.cuda.set_sync_debug_mode("error")
            watched.append(torch.cuda.get_sync_debug_mode())
            yield batch
        torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(validation, "validation_batches", batches)
    rows = write_data(tmp_path / "validation", 8, uneven=False)
    try:
        train(config(tiny_checkpoint, tmp_path, data__validation=[str(rows)], train__max_steps=1))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert watched == 3 * [0, 2, 2, 2]  # all rows, then some with their own and with other pictures


@pytest.mark.parametrize(("optimizer", "waits"), [("adamw", False), ("sgd", True)])
def test_the_host_goes_on_while_the_device_is_at_the_backward_pass(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimizer: str, waits: bool
) -> None:
    """A backward pass that takes the device long: AdamW's step is launched behind it, SGD's waits for its norm."""
    backward, step = SingleEngine.backward, SingleEngine.step
    passes, took = list[int](), list[float]()

    def busy(self: SingleEngine, scaled: torch.Tensor) -> None:
        backward(self, scaled)
        passes.append(1)
        if len(passes) >= STEADY:
            torch.cuda._sleep(BUSY)

    def timed(self: SingleEngine) -> Any:
        began = time.perf_counter()
        result = step(self)
        took.append(time.perf_counter() - began)
        return result

    monkeypatch.setattr(SingleEngine, "backward", busy)
    monkeypatch.setattr(SingleEngine, "step", timed)
    train(config(tiny_checkpoint, tmp_path, train__optimizer=optimizer, train__lr=1e-3))
    assert len(took) == 12
    late = took[STEADY:]
    assert (min(late) > 0.1) if waits else (max(late) < 0.1), took
    # the lines' speed is the device's, whenever the host looked: two rows in a fifth of a second or more
    lines = [line for line in read_metrics(tmp_path / "out") if line["kind"] == "train"]
    speeds = [line["samples_per_second"] for line in lines][STEADY:]
    assert all(speed < 2 / 0.15 for speed in speeds), speeds


def test_a_bad_gradient_stops_a_run_on_the_device(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backward, step = SingleEngine.backward, SingleEngine.step
    passes, weights, counts = list[int](), list[list[torch.Tensor]](), list[int]()

    def spoil(self: SingleEngine, scaled: torch.Tensor) -> None:
        backward(self, scaled)
        passes.append(1)
        if len(passes) == 4:
            next(iter(self.parameters.values())).grad.fill_(math.nan)  # type: ignore[union-attr]

    def keep(self: SingleEngine) -> Any:
        result = step(self)
        weights.append([value.detach().clone() for value in self.parameters.values()])
        counts.append(self.counters()["optimizer_steps"])
        return result

    monkeypatch.setattr(SingleEngine, "backward", spoil)
    monkeypatch.setattr(SingleEngine, "step", keep)
    with pytest.raises(NonFiniteError, match="step 4: the gradient's norm is nan"):
        train(config(tiny_checkpoint, tmp_path))
    assert len(passes) == 5
    assert counts == [1, 2, 3, 3]
    assert all(torch.equal(now, before) for now, before in zip(weights[3], weights[2], strict=True))
    assert not list((tmp_path / "out").glob("checkpoint-*"))


def test_the_kernel_leaves_out_a_step_as_if_it_never_was() -> None:
    def run(norms: list[float]) -> list[torch.Tensor]:
        parameters = [torch.nn.Parameter(torch.linspace(-1, 1, size).cuda()) for size in (7, 4096)]
        optimizer = torch.optim.AdamW(parameters, lr=0.1, weight_decay=0.1, fused=True)
        for norm in norms:
            for parameter in parameters:
                grad = torch.cos(parameter.detach()) if math.isfinite(norm) else torch.full_like(parameter, norm)
                parameter.grad = grad
            step_if_finite(optimizer, torch.tensor(norm).cuda())
        states = [optimizer.state[parameter] for parameter in parameters]
        return [*parameters, *(state[kind] for state in states for kind in ("step", "exp_avg", "exp_avg_sq"))]

    wanted = run([1.0, 1.0, 1.0])
    for norms in ([1.0, math.nan, 1.0, 1.0], [math.inf, 1.0, 1.0, 1.0]):
        assert all(torch.equal(one, other) for one, other in zip(run(norms), wanted, strict=True))


def test_a_number_arrives_by_the_devices_clock() -> None:
    AsyncScalar(torch.zeros((), device="cuda")).value()
    first = AsyncScalar(torch.zeros((), device="cuda"))
    torch.cuda._sleep(BUSY)
    second = AsyncScalar(torch.full((), 2.5, device="cuda"))
    torch.cuda._sleep(BUSY)
    began = time.perf_counter()
    assert second.value() == 2.5
    assert second.seconds_since(first) > 0.15
    assert time.perf_counter() - began < 1.5 * second.seconds_since(first) + 0.05  # not for what stands behind it
