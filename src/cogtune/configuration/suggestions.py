"""Suggests the key that a misspelt or foreign name most likely means."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

_NAMES_ELSEWHERE = {
    "learning_rate": "train.lr",
    "num_epochs": "train.epochs",
    "num_train_epochs": "train.epochs",
    "gradient_accumulation_steps": "train.accumulation",
    "per_device_train_batch_size": "train.batch_size",
    "per_device_eval_batch_size": "eval.batch_size",
    "micro_batch_size": "train.batch_size",
    "lr_scheduler_type": "train.schedule",
    "output_dir": "train.output",
    "save_path": "train.output",
    "lora_rank": "lora.rank",
    "r": "lora.rank",
    "lora_alpha": "lora.alpha",
    "lora_dropout": "lora.dropout",
    "lora_target": "lora.targets",
    "target_modules": "lora.targets",
    "model_path": "model.path",
    "model_name_or_path": "model.path",
    "dataset_path": "data.path",
    "torch_type": "model.dtype",
    "torch_dtype": "model.dtype",
    "logging_steps": "log.steps",
    "eval_steps": "eval.steps",
    "report_to": "log.trackers",
    "adapter_name_or_path": "generate.adapter",
    "max_tokens": "generate.max_new_tokens",
    "do_sample": "generate.greedy",
    "load_in_4bit": "quant.experts",
    "load_in_8bit": "quant.experts",
}
"""Other trainers' names for cogtune's keys."""

_FIRST_SECTIONS = ("train", "generate")
"""For a name that exists in several sections, the section that is most likely meant."""


def nearest(name: str, keys: Sequence[str], others: Iterable[str] = ()) -> str | None:
    """Return the one of ``keys`` (dotted: ``train.lr``) or ``others`` (such as short flags) that ``name`` most likely
    means.
    """
    name = name.lower().strip("-").replace("-", "_")
    last = name.rpartition(".")[2]
    others = {other.replace("-", "_"): other for other in others}
    if name in keys or name in others:
        return others.get(name, name)
    elsewhere = _NAMES_ELSEWHERE.get(last, "")
    for known in (elsewhere, elsewhere.rpartition(".")[2]):  # the latter among the keys of one section
        if known in keys:
            return known
    same_last = [key for key in keys if key.rpartition(".")[2] == last]
    if same_last:
        preferred = [f"{section}.{last}" for section in _FIRST_SECTIONS if f"{section}.{last}" in same_last]
        if preferred and name == last:
            return preferred[0]
        return max(same_last, key=lambda key: difflib.SequenceMatcher(None, name, key).ratio())
    close = difflib.get_close_matches(name, [*keys, *others], n=1, cutoff=0.6)
    if close:
        return others.get(close[0], close[0])
    by_last = {key.rpartition(".")[2]: key for key in reversed(keys)}
    close = difflib.get_close_matches(last, by_last, n=1, cutoff=0.6)
    return by_last[close[0]] if close else None
