"""An answer under way in a slot: what its tokens mean for it."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from cogtune.generate.prompt_lookup import PromptLookup
from cogtune.generate.requests import AnswerText, Pending
from cogtune.processing.processor import CogVLM2Processor


class Active:
    """A request with a slot.

    Args:
        guesses: most tokens that are guessed by prompt look-up; 0: none. A request that samples has none.

    Attributes:
        launched: number of tokens whose computation has begun.
    """

    def __init__(self, pending: Pending, slot: int, processor: CogVLM2Processor, guesses: int) -> None:
        request = pending.request
        self.pending, self.slot = pending, slot
        self.wanted, self.launched = request.decoding.max_new_tokens, 1
        self.lookup: PromptLookup | None = None
        if guesses and not request.decoding.sample:
            self.lookup = PromptLookup([*request.beginning_text, *request.text], guesses)
        self._text = AnswerText(processor, request.stop)

    def take(self, token: int, ends: Collection[int]) -> str | None:
        """Add a token to the answer, and return why it has ended, or None."""
        if self.pending.cancelled:
            return "cancelled"
        if token in ends:
            return "stop"
        self.pending.token_ids.append(token)
        self.pending.push(self._text.push(token))
        if self._text.stopped:
            return "stop"
        return "length" if len(self.pending.token_ids) >= self.wanted else None

    def end(self, reason: str | None, error: BaseException | None = None) -> None:
        """End the answer with the rest of its text, or with an error."""
        if not self.pending.done:
            if error is None:
                self.pending.push(self._text.finish())
            self.pending.end(reason, error)


def end_tokens(model: Any) -> frozenset[int]:
    """Return the end tokens of configuration and checkpoint."""
    named = model.generation_config.eos_token_id
    named = [] if named is None else [named] if isinstance(named, int) else list(named)
    return frozenset({*model.config.eos_token_ids, *named})
