"""The optimiser and the course of the learning rate."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from cogtune.configuration.run import TrainSection


def build_optimizer(parameters: Iterable[nn.Parameter], train: TrainSection) -> Optimizer:
    """One group: adapters have neither biases nor norms to spare from weight decay."""
    trained = list(parameters)
    if train.optimizer == "sgd":
        return SGD(trained, lr=train.lr, weight_decay=train.weight_decay)
    return AdamW(trained, lr=train.lr, betas=train.betas, eps=train.eps, weight_decay=train.weight_decay)


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
