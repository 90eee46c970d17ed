"""Decides which keys make two configurations the same run, and which may change when a run resumes.

Starting in a folder that contains a run resumes it if it is *the same run*. Every key is in exactly one of these five
sets (tested):

* `BY_FINGERPRINT`: names something on disk. Its content is compared by stored fingerprints, not its path.
* `GLOBAL_BATCH`: compared as one number: rows per rank x ranks x accumulation.
* `MAY_GROW`: a longer run resumes a shorter one.
* `MAY_CHANGE`: logging, saving, evaluation, parallelism, and what only trades memory for time.
* everything else: must be equal; `identity` returns these.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cogtune.configuration.withdrawn import CONSTANT

if TYPE_CHECKING:
    from cogtune.configuration.run_config import RunConfig

BY_FINGERPRINT = frozenset(
    {
        "model.path",
        "model.tokenizer",
        "data.path",
        "data.validation",
        "data.image_root",
        "data.clip_question",
        "data.box_question",
        "data.boxes",
        "data.box_form",
        "data.frames",
        "data.max_frames",
        "data.frame_rate",
        "lora.start_from",
    }
)
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
        "train.activation_offloading",
        "train.compile",
        "train.restart",
        "train.resume",
        "quant.embedding",
        "quant.fp8_layouts",
        "quant.stream",
        "eval.steps",
        "eval.batch_size",
        "eval.patience",
        "eval.generate",
        "eval.max_new_tokens",
        "eval.metrics",
        "eval.metric",
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
        "log.trackers",
        "log.project",
        "log.run_name",
    }
)


def identity(config: RunConfig) -> dict[str, Any]:
    """Return the keys and plain values that must be equal for two configurations to be the same run.

    Contents of paths and the global batch are not included: the run compares its stored fingerprints and number. Keys
    of earlier versions are, so that their runs can be continued.
    """
    free = BY_FINGERPRINT | GLOBAL_BATCH | MAY_GROW | MAY_CHANGE
    dumped = config.model_dump(mode="json")
    values = {f"{section}.{name}": value for section, fields in dumped.items() for name, value in fields.items()}
    return CONSTANT | {key: value for key, value in values.items() if key not in free}
