"""The optimiser and the course of the learning rate."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from cogtune.checkpoint.quantize import require_bitsandbytes
from cogtune.configuration.run_config import TrainSection


def build_optimizer(parameters: Iterable[nn.Parameter], train: TrainSection, *, fused: bool = False) -> Optimizer:
    """One group: adapters have neither biases nor norms to spare from weight decay. ``fused``: AdamW as one kernel on
    GPUs, without copies of the moments; hundreds of small tensors cost the host little then."""
    trained = list(parameters)
    if train.optimizer == "sgd":
        return SGD(trained, lr=train.lr, weight_decay=train.weight_decay)
    settings: dict[str, Any] = {"betas": train.betas, "eps": train.eps, "weight_decay": train.weight_decay}
    if train.optimizer == "adamw":
        fuses = fused and all(parameter.is_cuda for parameter in trained)
        return AdamW(trained, lr=train.lr, fused=fuses or None, **settings)
    require_bitsandbytes(f"the optimiser {train.optimizer}'s states")
    from bitsandbytes import optim

    kinds = {"adamw8bit": optim.AdamW8bit, "paged_adamw": optim.PagedAdamW, "paged_adamw8bit": optim.PagedAdamW8bit}
    made: Optimizer = kinds[train.optimizer](trained, lr=train.lr, **settings)
    return made


def skips_on_device(optimizer: Optimizer) -> bool:
    """Whether `step_if_finite` works with this optimiser: torch's AdamW as one kernel does."""
    return isinstance(optimizer, AdamW) and all(group["fused"] for group in optimizer.param_groups)


def step_if_finite(optimizer: Any, norm: torch.Tensor) -> None:
    """The update, unless ``norm`` is not finite: then weights, moments and the count of steps stay as they are.

    The device decides, so the host neither waits for the norm nor knows it. ``found_inf`` is what torch's GradScaler
    tells such optimisers; one that is left behind would speak for later steps too.
    """
    optimizer.found_inf = torch.isfinite(norm).logical_not().float()
    try:
        optimizer.step()
    finally:
        del optimizer.found_inf


def moments(optimizer: Any, parameter: nn.Parameter) -> dict[str, torch.Tensor]:
    """What the optimiser remembers of a parameter, on the CPU, exactly: 8-bit moments stay in 8 bits, with the scales
    of their blocks. Tables that are the same for all (bitsandbytes' ``qmap``) are made anew by `restore_moments`."""
    found = {}
    for kind, value in optimizer.state[parameter].items():
        if torch.is_tensor(value) and (value.shape == parameter.shape or kind in _SCALES) and kind != "step":
            if value.is_cuda or getattr(value, "is_paged", False):
                torch.cuda.synchronize()  # paged memory is read by the host itself
            narrow = value.dtype == torch.uint8
            found[kind] = (value.detach() if narrow else value.detach().float()).cpu()
    return found


def restore_moments(optimizer: Any, parameter: nn.Parameter, found: dict[str, torch.Tensor], steps: int) -> None:
    """Put back what `moments` gave, after ``steps`` updates."""
    if not found:
        return
    if "state1" not in found:
        kept = {kind: torch.zeros_like(parameter).copy_(value) for kind, value in found.items()}
        fused = any(group.get("fused") for group in optimizer.param_groups)
        step = torch.tensor(float(steps), device=parameter.device if fused else "cpu")
        optimizer.state[parameter] = {"step": step, **kept}
        return
    for number, group in enumerate(optimizer.param_groups):
        for index, other in enumerate(group["params"]):
            if other is parameter:
                optimizer.init_state(group, parameter, number, index)
    state = optimizer.state[parameter]
    state["step"] = steps
    if parameter.is_cuda:
        torch.cuda.synchronize()
    for kind, value in found.items():
        state[kind].copy_(value)


_SCALES = ("absmax1", "absmax2")


def warmup_steps(train: TrainSection, total: int) -> int:
    return train.warmup_steps if train.warmup_steps is not None else math.ceil(train.warmup_ratio * total)


def lr_factor(train: TrainSection, total: int) -> Callable[[int], float]:
    """Factor on the learning rate at step 0, 1, ... ``total`` - 1.

    Warm-up ends at its last step and never begins at 0, so that no step is wasted: with w steps they are 1/w, ..., w/w.
    After it, cosine and linear fall from 1 towards 0, which step ``total`` would reach.
    """
    warmup = warmup_steps(train, total)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        share = min(1.0, (step - warmup) / max(1, total - warmup))
        if train.schedule == "cosine":
            return 0.5 * (1 + math.cos(math.pi * share))
        return 1 - share if train.schedule == "linear" else 1.0

    return factor


def build_schedule(optimizer: Optimizer, train: TrainSection, total: int, step: int) -> LambdaLR:
    """The schedule as it stands before step number ``step`` (0 at the start; more when a run continues)."""
    for group in optimizer.param_groups:
        group["initial_lr"] = train.lr
    return LambdaLR(optimizer, lr_factor(train, total), last_epoch=step - 1)


def current_lr(optimizer: torch.optim.Optimizer) -> float:
    return float(optimizer.param_groups[0]["lr"])
