"""Guesses are what followed the same tokens last, in the prompt or the answer."""

from __future__ import annotations

from cogtune.generate.prompt_lookup import PromptLookup


def test_the_last_place_of_the_longest_run_is_taken() -> None:
    lookup = PromptLookup([1, 2, 3, 4, 9, 2, 3, 5, 6, 7, 8], 3)
    assert lookup.guess([]) == []  # nothing follows the 8 yet
    assert lookup.guess([3]) == [5, 6, 7]  # the last 3
    assert PromptLookup([1, 2, 3, 4, 9, 2, 3, 5], 3).guess([1, 2, 3]) == [4, 9, 2]  # 1 2 3 is longer than 2 3


def test_the_answer_itself_is_looked_up() -> None:
    lookup = PromptLookup([1], 2)
    assert lookup.guess([5, 6, 7]) == []
    assert lookup.guess([5, 6, 7, 8, 5]) == [6, 7]
    assert lookup.guess([5, 6, 7, 8, 5, 6, 7, 8, 5, 6]) == [7, 8]
    assert PromptLookup([], 4).guess([]) == []
    assert PromptLookup([], 4).guess([3, 3]) == [3]
