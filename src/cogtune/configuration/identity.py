"""Which keys make two configurations the same run, and which may change when a run goes on in its folder.

Starting in a folder that holds a run continues it if it is *the same run*. Every key stands in exactly one of the five
sets below (a test holds them to that):

* `BY_FINGERPRINT`: names a thing on disk. Not the path but what lies there is compared, by stored fingerprints.
* `GLOBAL_BATCH`: compared as one number, rows per rank x ranks x accumulation.
* `MAY_GROW`: a longer run continues a shorter one.
* `MAY_CHANGE`: logging, saving, evaluation, spreading over devices, and what only trades memory against time.
* everything else: has to be equal, and is what `identity` returns.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cogtune.configuration.run_config import RunConfig

BY_FINGERPRINT = frozenset({"model.path", "data.path", "data.validation", "data.image_root", "lora.start_from"})
GLOBAL_BATCH = frozenset({"train.batch_size", "train.accumulation"})
MAY_GROW = frozenset({"train.epochs", "train.max_steps"})
MAY_CHANGE = frozenset(
    {
        "data.batch_tokens",
        "data.workers",
        "data.max_bad_share",
        "data.extract_dir",
        "data.cache_features",
        "data.cache_dir",
        "data.cache_budget",
        "data.cache_batch",
        "train.output",
        "train.save_steps",
        "train.keep_checkpoints",
        "train.gradient_checkpointing",
        "train.compile",
        "train.restart",
        "train.resume",
        "quant.embedding",
        "quant.fp8_layouts",
        "eval.steps",
        "eval.batch_size",
        "eval.patience",
        "parallel.engine",
        "parallel.restarts",
        "parallel.tensor",
        "parallel.deepspeed",
        "parallel.launch",
        "parallel.offload",
        "parallel.keep_gathered",
        "log.level",
        "log.steps",
        "log.tensorboard",
    }
)


def identity(config: RunConfig) -> dict[str, Any]:
    """Dotted key to plain value, for every key that must be equal for two configurations to be the same run.

    What lies behind paths, and the global batch, are not in it: the run compares its stored fingerprints and number.
    """
    free = BY_FINGERPRINT | GLOBAL_BATCH | MAY_GROW | MAY_CHANGE
    dumped = config.model_dump(mode="json")
    values = {f"{section}.{name}": value for section, fields in dumped.items() for name, value in fields.items()}
    return {key: value for key, value in values.items() if key not in free}
