"""Shared by the commands that answer questions: their keys, and loading their model."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from cogtune.errors import ConfigError
from cogtune.language import tr

if TYPE_CHECKING:
    from cogtune.configuration.answer_config import GenerateSection
    from cogtune.generate.decoding import Decoding
    from cogtune.generate.generator import Generator
    from cogtune.generate.resolve import Resolved

MODEL_KEYS = (
    "model.",
    "quant.",
    "parallel.tensor",
    "generate.adapter",
    "generate.merge",
    "generate.device",
    "generate.offload",
)
"""Keys that choose the model and its place."""
DECODING_KEYS = tuple(
    f"generate.{name}"
    for name in (
        "max_new_tokens",
        "max_input_len",
        "greedy",
        "temperature",
        "top_p",
        "top_k",
        "seed",
        "prompt_lookup_num_tokens",
    )
)
"""Keys that choose how it answers."""


def names_of(given: Sequence[str]) -> tuple[str, ...]:
    """Return names that are joined by commas, given once or several times."""
    return tuple(name.strip() for text in given for name in text.split(",") if name.strip())


def require_choices(choices: Sequence[str]) -> None:
    """Raise ConfigError unless there are several different choices."""
    if len(set(choices)) < max(2, len(choices)):
        raise ConfigError(
            tr("--choices {choices}: at least two different ones were expected", choices=",".join(choices)),
            hint=tr("for example --choices yes,no"),
            code="config-value",
        )


def load(resolved: Resolved) -> Generator:
    """Load the model. Output goes to standard error: some libraries log to stdout when first imported."""
    from cogtune.generate.loading import load_resolved

    with contextlib.redirect_stdout(sys.stderr):
        return load_resolved(resolved, note)


def note(text: str) -> None:
    """Print a note, separate from the answers."""
    print(text, file=sys.stderr, flush=True)


def tell_unused_guesses(section: GenerateSection, decoding: Decoding, rows: int = 1) -> None:
    """Say where prompt look-up guesses nothing. ``rows``: questions answered at once."""
    if not section.prompt_lookup_num_tokens:
        return
    if decoding.sample:
        note(
            tr(
                "generate.prompt_lookup_num_tokens: answers are sampled here, and only greedy ones are guessed"
                " (--greedy)"
            )
        )
    elif rows > 1:
        note(
            tr(
                "generate.prompt_lookup_num_tokens: {rows} answers are under way together, and guesses are made while"
                " one is alone (--batch-size 1)",
                rows=rows,
            )
        )
