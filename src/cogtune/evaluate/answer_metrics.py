"""Metrics of short answers, numbers and boxes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from cogtune.evaluate.boxes import find_boxes, matched_overlaps
from cogtune.evaluate.metric import Kind, Metric, References, best_of, kind_of
from cogtune.evaluate.numbers import is_close
from cogtune.evaluate.text import normalise, words
from cogtune.evaluate.vqa import vqa_accuracy
from cogtune.language import phrase

_PEOPLE = 4  # references from which the rule of ten answers says something


def exact_match(answer: str, reference: str) -> float:
    """1 if both are the same after `normalise`."""
    return float(normalise(answer) == normalise(reference))


def token_f1(answer: str, reference: str) -> float:
    """Return SQuAD's F1 over the words of the normalised texts."""
    given, right = words(normalise(answer)), words(normalise(reference))
    if not given or not right:
        return float(given == right)
    same = sum((Counter(given) & Counter(right)).values())
    return 2 * same / (len(given) + len(right))


def anls(answer: str, reference: str) -> float:
    """Return 1 - the normalised edit distance, and 0 if that is at least 0.5: one answer's part of ANLS."""
    from rapidfuzz.distance import Levenshtein

    distance: float = Levenshtein.normalized_distance(*(" ".join(text.lower().split()) for text in (answer, reference)))
    return 1 - distance if distance < 0.5 else 0.0


def box_overlap(answer: str, reference: str) -> float:
    """Return the mean intersection over union of the boxes, matched one to one."""
    overlaps = matched_overlaps(find_boxes(answer), find_boxes(reference))
    return sum(overlaps) / len(overlaps)


def box_accuracy(answer: str, reference: str) -> float:
    """Return the share of boxes, matched one to one, whose intersection over union is at least 0.5."""
    overlaps = matched_overlaps(find_boxes(answer), find_boxes(reference))
    return sum(overlap >= 0.5 for overlap in overlaps) / len(overlaps)


def _kinds(*kinds: Kind) -> Callable[[References], bool]:
    return lambda references: kind_of(references) in kinds


def numeric(tolerance: float) -> Metric:
    """Return the metric of numbers within a share of the right one, 0 to 1."""
    return Metric(
        "numeric" if tolerance == 0.05 else f"numeric:{tolerance:g}",
        phrase("number within tolerance"),
        phrase(
            "the number in the answer is within 5 % (or numeric:SHARE) of the right one: ChartQA's relaxed accuracy"
        ),
        _kinds("number"),
        best_of(lambda answer, reference: float(is_close(answer, reference, tolerance))),
        kinds=("number",),
    )


def answer_metrics() -> tuple[Metric, ...]:
    """Return the metrics of this module."""
    return (
        Metric(
            "exact",
            phrase("exact match"),
            phrase("equal after lower case, without punctuation and articles"),
            lambda references: True,
            best_of(exact_match),
            kinds=("number", "short"),
        ),
        Metric(
            "vqa",
            phrase("VQA accuracy"),
            phrase("over leaving out each of ten people's answers: min(1, others who gave this answer / 3)"),
            lambda references: len(references) >= _PEOPLE,
            lambda corpus: lambda answer, references: (vqa_accuracy(answer, references), 1.0),
            kinds=("number", "short"),
        ),
        Metric(
            "anls",
            phrase("ANLS"),
            phrase("1 - edit distance / length; 0 where the distance is half of the length or more"),
            _kinds("number", "short"),
            best_of(anls),
            package="rapidfuzz",
        ),
        numeric(0.05),
        Metric(
            "token_f1",
            phrase("token F1"),
            phrase("SQuAD's F1 over words; a Chinese character is a word"),
            _kinds("number", "short", "long"),
            best_of(token_f1),
            kinds=("short", "long"),
        ),
        Metric(
            "iou",
            phrase("box IoU"),
            phrase("mean intersection over union of boxes, matched one to one"),
            _kinds("box"),
            best_of(box_overlap),
            kinds=("box",),
        ),
        Metric(
            "box_accuracy",
            phrase("boxes at IoU 0.5"),
            phrase("share of boxes, matched one to one, whose intersection over union is at least 0.5"),
            _kinds("box"),
            best_of(box_accuracy),
            kinds=("box",),
        ),
    )
