"""Validation: the same loss as in training, over every validation row exactly once."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass

import torch

from cogtune.configuration.run_config import RunConfig
from cogtune.data.dataset import TrainRows
from cogtune.train.batches import SkippedRows, to_device, validation_batches
from cogtune.train.engines.base import Engine
from cogtune.train.stop_signal import StopSignal

_EXCHANGED = 64  # rows of a validation set that are measured with other pictures


@dataclass(frozen=True)
class Validation:
    """Mean loss over all labelled tokens, and their number."""

    loss: float
    labels: int

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss) if self.loss < 700 else math.inf

    def to_dict(self) -> dict[str, float]:
        """Plain values for the metrics."""
        return {"loss": self.loss, "perplexity": self.perplexity, "labels": self.labels}

    @staticmethod
    def over(parts: Collection[Validation]) -> Validation:
        """Return the mean over the labels of several sets."""
        labels = sum(part.labels for part in parts)
        if len(parts) == 1:
            return next(iter(parts))
        return Validation(sum(part.loss * part.labels for part in parts) / labels, labels)


def validate(
    engine: Engine, rows: TrainRows, config: RunConfig, stop: StopSignal, left_out: SkippedRows
) -> Validation | None:
    """Return the loss over ``rows``, summed over ranks, or None if a signal asked to stop before the end.

    Raises:
        DataError: ``left_out`` counts too many rows whose images cannot be decoded.
    """
    total = torch.zeros((), dtype=torch.float64, device=engine.device)  # on the device: no synchronisation per batch
    labels = 0
    engine.module.eval()
    try:
        with torch.no_grad():
            for batch in validation_batches(rows, config, engine.group):
                if engine.group.any(stop.number is not None):
                    return None
                left_out.look_at(batch)
                labels += batch["num_labels"]
                out = engine.module(**to_device(batch, engine.device), num_items_in_batch=1, return_logits=False)
                total += out.loss.detach().double()
    finally:
        engine.module.train()
    loss, count = engine.group.sum([float(total), labels])
    return Validation(loss / count, int(count)) if count else None


def exchange_pictures(
    engine: Engine, sets: Iterable[TrainRows], config: RunConfig, stop: StopSignal, left_out: SkippedRows
) -> dict[str, float] | None:
    """Measure some rows with their own pictures and with each other's: does the model look?

    Returns:
        Both losses and the number of rows, for the metrics; the number alone if no rows have pictures; None after a
        signal.
    """
    pairs = [pair for rows in sets if len((pair := rows.exchanged(_EXCHANGED))[0])]
    losses: list[float] = []
    for side in zip(*pairs, strict=True):
        found = [validate(engine, rows, config, stop, left_out) for rows in side]
        known = [one for one in found if one is not None]
        if len(known) < len(found):
            return None
        losses.append(Validation.over(known).loss)
    count = sum(len(own) for own, _ in pairs)
    return dict(zip(("own_pictures", "other_pictures"), losses, strict=False)) | {"exchanged": count}
