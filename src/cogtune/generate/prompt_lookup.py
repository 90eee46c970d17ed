"""Prompt look-up: guesses of the next tokens from what followed the same tokens before, in the prompt or the answer.

Answers that repeat their prompt or themselves (keys of JSON, rows of a table, an earlier answer) then take fewer steps:
a step computes the newest token and the guesses after it together, and keeps those that the model would have chosen.
The answer stays the same.
"""

from __future__ import annotations

from collections.abc import Sequence

_LONGEST = 3  # tokens that are looked up, most first; docs/log.md counts what they find


class PromptLookup:
    """Guesses up to ``most`` tokens at a time after ``prompt`` (its text, without images) and an answer."""

    def __init__(self, prompt: Sequence[int], most: int) -> None:
        self.most = most
        self._tokens = list(prompt)
        self._answered = 0
        self._follows: dict[tuple[int, ...], int] = {}  # tokens -> where the last ones that followed them begin
        self._indexed = 0

    def guess(self, answer: Sequence[int]) -> list[int]:
        """Return what may follow the answer so far, often nothing. Each answer begins with the one before."""
        self._tokens += answer[self._answered :]
        self._answered = len(answer)
        tokens = self._tokens
        for end in range(self._indexed + 1, len(tokens)):
            for length in range(1, min(_LONGEST, end) + 1):
                self._follows[tuple(tokens[end - length : end])] = end
        self._indexed = max(len(tokens) - 1, 0)
        for length in range(min(_LONGEST, len(tokens)), 0, -1):
            start = self._follows.get(tuple(tokens[-length:]))
            if start is not None:
                return tokens[start : start + self.most]
        return []
