"""The learning rate's course: no step is wasted, and continuing gives the same numbers."""

from __future__ import annotations

import math

import pytest
import torch

from cogtune.configuration.run_config import TrainSection
from cogtune.train.optim import (
    build_optimizer,
    build_schedule,
    current_lr,
    lr_factor,
    moments,
    restore_moments,
    skips_on_device,
    step_if_finite,
    warmup_steps,
)


def section(**values: object) -> TrainSection:
    return TrainSection(output="out", **values)


def test_warmup_rises_to_one_and_never_starts_at_zero() -> None:
    factor = lr_factor(section(warmup_steps=4, schedule="constant"), 10)
    assert [factor(step) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_schedules_fall_from_one_and_the_last_step_still_learns(schedule: str) -> None:
    factor = lr_factor(section(schedule=schedule, warmup_ratio=0), 10)
    values = [factor(step) for step in range(10)]
    assert values[0] == 1.0
    assert values == sorted(values, reverse=True)
    assert values[-1] > 0
    assert factor(10) == pytest.approx(0, abs=1e-12)


def test_cosine_is_a_quarter_down_after_a_third() -> None:
    """cos(60 degrees) = 1/2, after three steps of warm-up."""
    factor = lr_factor(section(schedule="cosine", warmup_steps=3), 15)
    assert [factor(step) for step in (3, 7, 9, 11)] == pytest.approx([1, 0.75, 0.5, 0.25])


def test_linear_without_warmup_is_the_published_demos_schedule() -> None:
    factor = lr_factor(section(schedule="linear", warmup_ratio=0), 8)
    assert [factor(step) for step in range(8)] == [1 - step / 8 for step in range(8)]


def test_warmup_ratio_counts_steps_of_the_whole_run() -> None:
    assert warmup_steps(section(warmup_ratio=0.03), 100) == 3
    assert warmup_steps(section(warmup_ratio=0.03), 20) == 1
    assert warmup_steps(section(warmup_steps=7), 20) == 7


def test_a_continued_schedule_gives_the_same_rates() -> None:
    train = section(warmup_steps=3)

    def rates(start: int) -> list[float]:
        optimizer = build_optimizer([torch.nn.Parameter(torch.zeros(2))], train)
        schedule = build_schedule(optimizer, train, 12, start)
        found = []
        for _ in range(start, 12):
            found.append(current_lr(optimizer))
            optimizer.step()
            schedule.step()
        return found

    assert rates(5) == rates(0)[5:]


def test_optimizers_follow_their_settings() -> None:
    adamw = build_optimizer([torch.nn.Parameter(torch.zeros(2))], section(betas=(0.8, 0.9), eps=1e-6, weight_decay=0.1))
    assert isinstance(adamw, torch.optim.AdamW)
    assert (adamw.defaults["betas"], adamw.defaults["eps"], adamw.defaults["weight_decay"]) == ((0.8, 0.9), 1e-6, 0.1)
    assert isinstance(build_optimizer([torch.nn.Parameter(torch.zeros(2))], section(optimizer="sgd")), torch.optim.SGD)


@pytest.mark.parametrize("fused", [False, True])
def test_going_on_with_restored_moments_is_going_on(fused: bool) -> None:
    """To the bit, also for AdamW as one kernel, whose count of steps lies where the parameter does."""

    def begin() -> tuple[torch.nn.Parameter, torch.optim.Optimizer]:
        parameter = torch.nn.Parameter(torch.linspace(-1, 1, 12).view(3, 4))
        return parameter, torch.optim.AdamW([parameter], lr=0.1, weight_decay=0.1, fused=fused)

    def step(parameter: torch.nn.Parameter, optimizer: torch.optim.Optimizer, number: int) -> None:
        parameter.grad = torch.cos(parameter.detach() * (number + 1))
        optimizer.step()

    whole, optimizer = begin()
    for number in range(3):
        step(whole, optimizer, number)
    again, restored = begin()
    again.data.copy_(whole.data)
    restore_moments(restored, again, moments(optimizer, whole), 3)
    for number in range(3, 6):
        step(whole, optimizer, number)
        step(again, restored, number)
    assert torch.equal(again, whole)


def _train_in_one_kernel(norms: list[float]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """A weight and its optimiser's state after a step for each norm; where that is not finite, so is the gradient."""
    parameter = torch.nn.Parameter(torch.linspace(-1, 1, 12).view(3, 4))
    optimizer = torch.optim.AdamW([parameter], lr=0.1, weight_decay=0.1, fused=True)
    number = 0
    for norm in norms:
        parameter.grad = torch.full_like(parameter, norm)
        if math.isfinite(norm):
            parameter.grad = torch.cos(parameter.detach() * (number + 1))
            number += 1
        step_if_finite(optimizer, torch.tensor(norm))
    assert not hasattr(optimizer, "found_inf")  # it would speak for steps that look at no norm
    return parameter.detach(), optimizer.state[parameter]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("place", [0, 2, 4])
def test_a_step_that_the_device_leaves_out_never_was(bad: float, place: int) -> None:
    """To the bit: the weights, both moments, the count of steps, and whatever comes after it."""
    weight, state = _train_in_one_kernel([1.0, 1.0, 1.0, 1.0])
    with_bad = [1.0, 1.0, 1.0, 1.0]
    with_bad.insert(place, bad)
    found, found_state = _train_in_one_kernel(with_bad)
    assert torch.equal(found, weight)
    assert found_state.keys() == state.keys() == {"step", "exp_avg", "exp_avg_sq"}
    assert all(torch.equal(found_state[kind], state[kind]) for kind in state)
    assert float(state["step"]) == 4


def test_a_step_under_a_condition_is_the_step_without_one() -> None:
    weight, state = _train_in_one_kernel([1.0, 1.0, 1.0])
    parameter = torch.nn.Parameter(torch.linspace(-1, 1, 12).view(3, 4))
    optimizer = torch.optim.AdamW([parameter], lr=0.1, weight_decay=0.1, fused=True)
    for number in range(3):
        parameter.grad = torch.cos(parameter.detach() * (number + 1))
        optimizer.step()
    assert torch.equal(parameter, weight)
    assert all(torch.equal(optimizer.state[parameter][kind], state[kind]) for kind in state)


def test_only_adamw_as_one_kernel_leaves_out_a_step_by_itself() -> None:
    """Others would ignore the condition, or refuse it, and a gradient of NaN would reach the weights."""
    parameters = [torch.nn.Parameter(torch.zeros(2))]
    assert skips_on_device(torch.optim.AdamW(parameters, fused=True))
    assert not skips_on_device(torch.optim.AdamW(parameters))
    assert not skips_on_device(torch.optim.SGD(parameters, fused=True))
    bitsandbytes = pytest.importorskip("bitsandbytes")
    assert not skips_on_device(bitsandbytes.optim.AdamW8bit(parameters))
