"""From a run's configuration to a `Setting`, and which of its values the user has fixed."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from cogtune.configuration.deepspeed import read_deepspeed
from cogtune.configuration.load import explicit_values
from cogtune.configuration.run_config import RunConfig
from cogtune.plan.cards import Card
from cogtune.plan.data_rows import Rows
from cogtune.plan.setting import Adapter, Batch, Setting, Tower, adapted_names
from cogtune.plan.sizes import ModelSizes
from cogtune.system.allocator import expandable
from cogtune.system.byte_sizes import parse_size

CHOSEN = (
    "quant.experts",
    "quant.tower",
    "quant.embedding",
    "train.optimizer",
    "train.gradient_checkpointing",
    "data.cache_features",
    "parallel.engine",
)
"""Keys the planner may choose where the user has not."""


def setting_of(config: RunConfig, rows: Rows, *, ranks: int = 1, card: Card | None = None) -> Setting:
    """The setting ``config`` describes, with the data's longest rows; what it leaves to ``auto`` is at its plainest:
    the live tower and no recomputation.

    Raises AdapterError for targets that match nothing.
    """
    sizes, train = ModelSizes.from_folder(config.model.path), config.train
    lora, tensor = config.lora, int(getattr(config.parallel, "tensor", 1))
    adapter = Adapter(adapted_names(sizes, lora.targets, lora.extra), lora.rank, lora.dropout, lora.dora)
    setting = Setting(
        sizes=sizes,
        batch=_batch(config, rows, sizes),
        adapter=adapter,
        quant=config.quant,
        tower=_tower(config, rows),
        dtype=_dtype(config, card),
        optimizer=train.optimizer,
        accumulation=train.accumulation,
        engine=_engine(config, ranks),
        ranks=ranks,
        tensor=tensor,
        eval_rows=config.eval.batch_size,
        workers=_workers(config),
        bucket=_bucket(config),
        keep_gathered=_keep_gathered(config),
        offload=config.parallel.offload,
        expandable=expandable(),
    )
    setting = _compiled(setting, config, card)
    return recomputed(setting, train.gradient_checkpointing)


def fixed_keys(config: RunConfig, placeholders: Mapping[str, Any] = {}) -> frozenset[str]:
    """Of `CHOSEN`, the keys the user gave a value other than ``auto``, or other than a memory budget."""
    given = {key: value for key, value in explicit_values(config).items() if key not in placeholders}
    fixed = {key for key in CHOSEN if given.get(key, "auto") != "auto"}
    if budget_of(config) is not None:
        fixed.discard("train.gradient_checkpointing")
    return frozenset(fixed)


def budget_of(config: RunConfig) -> int | None:
    """The size in ``train.gradient_checkpointing``, where it is one."""
    policy = config.train.gradient_checkpointing
    if isinstance(policy, str) and policy not in ("auto", "none", "all"):
        return parse_size(policy)
    return None


def recomputed(setting: Setting, policy: str | int) -> Setting:
    """``setting`` with the layers a plain policy recomputes; ``auto`` and budgets recompute none yet."""
    layers, blocks = setting.sizes.num_hidden_layers, setting.sizes.vision.num_hidden_layers
    if policy == "all":
        policy = 1
    if isinstance(policy, int):
        every = frozenset(range(0, layers, policy)), frozenset(range(0, blocks, policy))
        return replace(setting, decoder=every[0], blocks=every[1])
    return setting


def _batch(config: RunConfig, rows: Rows, sizes: ModelSizes) -> Batch:
    """A micro-batch of the longest rows; with a token budget, as many of them as it holds."""
    train, limit = config.train, config.data.batch_tokens
    count = train.batch_size
    if limit is not None:
        count = min(count * train.accumulation, max(1, limit // rows.largest.tokens(sizes)))
    return replace(rows.largest, rows=count)


def _tower(config: RunConfig, rows: Rows) -> Tower:
    if not rows.largest.images:
        return "none"
    return "cached" if getattr(config.data, "cache_features", "off") == "on" else "live"


def _dtype(config: RunConfig, card: Card | None) -> str:
    if config.model.dtype != "auto":
        return config.model.dtype
    return "bfloat16" if card is None or card.bfloat16 else "float16"


def _engine(config: RunConfig, ranks: int) -> str:
    asked = config.parallel.engine
    if asked != "auto":
        return asked
    if config.parallel.deepspeed is not None and ranks > 1:
        return "zero2"
    return "ddp" if ranks > 1 else "single"


def _compiled(setting: Setting, config: RunConfig, card: Card | None) -> Setting:
    asked = config.train.compile
    able = card is not None and setting.engine in ("single", "ddp") and setting.tensor == 1
    compiled = able if asked == "auto" else bool(asked)
    return replace(setting, compiled=compiled)


def _workers(config: RunConfig) -> int:
    if config.data.workers is not None:
        return config.data.workers
    return max(0, min(8, (os.cpu_count() or 1) - 1))


def _bucket(config: RunConfig) -> int:
    """Values of the buffers for gradients that a DeepSpeed file asks for: one, or two where sending overlaps the
    backward pass; 0 where it leaves their size to us."""
    if config.parallel.deepspeed is None or not config.parallel.deepspeed.is_file():
        return 0
    zero = read_deepspeed(config.parallel.deepspeed).get("zero_optimization") or {}
    size = zero.get("reduce_bucket_size", 0)
    return (2 if zero.get("overlap_comm") is True else 1) * (0 if size == "auto" else int(float(size)))


def _keep_gathered(config: RunConfig) -> int:
    """``auto`` takes only memory that is free after the first step."""
    asked = config.parallel.keep_gathered
    return 0 if asked == "auto" else int(asked)
