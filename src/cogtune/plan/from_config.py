"""Convert a run's configuration into a `Setting`, and tell which values the user has fixed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

from cogtune.configuration.deepspeed_file import read_deepspeed
from cogtune.configuration.engine_rules import trained_base
from cogtune.configuration.load import explicit_values
from cogtune.configuration.resolve import (
    check_formats,
    memory_budget,
    recomputed_layers,
    resident_layers,
    resolve_dtype,
    resolve_engine,
    resolve_workers,
)
from cogtune.configuration.run_config import RunConfig
from cogtune.plan.cards import Card
from cogtune.plan.data_rows import Rows
from cogtune.plan.setting import LoraShape, MicroBatch, Setting, Tower, adapted_names
from cogtune.plan.sizes import ModelSizes
from cogtune.system.allocator import expandable

CHOSEN = (
    "quant.experts",
    "quant.tower",
    "quant.embedding",
    "quant.stream",
    "train.optimizer",
    "train.gradient_checkpointing",
    "data.cache_features",
    "parallel.engine",
)
"""Keys that the planner may choose if the user has not set them."""


def setting_of(
    config: RunConfig,
    rows: Rows,
    *,
    ranks: int = 1,
    local_ranks: int | None = None,
    card: Card | None = None,
    sizes: ModelSizes | None = None,
) -> Setting:
    """Return the setting that ``config`` describes, with the data's longest rows.

    Keys that the planner may choose have their simplest value: the tower runs live, no layer is recomputed, and every
    card holds the whole model.

    Args:
        ranks: processes of the run.
        local_ranks: processes per machine; None: all on one.
        card: None for CPUs.
        sizes: model sizes, if they are not those of ``model.path``.

    Raises:
        AdapterError: a LoRA target that matches nothing.
        SetupError: the card does not support the number format.
    """
    sizes, train = sizes or ModelSizes.from_folder(config.model.path), config.train
    lora, tensor = config.lora, config.parallel.tensor
    check_formats(config.quant, card)
    names = adapted_names(sizes, lora.targets, lora.extra)
    adapter = LoraShape(names, lora.rank, lora.dropout, lora.dora, trained_base(lora.extra))
    setting = Setting(
        sizes=sizes,
        batch=_batch(config, rows, sizes),
        adapter=adapter,
        quant=config.quant,
        tower=_tower(config, rows),
        dtype=resolve_dtype(config.model.dtype, card),
        optimizer=train.optimizer,
        accumulation=train.accumulation,
        engine=_engine(config, ranks),
        ranks=ranks,
        tensor=tensor,
        compile=_compile(config, card),
        eval_rows=config.eval.batch_size,
        workers=resolve_workers(config.data.workers, local_ranks or ranks),
        bucket=_bucket(config),
        keep_gathered=_keep_gathered(config),
        offload=config.parallel.offload,
        expandable=expandable(),
        resident=resident_layers(config.quant.stream, sizes.num_hidden_layers),
        tower_resident=resident_layers(config.quant.stream, sizes.num_hidden_layers, sizes.vision.num_hidden_layers),
        offloading=train.activation_offloading,
        cache_dtype=config.data.cache_dtype,
    )
    return recomputed(setting, train.gradient_checkpointing)


def fixed_keys(config: RunConfig, placeholders: Mapping[str, Any] = {}) -> frozenset[str]:
    """Return those of `CHOSEN` that the user set to something other than ``auto`` or a memory budget."""
    given = {key: value for key, value in explicit_values(config).items() if key not in placeholders}
    fixed = {key for key in CHOSEN if given.get(key, "auto") != "auto"}
    if budget_of(config) is not None:
        fixed.discard("train.gradient_checkpointing")
    return frozenset(fixed)


def budget_of(config: RunConfig) -> int | None:
    """Return ``train.gradient_checkpointing`` in bytes if it is a memory budget."""
    return memory_budget(config.train.gradient_checkpointing)


def recomputed(setting: Setting, policy: str | int) -> Setting:
    """Return ``setting`` with the layers that a fixed policy recomputes; ``auto`` and budgets recompute none yet."""
    decoder = recomputed_layers(policy, setting.sizes.num_hidden_layers)
    blocks = recomputed_layers(policy, setting.sizes.vision.num_hidden_layers)
    if decoder is None or blocks is None:
        return setting
    return replace(setting, decoder=frozenset(decoder), blocks=frozenset(blocks))


def _batch(config: RunConfig, rows: Rows, sizes: ModelSizes) -> MicroBatch:
    """Return a micro-batch of the longest rows; with a token budget, as many of them as fit it."""
    train, limit = config.train, config.data.batch_tokens
    count = train.batch_size
    if limit is not None:
        count = min(count * train.accumulation, max(1, limit // rows.largest.tokens(sizes)))
    return replace(rows.largest, rows=count)


def _tower(config: RunConfig, rows: Rows) -> Tower:
    if not rows.largest.images:
        return "none"
    return "cached" if config.data.cache_features == "on" else "live"


def _engine(config: RunConfig, ranks: int) -> str:
    """Return the planner's name of the engine.

    Under tensor parallelism, it is the engine of the data-parallel dimension.
    """
    name = resolve_engine(config.parallel, ranks, launched=ranks > 1)
    if name == "tensor":
        return "ddp" if ranks > config.parallel.tensor else "single"
    return "ddp" if name == "auto" else name


def _compile(config: RunConfig, card: Card | None) -> Literal["auto"] | bool:
    """Resolve ``train.compile``: ``auto`` is False without a GPU that torch can compile for, else depends on the
    engine.
    """
    able = card is not None and card.compiled_for
    return "auto" if config.train.compile == "auto" and able else config.train.compile is True


def _bucket(config: RunConfig) -> int:
    """Return the elements of DeepSpeed's gradient buffers from the user's DeepSpeed file: one buffer, or two if
    communication overlaps the backward pass; 0 if the file leaves the size to cogtune.
    """
    if config.parallel.deepspeed is None or not config.parallel.deepspeed.is_file():
        return 0
    zero = read_deepspeed(config.parallel.deepspeed).get("zero_optimization") or {}
    size = zero.get("reduce_bucket_size", 0)
    return (2 if zero.get("overlap_comm") is True else 1) * (0 if size == "auto" else int(float(size)))


def _keep_gathered(config: RunConfig) -> int | None:
    asked = config.parallel.keep_gathered
    return None if asked == "auto" else int(asked)
