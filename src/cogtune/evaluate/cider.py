"""CIDEr-D: n-grams of an answer and its references, weighted by how rare they are among the references.

The formula of the COCO caption evaluation. Texts are divided by `words` instead of Stanford's Java tokenizer, so values
of other tools agree where the words do.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from cogtune.evaluate.text import words

_LONGEST = 4  # words of an n-gram
_SIGMA = 6.0  # of the penalty for another length
Grams = Counter[tuple[str, ...]]


def grams(text: str) -> Grams:
    """Count the n-grams of one to four words."""
    found = words(text)
    return Counter(
        tuple(found[at : at + size]) for size in range(1, _LONGEST + 1) for at in range(len(found) - size + 1)
    )


class Cider:
    """Scores answers against a corpus of references, whose document frequencies it counts once."""

    def __init__(self, corpus: Sequence[Sequence[str]]) -> None:
        self._log_records = math.log(len(corpus))
        self._records: Grams = Counter()
        for references in corpus:
            self._records.update({gram for reference in references for gram in grams(reference)})

    def __call__(self, answer: str, references: Sequence[str]) -> float:
        """Return CIDEr-D of one answer, 0 to 10 (published tables show 100 times the mean)."""
        given = _Vector(self, grams(answer))
        sums = sum(_similarity(given, _Vector(self, grams(reference))) for reference in references)
        return 10 * sums / len(references)

    def weight(self, gram: tuple[str, ...]) -> float:
        """Return the logarithm of records per record that has the n-gram."""
        return self._log_records - math.log(max(1, self._records[gram]))


class _Vector:
    """Weighted n-grams, their norm for each size, and the number of pairs of words, which stands for the length."""

    def __init__(self, cider: Cider, counts: Grams) -> None:
        self.weights: list[dict[tuple[str, ...], float]] = [{} for _ in range(_LONGEST)]
        for gram, count in counts.items():
            self.weights[len(gram) - 1][gram] = count * cider.weight(gram)
        self.norms = [math.sqrt(sum(value**2 for value in part.values())) for part in self.weights]
        self.pairs = sum(count for gram, count in counts.items() if len(gram) == 2)


def _similarity(given: _Vector, right: _Vector) -> float:
    penalty = math.exp(-((given.pairs - right.pairs) ** 2) / (2 * _SIGMA**2))
    total = 0.0
    for size in range(_LONGEST):
        right_weights = right.weights[size]
        dot = sum(
            min(value, right_weights.get(gram, 0.0)) * right_weights.get(gram, 0.0)
            for gram, value in given.weights[size].items()
        )
        norms = given.norms[size] * right.norms[size]
        total += dot / norms if norms else dot
    return total * penalty / _LONGEST
