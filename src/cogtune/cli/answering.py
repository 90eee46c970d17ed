"""What the commands that answer questions share: their keys and their model."""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cogtune.generate.generator import Generator
    from cogtune.generate.loading import Resolved

MODEL_KEYS = ("model.", "quant.", "parallel.tensor", "generate.adapter", "generate.device")
"""The keys that say which model answers, and where."""
DECODING_KEYS = tuple(
    f"generate.{name}"
    for name in ("max_new_tokens", "max_input_len", "greedy", "temperature", "top_p", "top_k", "seed")
)
"""Those that say how."""


def load(resolved: Resolved) -> Generator:
    """The model, with what it says on standard error: some libraries log to stdout when first imported."""
    from cogtune.generate.loading import load_resolved

    with contextlib.redirect_stdout(sys.stderr):
        return load_resolved(resolved, note)


def note(text: str) -> None:
    """Something to know, beside the answers."""
    print(text, file=sys.stderr, flush=True)
