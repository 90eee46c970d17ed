"""How much of a conversation fits in front of a question."""

from __future__ import annotations

from collections.abc import Sequence

from cogtune.configuration.model import CogVLM2Config
from cogtune.data.budget import longest_history
from cogtune.errors import DataError
from cogtune.processing.encode import Encoder

Turns = Sequence[tuple[str, str]]


def prompt_limit(config: CogVLM2Config, *, head: int, max_new_tokens: int, max_input_len: int | None = None) -> int:
    """How many tokens a prompt's text may have.

    That is what the model's context leaves beside the answer and the ``head`` tokens before the text (BOS and images:
    `Encoder.head_tokens`), and no more than ``max_input_len``. An answer limit as large as the context leaves the
    prompt half of the room.
    """
    room = config.max_position_embeddings - head
    limit = max(room - max_new_tokens, room // 2)
    return limit if max_input_len is None else min(limit, max_input_len)


def fit_history(
    encoder: Encoder, query: str, history: Turns, limit: int, template: str | None = None
) -> tuple[list[tuple[str, str]], int]:
    """The newest turns of ``history`` with which the prompt has at most ``limit`` tokens, and how many were left out.

    Raises:
        DataError: the question alone is longer.
    """
    turns = list(history)
    search = longest_history(0, len(turns), limit)
    first = next(search)
    while True:
        ids = encoder.prompt_ids(query, turns[first:], template)
        try:
            first = search.send(ids)
        except StopIteration as result:
            first, ids = result.value
            break
    if len(ids) > limit:
        raise DataError(
            f"the question has {len(ids)} tokens; {limit} fit",
            hint="shorten it, or raise --max-input-len or lower --max-new-tokens",
            code="question-too-long",
        )
    return turns[first:], first
