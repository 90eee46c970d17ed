"""Keys and values that earlier versions had, and what to use instead."""

from __future__ import annotations

from cogtune.language import phrase

_FORMATS = phrase("leave it out; quant.experts, quant.tower and quant.embedding make a model smaller")
_OPTIMISER = phrase("use train.optimizer adamw8bit, whose moments take a quarter of the memory")

INSTEAD = {
    "quant.glu_adapter": _FORMATS,
    "quant.head": _FORMATS,
    "train.optimizer=paged_adamw": _OPTIMISER,
    "train.optimizer=paged_adamw8bit": _OPTIMISER,
}
"""A key, or ``key=value``, and a template that says what to use instead of it."""

CONSTANT = {"quant.glu_adapter": "none", "quant.head": "none"}
"""Keys that are gone and decided what is learnt: the value that every run has now. Files of earlier runs may say it."""
