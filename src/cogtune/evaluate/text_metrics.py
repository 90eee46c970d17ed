"""Metrics of longer texts and of reading, by the packages of the extra ``metrics``; CIDEr is our own."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np

from cogtune.evaluate.cider import Cider
from cogtune.evaluate.metric import Floats, Metric, References, Score, best_of, kind_of
from cogtune.evaluate.text import has_cjk, words, written_words
from cogtune.language import phrase


class _Words:
    """Our division into words, as rouge-score asks for it: its own drops everything but English letters and digits."""

    def tokenize(self, text: str) -> list[str]:
        return words(text)


def _rouge_l(answer: str, reference: str) -> float:
    return float(_rouge().score(reference, answer)["rougeL"].fmeasure)


@cache
def _rouge() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], tokenizer=_Words())


class _NoSynonyms:
    """Stands for WordNet, which would be a download: METEOR then matches words and their stems."""

    def synsets(self, word: str) -> list[Any]:
        return []


def _meteor(answer: str, references: References) -> float:
    from nltk.translate.meteor_score import meteor_score

    return float(meteor_score([words(text) for text in references], words(answer), wordnet=_NoSynonyms()))


def tokenizer_of(corpus: Sequence[References]) -> str:
    """Return sacrebleu's tokenizer for these references: ``zh``, single characters, if any is Chinese; else ``13a``."""
    return "zh" if any(has_cjk(text) for references in corpus for text in references) else "13a"


def _bleu_scorer(corpus: Sequence[References]) -> Score:
    from sacrebleu.metrics.bleu import BLEU

    bleu = BLEU(tokenize=tokenizer_of(corpus))

    def score(answer: str, references: References) -> list[float]:
        found = bleu.corpus_score([answer], [[reference] for reference in references])
        return [*found.counts, *found.totals, found.sys_len, found.ref_len]

    return score


def _bleu(sums: Floats, *, one: bool = False) -> Floats:
    """BLEU of summed counts, as sacrebleu smooths it; of ``one`` text, over the sizes of n-grams that it has."""
    from sacrebleu.metrics.bleu import BLEU

    def value(counts: Floats) -> float:
        whole = [round(count) for count in counts]
        score = BLEU.compute_bleu(
            whole[:4], whole[4:8], whole[8], whole[9], smooth_method="exp", effective_order=one
        )  # fmt: skip
        return float(score.score) / 100

    return np.apply_along_axis(value, -1, sums)


def _cider_scorer(corpus: Sequence[References]) -> Score:
    cider = Cider(corpus)
    return lambda answer, references: (cider(answer, references), 1.0)


def _errors(answer: str, references: References, *, by_word: bool) -> tuple[float, float]:
    """Edits to the nearest reference, and its length, in characters or words."""
    import jiwer

    found = []
    for reference in references:
        right, given = (" ".join(written_words(text)) if by_word else _one_line(text) for text in (reference, answer))
        out: Any = (jiwer.process_words if by_word else jiwer.process_characters)(right, given)
        edits = out.substitutions + out.deletions + out.insertions
        found.append((edits / max(1, out.hits + out.substitutions + out.deletions), edits, out))
    _, edits, out = min(found, key=lambda one: one[0])
    return float(edits), float(out.hits + out.substitutions + out.deletions)


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _no_box(references: References) -> bool:
    return kind_of(references) != "box"


def _text(references: References) -> bool:
    return kind_of(references) == "long"


def text_metrics() -> tuple[Metric, ...]:
    """Return the metrics of this module."""
    return (
        Metric(
            "rouge_l",
            phrase("ROUGE-L"),
            phrase("F1 of the longest common subsequence of words (rouge-score); a Chinese character is a word"),
            _no_box,
            best_of(_rouge_l),
            kinds=("long",),
            package="rouge_score",
        ),
        Metric(
            "bleu",
            phrase("BLEU"),
            phrase("corpus BLEU-4 (sacrebleu); its tokenizer is zh where a reference is Chinese, else 13a"),
            _text,
            _bleu_scorer,
            _bleu,
            kinds=("long",),
            package="sacrebleu",
            record=lambda sums: float(_bleu(sums, one=True)),
        ),
        Metric(
            "cider",
            phrase("CIDEr"),
            phrase("CIDEr-D of the COCO captions; words are divided without Java, a Chinese character is a word"),
            _text,
            _cider_scorer,
            kinds=("long",),
        ),
        Metric(
            "meteor",
            phrase("METEOR, stems"),
            phrase("METEOR by words and their stems (nltk), without WordNet's synonyms"),
            _no_box,
            lambda corpus: lambda answer, references: (_meteor(answer, references), 1.0),
            package="nltk",
        ),
        Metric(
            "cer",
            phrase("CER"),
            phrase("edits per character of the reference (jiwer); less is better"),
            _no_box,
            lambda corpus: lambda answer, references: _errors(answer, references, by_word=False),
            higher=False,
            package="jiwer",
        ),
        Metric(
            "wer",
            phrase("WER"),
            phrase("edits per word of the reference (jiwer); a Chinese character is a word; less is better"),
            _no_box,
            lambda corpus: lambda answer, references: _errors(answer, references, by_word=True),
            higher=False,
            package="jiwer",
        ),
    )
