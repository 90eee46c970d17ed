"""The optimiser and the learning rate schedule."""

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
from cogtune.language import tr


def build_optimizer(parameters: Iterable[nn.Parameter], train: TrainSection, *, fused: bool = False) -> Optimizer:
    """Build the optimiser with one parameter group: adapters have no biases or norms to exempt from weight decay.

    ``fused``: use the fused AdamW on GPUs. It makes no copies of the moments and needs few kernel launches for hundreds
    of small tensors.
    """
    trained = list(parameters)
    if train.optimizer == "sgd":
        return SGD(trained, lr=train.lr, weight_decay=train.weight_decay)
    settings: dict[str, Any] = {"betas": train.betas, "eps": train.eps, "weight_decay": train.weight_decay}
    if train.optimizer == "adamw":
        fuses = fused and all(parameter.is_cuda for parameter in trained)
        return AdamW(trained, lr=train.lr, fused=fuses or None, **settings)
    require_bitsandbytes(tr("the optimiser {optimizer}'s states", optimizer=train.optimizer))
    from bitsandbytes.optim import AdamW8bit

    made: Optimizer = AdamW8bit(trained, lr=train.lr, **settings)
    return made


def skips_on_device(optimizer: Optimizer) -> bool:
    """Return whether `step_if_finite` supports this optimiser: torch's fused AdamW does."""
    return isinstance(optimizer, AdamW) and all(group["fused"] for group in optimizer.param_groups)


def step_if_finite(optimizer: Any, norm: torch.Tensor) -> None:
    """Update the weights unless ``norm`` is not finite; then weights, moments and the step count stay unchanged.

    The device decides, so the host does not wait for the norm. ``found_inf`` is the attribute through which torch's
    GradScaler tells fused optimisers to skip. It is deleted afterwards, so that it does not affect later steps.
    """
    optimizer.found_inf = torch.isfinite(norm).logical_not().float()
    try:
        optimizer.step()
    finally:
        del optimizer.found_inf


def moments(optimizer: Any, parameter: nn.Parameter) -> dict[str, torch.Tensor]:
    """Return the optimiser's state of a parameter on the CPU, exactly: 8-bit moments stay in 8 bits, with their block
    scales.

    Tables that are the same for all parameters (bitsandbytes' ``qmap``) are recreated by `restore_moments`.
    """
    found = {}
    for kind, value in optimizer.state[parameter].items():
        if torch.is_tensor(value) and (value.shape == parameter.shape or kind in SCALES) and kind != "step":
            narrow = value.dtype == torch.uint8
            found[kind] = (value.detach() if narrow else value.detach().float()).cpu()
    return found


def restore_moments(optimizer: Any, parameter: nn.Parameter, found: dict[str, torch.Tensor], steps: int) -> None:
    """Restore the result of `moments`, after ``steps`` updates."""
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
    for kind, value in found.items():
        state[kind].copy_(value)


SCALES = ("absmax1", "absmax2")


def warmup_steps(train: TrainSection, total: int) -> int:
    return train.warmup_steps if train.warmup_steps is not None else math.ceil(train.warmup_ratio * total)


def lr_factor(train: TrainSection, total: int) -> Callable[[int], float]:
    """Return the learning rate factor as a function of the step, 0 to ``total`` - 1.

    Warm-up never starts at 0, so that no step is wasted: its w steps have factors 1/w, ..., w/w. After it, cosine and
    linear decay from 1 towards 0, which step ``total`` would reach.
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
    """Return the schedule as it is before step number ``step`` (0 at the start; more when a run resumes)."""
    for group in optimizer.param_groups:
        group["initial_lr"] = train.lr
    return LambdaLR(optimizer, lr_factor(train, total), last_epoch=step - 1)


def current_lr(optimizer: torch.optim.Optimizer) -> float:
    return float(optimizer.param_groups[0]["lr"])
