"""Turn failures of a run into errors that say what to do: non-finite numbers, memory."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from cogtune.configuration.run_config import RunConfig
from cogtune.distributed.group import Group
from cogtune.errors import NonFiniteError, OutOfMemoryError
from cogtune.language import tr
from cogtune.system.gpu import is_out_of_memory

_NAMED_RECORDS = 20


def check_losses(losses: torch.Tensor, records: Sequence[Sequence[str]], group: Group) -> float:
    """Return the step's loss, summed over all ranks.

    Args:
        losses: this rank's shares, one per micro-batch, on the CPU; ``records`` names what was in each.

    Raises:
        NonFiniteError: on every rank, naming the records of the micro-batches whose loss is not finite.
    """
    total = group.sum([float(losses.sum())])[0]
    if math.isfinite(total):
        return total
    bad = [names for loss, names in zip(losses.tolist(), records, strict=True) if not math.isfinite(loss)]
    mine = [name for names in bad for name in names]
    raise NonFiniteError(
        tr(
            "the loss is {total}; it comes from {named}; weights were not touched",
            total=total,
            named=named(group, mine),
        ),
        hint=tr(
            "look at these records; if they are right, lower train.lr or, in float16, use"
            " model.dtype bfloat16 or float32"
        ),
    )


def bad_gradient(norm: float, step: int, records: Sequence[Sequence[str]], group: Group) -> NonFiniteError:
    """Return the error for a gradient that is not finite although the loss is; every rank calls it. ``step`` counts
    from 1."""
    mine = [name for names in records for name in names]
    return NonFiniteError(
        tr(
            "step {step}: the gradient's norm is {norm} although the loss is finite; the step had"
            " {named}; weights were not touched",
            step=step,
            norm=norm,
            named=named(group, mine),
        ),
        hint=tr("lower train.lr, or use model.dtype float32 to see whether the number format is the cause"),
    )


def named(group: Group, records: Sequence[str]) -> str:
    """Return all ranks' records as text; a long list is truncated."""
    names = [name for mine in group.gather(list(records)) for name in mine]
    more = tr(" and {names} more", names=len(names) - _NAMED_RECORDS) if len(names) > _NAMED_RECORDS else ""
    return "record " * (len(names) == 1) + "records " * (len(names) != 1) + ", ".join(names[:_NAMED_RECORDS]) + more


@contextmanager
def phase(name: str, config: RunConfig, device: torch.device) -> Iterator[None]:
    """Turn an out-of-memory failure inside the block into an OutOfMemoryError with the phase and what to try next."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        place = tr("the GPU") if device.type == "cuda" else tr("this machine")
        hint = tr("try {settings}", settings=next_setting(name, config))
        raise OutOfMemoryError(
            tr("out of memory on {place} while {name}", place=place, name=tr(name)), hint=hint
        ) from error


def next_setting(name: str, config: RunConfig) -> str:
    """Return the cheapest setting that is not used yet and would save memory in this phase."""
    if name == "loading the model":
        return tr("a card with more memory: the frozen weights alone do not fit")
    if name == "validation" and (config.eval.batch_size or config.train.batch_size) > 1:
        return "--eval.batch_size 1"
    if config.train.gradient_checkpointing != "all" and name != "validation":
        return "--train.gradient_checkpointing all"
    if config.train.batch_size > 1:
        rows = config.train.batch_size * config.train.accumulation
        return tr("--train.batch_size 1 --train.accumulation {rows} (the same global batch)", rows=rows)
    if config.data.max_row_tokens is None:
        return tr("--data.max_row_tokens 4096 (splits a picture's questions over rows)")
    if not config.train.activation_offloading and name != "validation":
        return "--train.activation_offloading true"
    return tr("a smaller data.max_row_tokens, data.max_input_len or lora.rank, or a card with more memory")
