"""Cut a conversation's history to what fits before a question."""

from __future__ import annotations

from collections.abc import Sequence

from cogtune.configuration.model import CogVLM2Config
from cogtune.data.budget import longest_history
from cogtune.errors import DataError
from cogtune.language import tr
from cogtune.processing.encode import Encoder

Turns = Sequence[tuple[str, str]]


def prompt_limit(config: CogVLM2Config, *, head: int, max_new_tokens: int, max_input_len: int | None = None) -> int:
    """Return the most tokens that a prompt's text may have.

    That is the model's context less the answer and the ``head`` tokens before the text (BOS and images:
    `Encoder.head_tokens`), and at most ``max_input_len``. If the answer limit is as large as the context, the prompt
    gets half of the room.
    """
    room = config.most_tokens - head
    limit = max(room - max_new_tokens, room // 2)
    return limit if max_input_len is None else min(limit, max_input_len)


def fit_history(
    encoder: Encoder, query: str, history: Turns, limit: int, template: str | None = None
) -> tuple[list[tuple[str, str]], int]:
    """Return the newest turns of ``history`` that fit ``limit`` prompt tokens, and the number of turns left out.

    Raises:
        DataError: the question alone is too long.
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
            tr("the question has {ids} tokens; {limit} fit", ids=len(ids), limit=limit),
            hint=tr("shorten it, or raise --max-input-len or lower --max-new-tokens"),
            code="question-too-long",
        )
    return turns[first:], first
