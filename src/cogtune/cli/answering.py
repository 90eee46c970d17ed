"""Shared by the commands that answer questions: their keys, and loading their model."""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cogtune.generate.generator import Generator
    from cogtune.generate.loading import Resolved

MODEL_KEYS = ("model.", "quant.", "parallel.tensor", "generate.adapter", "generate.device")
"""Keys that choose the model and its place."""
DECODING_KEYS = tuple(
    f"generate.{name}"
    for name in ("max_new_tokens", "max_input_len", "greedy", "temperature", "top_p", "top_k", "seed")
)
"""Keys that choose how it answers."""


def load(resolved: Resolved) -> Generator:
    """Load the model. Output goes to standard error: some libraries log to stdout when first imported."""
    from cogtune.generate.loading import load_resolved

    with contextlib.redirect_stdout(sys.stderr):
        return load_resolved(resolved, note)


def note(text: str) -> None:
    """Print a note, separate from the answers."""
    print(text, file=sys.stderr, flush=True)
