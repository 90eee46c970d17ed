"""What the commands that answer questions share: their model, and how they show what they do."""

from __future__ import annotations

import contextlib
import sys
import time
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


class Progress:
    """A line on stderr: rewritten in a terminal, one every half minute elsewhere."""

    def __init__(self, unit: str) -> None:
        self._unit = unit
        self._start = self._last = time.monotonic()
        self._first: int | None = None
        self._terminal = sys.stderr.isatty()

    def __call__(self, done: int, total: int) -> None:
        """``done`` of ``total`` are finished, with what was finished before this start."""
        now = time.monotonic()
        if self._first is None:
            self._first = done
        if done < total and now - self._last < (0.2 if self._terminal else 30):
            return
        self._last = now
        speed = (done - self._first) / max(now - self._start, 1e-9)
        left = f", {_duration((total - done) / speed)} left" if speed and done < total else ""
        text = f"{done}/{total} {self._unit}, {speed:.2f}/s{left}"
        if self._terminal:
            end = "\n" if done == total else ""
            print(f"\r{text:<70}", end=end, file=sys.stderr, flush=True)
        else:
            note(text)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"
