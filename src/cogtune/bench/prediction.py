"""The prediction of ``cogtune plan`` for a measured setting, to be shown next to the measurement."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from cogtune.bench.flops import Work
from cogtune.bench.variants import Variant
from cogtune.configuration.model import CogVLM2Config
from cogtune.errors import InputError
from cogtune.plan.cards import named_like
from cogtune.plan.data_rows import Rows
from cogtune.plan.from_config import setting_of
from cogtune.plan.memory import predict
from cogtune.plan.setting import MicroBatch, Setting, Tower
from cogtune.plan.sizes import ModelSizes
from cogtune.plan.time import step_time
from cogtune.system.byte_sizes import GIB


def setting_for(variant: Variant, model: CogVLM2Config, work: Work, *, card: str, ranks: int = 1) -> Setting:
    """Return the planner's setting for a variant and one of its batches; ``card``: the driver's name, empty
    for a CPU.
    """
    config, sizes = variant.config, ModelSizes.from_config(model.to_dict())
    images = work.images / work.rows
    batch = MicroBatch(
        rows=work.rows,
        images=images,
        text=round(work.tokens / work.rows - images * model.num_image_tokens),
        labelled=round(work.labels / work.rows),
    )
    rows = Rows(work.rows, work.images, batch, batch)
    setting = setting_of(config, rows, ranks=ranks, card=named_like(card) if card else None, sizes=sizes)
    tower: Tower = "none" if not work.images else ("cached" if variant.cached else "live")
    return replace(setting, batch=batch, tower=tower)


def predicted(
    variant: Variant, model: CogVLM2Config, work: Work, *, card: str, ranks: int = 1
) -> dict[str, Any] | None:
    """Return GiB of loading and of training, and milliseconds per step (only for a named card).

    Returns None for what the planner does not model: the baseline, and a policy that the planner would choose itself.
    """
    policy = variant.config.train.gradient_checkpointing
    if variant.baseline or (isinstance(policy, str) and policy not in ("none", "all")):
        return None
    try:
        setting = setting_for(variant, model, work, card=card, ranks=ranks)
        memory = predict(setting)
        load, train = memory.phase("load"), memory.phase("train")
    except (InputError, KeyError, StopIteration) as error:
        return {"error": f"{type(error).__name__}: {error}"}
    found: dict[str, Any] = {
        "load_reserved_gib": round(load.reserved / GIB, 3),
        "allocated_gib": round(train.allocated / GIB, 3),
        "reserved_gib": round(train.reserved / GIB, 3),
        "driver_gib": round((train.reserved + memory.outside) / GIB, 3),
    }
    if card:
        found["median_ms"] = round(1000 * step_time(setting, named_like(card)).seconds, 1)
    return found
